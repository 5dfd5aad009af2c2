"""`wicore stats`: what a running server holds and where."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer

from client.commands.options import Address, AsJson
from client.commands.terminal import command, emit
from client.connection import DEFAULT_ADDRESS

BAR = 24
TIMEOUT_S = 5.0


@command
def stats(
    *,
    address: Address = DEFAULT_ADDRESS,
    watch: Annotated[float, typer.Option(help="Again every so many seconds; 0: once.", min=0)] = 0,
    as_json: AsJson = False,
) -> None:
    """Show a running server's requests and the tiers of its KV cache.

    wicore stats

    wicore stats --watch 2
    """
    import time

    while True:
        found = read_stats(address)
        if as_json:
            emit(found)
        else:
            print("\n".join(drawn(found)), flush=True)
        if not watch:
            return
        time.sleep(watch)
        if not as_json:
            print(flush=True)


def read_stats(address: str) -> dict[str, Any]:
    """The decoder's account of itself (`Engine.snapshot`).

    Raises:
        ServerUnavailableError, DeadlineExceededError: it does not answer.
    """
    import grpc
    from tritonclient.grpc import service_pb2_grpc

    from client.answer import from_rpc, read_piece
    from client.request import infer_request
    from python_backends import contract
    from python_backends.errors import ServerUnavailableError

    request = infer_request(contract.MODELS[contract.DECODER], {"command": "stats"}, "wicore-stats")
    with grpc.insecure_channel(address, options=[("grpc.max_receive_message_length", -1)]) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        try:
            pieces = [read_piece(response) for response in stub.ModelStreamInfer(iter([request]), timeout=TIMEOUT_S)]
        except grpc.RpcError as error:
            raise from_rpc(error, address) from error
    piece = next((piece for piece in pieces if piece is not None), None)
    if piece is None:
        raise ServerUnavailableError("the decoder gave no statistics; see the server's log")
    values: dict[str, Any] = json.loads(piece.text)
    return values


def drawn(stats: Mapping[str, Any]) -> Iterator[str]:
    """The lines for a person."""
    running, waiting, slots = (int(stats[name]) for name in ("running", "waiting", "slots"))
    yield f"{'slots':<8} {bar(running / max(1, slots))} {running} of {slots} in use, {waiting} waiting"
    cache = stats.get("kv_cache")
    if cache is None:
        yield "no KV cache (enable_hmt is off)"
        return
    for tier, found in cache["tiers"].items():
        used, limit = found["live_bytes"], found["usable_bytes"]
        faults = sum(found["failures"].values())
        yield (
            f"{tier:<8} {bar(used / max(1, limit))} {size(used)} of {size(limit)}, {found['entries']:,} entries"
            + (f", {faults} failures ({_counts(found['failures'])})" if faults else "")
        )
    tokens = cache["prompt_tokens"]
    total = sum(tokens.values()) or 1
    yield "prompt   " + ", ".join(f"{count / total:.0%} {source}" for source, count in tokens.items() if count)
    if missed := {why or "nothing": count for why, count in cache["lookups"].items()}:
        yield f"missed   {_counts(missed)}"
    if moves := cache["manager"]["moves"]:
        yield f"moves    {_counts(moves)}"
    if speeds := cache["mover"].get("bytes_per_s"):
        yield "speed    " + ", ".join(f"{link} {size(speed)}/s" for link, speed in speeds.items())


def bar(share: float) -> str:
    """A share as blocks, full above 1."""
    full = round(BAR * min(1.0, share))
    return "█" * full + "░" * (BAR - full)


def size(num_bytes: float) -> str:
    """Bytes in decimal units, three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items(), key=lambda item: -item[1]) if count)
