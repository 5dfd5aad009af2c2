"""A long conversation about a picture, resumed after a restart of the server, beside computing it anew.

A real server answers all turns; the conversation is a session that is saved to disk, and the server is stopped. Then,
in every round, a new server gets the next turn twice: once as the session goes on, once under a salt of its own, so
that nothing held may serve it. Before each, with no server running, the files of the tier on disk are read plainly from
end to end, past the page cache (O_DIRECT, or dropped from it first), as often as makes half a gigabyte; what a host
behind a virtual disk keeps is beyond our reach, and serves the tier just as well.
"""

from __future__ import annotations

import dataclasses
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from client.answer import Answer
from client.bench.machine import cores, processor, versions
from client.bench.prompts import Prompts
from client.bench.report import columns
from client.client import Client
from client.commands.stats import read_stats
from python_backends.config import Config
from python_backends.kv.tiers.checksum import ALGORITHMS, FASTEST
from python_backends.kv.tiers.files import SegmentFile, Staging, probe_direct_io

if TYPE_CHECKING:
    from client.server import Server

SESSION = "bench-resume"
PIECE_BYTES = 16 * 2**20
PLAIN_BYTES = 512 * 2**20
"""Read plainly before each restart, at least one pass."""
PICTURE = (320, 240)
StartServer = Callable[[], AbstractContextManager["Server"]]


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    turns: int = 20
    question_words: int = 130
    """A token each, where the model's own words are used."""
    answer_tokens: int = 16
    rounds: int = 3
    """Restarts."""
    seed: int = 0


def settings_for(settings: Config, folder: Path, disk_gb: float) -> Config:
    """The repository's settings with all tiers, the one on disk in ``folder``."""
    return dataclasses.replace(settings, enable_hmt=True, nvme_path=str(folder), nvme_memory_gb=disk_gb, max_draft=0)


def measure(start: StartServer, prompts: Prompts, plan: Plan, folder: Path, report: Callable[[str], None]) -> Any:
    """See the module; ``folder`` is the tier's.

    Raises:
        WiCoreError: a server does not start, or a request fails.
    """
    talk = _Conversation(prompts, plan)
    turns = []
    with start() as server, Client(server.addresses.grpc) as client:
        for turn in range(plan.turns):
            report(f"turn {turn + 1} of {plan.turns} …")
            answer = talk.ask(client, session=SESSION)
            turns.append({"ttft_ms": 1e3 * answer.ttft_s, **_usage(answer)})
            talk.go_on(answer)
        report("saving …")
        began = time.perf_counter()
        saved = client.session(SESSION, "save")
        save_s = time.perf_counter() - began
    rounds, plain = [], []
    for number in range(plan.rounds):
        report(f"restart {number + 1} of {plan.rounds} …")
        plain += plain_reads(folder)
        rounds.append(_resume(start, talk, number))
    return {
        "configuration": {
            "plan": asdict(plan), "checksum": ALGORITHMS[FASTEST].__name__.strip("_"), "processor": processor(),
            "cores": cores(), "versions": versions(),
        },
        "turns": turns,
        "saved": {**asdict(saved), "seconds": save_s},
        "rounds": rounds,
        "disk_reads_bytes_per_s": plain,
        "direct_io": probe_direct_io(folder),
    }  # fmt: skip


class _Conversation:
    """A picture first, then words alone."""

    def __init__(self, prompts: Prompts, plan: Plan) -> None:
        self._prompts, self._plan = prompts, plan
        rng = random.Random(plan.seed)
        self._picture = Image.frombytes("RGB", PICTURE, rng.randbytes(3 * PICTURE[0] * PICTURE[1]))
        self._messages: list[dict[str, Any]] = []
        self._next = self._question()

    def _question(self) -> dict[str, Any]:
        text: dict[str, Any] = {"type": "text", "text": self._prompts.words(self._plan.question_words)}
        return {"role": "user", "content": [text] if self._messages else [{"type": "image"}, text]}

    def ask(self, client: Client, **options: Any) -> Answer:
        """The next question, without going on."""
        return client.generate(
            messages=[*self._messages, self._next], images=[self._picture], max_tokens=self._plan.answer_tokens,
            ignore_eos=True, **options,
        )  # fmt: skip

    def go_on(self, answer: Answer) -> None:
        """The question and its answer are said; another question is next."""
        self._messages += [self._next, {"role": "assistant", "content": answer.text}]
        self._next = self._question()


def _resume(start: StartServer, talk: _Conversation, number: int) -> dict[str, Any]:
    """The conversation's next turn on a new server, resumed and computed; what ran before both warms neither's KV."""
    with start() as server, Client(server.addresses.grpc) as client:
        client.generate("Hello.", max_tokens=4, cache_salt="warm up")
        before = read_stats(server.addresses.grpc)["kv_cache"]["tiers"]["nvme"]
        resumed = talk.ask(client)
        found = read_stats(server.addresses.grpc)["kv_cache"]
        again = talk.ask(client)
        computed = talk.ask(client, cache_salt=f"round {number}")
    loaded = found["tiers"]["nvme"]["read_bytes"] - before["read_bytes"]
    speed = found["mover"]["bytes_per_s"].get("nvme→host", 0.0)
    return {
        "resumed_ttft_ms": 1e3 * resumed.ttft_s,
        "from_memory_ttft_ms": 1e3 * again.ttft_s,
        "computed_ttft_ms": 1e3 * computed.ttft_s,
        "sooner": computed.ttft_s / resumed.ttft_s,
        "loaded_bytes": loaded,
        "load_bytes_per_s": speed,
        "load_share": loaded / speed / resumed.ttft_s if speed else 0.0,
        "same_tokens": resumed.token_ids == computed.token_ids,
        "same_tokens_as_from_memory": resumed.token_ids == again.token_ids,
        "resumed": _usage(resumed),
        "computed": _usage(computed),
    }


def _usage(answer: Answer) -> dict[str, Any]:
    usage = answer.usage
    cached = {tier: count for tier, count in usage.cached_tokens.items() if count}
    return {"prompt_tokens": usage.prompt_tokens, "cached_tokens": cached, "cache_miss": usage.cache_miss}


def plain_reads(folder: Path) -> list[float]:
    """Bytes a second of each pass over the tier's files, in pieces of 16 MiB; none where there are no files."""
    paths = sorted(folder.glob("*.segment"))
    total = sum(path.stat().st_size for path in paths)
    passes = max(1, PLAIN_BYTES // total) if total else 0
    direct, piece = probe_direct_io(folder), Staging().take(PIECE_BYTES)
    return [total / sum(_read_through(path, piece, direct=direct) for path in paths) for _ in range(passes)]


def _read_through(path: Path, piece: memoryview, *, direct: bool) -> float:
    """Seconds to read a file."""
    with path.open("rb") as file:
        os.fdatasync(file.fileno())  # what is not written yet cannot be dropped
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    segment = SegmentFile(path, direct=direct)
    try:
        began, at = time.perf_counter(), 0
        while (found := segment.read(at, [piece])) == len(piece):
            at += found
        return time.perf_counter() - began
    finally:
        segment.close()


def median(rounds: Sequence[Mapping[str, Any]], name: str) -> float:
    """Of one figure over the rounds."""
    return float(statistics.median(each[name] for each in rounds))


def resume_text(found: Mapping[str, Any]) -> str:
    """What `wicore bench resume` prints."""
    rounds, last = found["rounds"], found["turns"][-1]
    heads = ["round", "computed ms", "from disk ms", "from memory ms", "sooner", "loaded MB", "load GB/s"]
    rows = [
        [
            f"restart {number + 1}", each["computed_ttft_ms"], each["resumed_ttft_ms"], each["from_memory_ttft_ms"],
            f"{each['sooner']:.1f}×", each["loaded_bytes"] / 1e6, f"{each['load_bytes_per_s'] / 1e9:.2f}",
        ]
        for number, each in enumerate(rounds)
    ]  # fmt: skip
    load, plain = median(rounds, "load_bytes_per_s"), sorted(found["disk_reads_bytes_per_s"])
    disk = statistics.median(plain) if plain else 0.0
    way = "O_DIRECT" if found["direct_io"] else "page cache dropped"
    usage = rounds[0]["resumed"]
    cached = ", ".join(f"{count:,} from {tier}" for tier, count in usage["cached_tokens"].items()) or "none"
    return "\n".join(
        [
            f"{len(found['turns'])} turns, the last of {last['prompt_tokens']:,} tokens; saved "
            f"{found['saved']['bytes'].get('nvme', 0) / 1e6:.1f} MB in {1e3 * found['saved']['seconds']:.0f} ms",
            f"the turn after a restart: {usage['prompt_tokens']:,} tokens, {cached}; first token after:",
            columns(heads, rows),
            f"median: {median(rounds, 'sooner'):.1f} times sooner than computing it",
            f"loading {load / 1e9:.2f} GB/s, {median(rounds, 'load_share'):.1%} of the time to the first token: "
            "the most that loading beside computing could save",
            f"plain reads of the same files, {way}, {len(plain)} passes: {disk / 1e9:.2f} GB/s "
            f"({plain[0] / 1e9 if plain else 0:.2f}–{plain[-1] / 1e9 if plain else 0:.2f}); loading is "
            f"{load / disk if disk else 0:.0%} of that",
            f"same tokens resumed and computed: {sum(each['same_tokens'] for each in rounds)} of {len(rounds)} rounds",
        ]
    )
