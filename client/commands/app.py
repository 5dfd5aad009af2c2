"""The command line as a whole."""

from __future__ import annotations

import typer

from builders.cli import build
from client.commands import ask, chat, demo, doctor, keys, serve, session, stats, up
from client.commands.bench import (
    aiperf,
    attention,
    cache,
    engine,
    gateway,
    peers,
    precision,
    resume,
    tails,
    tiers,
    triton,
)
from client.commands.bench import serve as bench_serve
from client.commands.random_checkpoint import random_checkpoint

app = typer.Typer(
    name="wicore",
    help="Gemma-3 (text and images) served from NVIDIA Triton.\n\nbuild a checkpoint, serve it, then chat or describe. "
    "`wicore demo run` does all of it with a small model that comes along.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("build")(build)
app.command("serve")(serve.serve)
app.command("up")(up.up)
app.command("doctor")(doctor.doctor)
app.command("env")(serve.env)
app.command("chat")(chat.chat)
app.command("describe")(ask.describe)
app.command("stats")(stats.stats)
app.command("session")(session.session)
app.command("random-checkpoint")(random_checkpoint)

benches = typer.Typer(help="Measure speed and latency.", no_args_is_help=True, rich_markup_mode=None)
benches.command("aiperf")(aiperf.aiperf)
benches.command("attention")(attention.attention)
benches.command("cache")(cache.cache)
benches.command("engine")(engine.engine)
benches.command("gateway")(gateway.gateway)
benches.command("serve")(bench_serve.serve)
benches.command("peers")(peers.peers)
benches.command("precision")(precision.precision)
benches.command("resume")(resume.resume)
benches.command("tails")(tails.tails)
benches.command("tiers")(tiers.tiers)
benches.command("triton")(triton.triton)
app.add_typer(benches, name="bench")

demos = typer.Typer(help="The small trained model that comes with WiCore.", no_args_is_help=True, rich_markup_mode=None)
demos.command("run")(demo.run)
demos.command("draw")(demo.draw)
demos.command("eval")(demo.evaluate)
app.add_typer(demos, name="demo")

key_commands = typer.Typer(help="API keys of the gateway.", no_args_is_help=True, rich_markup_mode=None)
key_commands.command("add")(keys.add)
key_commands.command("list")(keys.list_)
key_commands.command("remove")(keys.remove)
app.add_typer(key_commands, name="keys")
