"""The tier on disk damaged in every way under a real server: answers stay right, and the metrics tell what happened."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from client import Client
from client.gateway.settings import GatewaySettings
from client.server import Server, ServerOptions
from client.server.gateway import Gateway
from python_backends import manifest
from python_backends.config import Config
from python_backends.decoder.open import _fingerprint, open_runtime
from python_backends.errors import EntryLostError, TierIoError, WiCoreError
from python_backends.kv.open import open_cache
from python_backends.runtime.base import KvLayout

PAGE, MB = 4096, 2**20
CONFIG = Config(
    max_batch_size=4,
    max_context_length=2048,
    cpu_memory_gb=0.5,
    kv_cache_share=0.06,
    kv_block_tokens=16,
    nvme_memory_gb=0.05,
    nvme_free_floor_gb=0.0,
    cpu_kernels="onnxruntime",  # ours are compiled first
)
QUESTIONS = range(6)
SALTS = ("", "mine")
COUNTED_S = 20.0
"""Metrics are written every few seconds."""
RESTS_S = 16.0
"""After several failures in a row the tier leaves the disk alone."""
Expected = Mapping[int, tuple[int, ...]]


class Place:
    """A repository, a folder for the tier, and servers on it, one after another."""

    def __init__(self, repository: Path, folder: Path, **settings: Any) -> None:
        self.repository, self.folder = repository, folder
        self.settings = {"nvme_path": str(folder), **settings}

    @property
    def config(self) -> Config:
        values = {name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__}
        return Config(**values | self.settings)

    @contextlib.contextmanager
    def serve(self) -> Iterator[tuple[Server, Client]]:
        options = ServerOptions(
            self.repository,
            http_port=0,
            grpc_port=0,
            metrics_port=0,
            drain_s=2,
            config=self.config,
        )
        with Server(options) as server, Client(server.addresses.grpc, timeout_s=60) as client:
            yield server, client
            server.check()

    def check(self) -> int:
        """What the next server would find is whole: the books hold, and every entry gives its bytes or says why not.

        Returns how many could be read.
        """
        layout, fingerprint = about(self.repository)
        cache = open_cache(layout, fingerprint, self.config, 32 * MB)
        assert cache is not None
        store = cache._stores["nvme"]
        found = 0
        for key in store.entries():
            with contextlib.suppress(EntryLostError):
                store.read(key, memoryview(bytearray(key.num_bytes)))
                found += 1
        for key in store.take_lost():
            cache._manager.lost(key, "nvme", "damaged", 0.0)
        cache.check_integrity()
        cache.close()
        return found


_ABOUT: dict[Path, tuple[KvLayout, str]] = {}


def about(repository: Path) -> tuple[KvLayout, str]:
    if repository not in _ABOUT:
        built = manifest.load(repository)
        runtime = open_runtime(built, CONFIG)
        _ABOUT[repository] = runtime.kv_layout, _fingerprint(built, CONFIG)
        runtime.close()
    return _ABOUT[repository]


def ask(client: Client, number: int, **options: Any) -> Any:
    """Question ``number``, about a picture, some 300 tokens long."""
    picture = Image.new("RGB", (64, 64), (40 * number, 20, 200))
    text = " ".join(str((number + 3) * word % 97) for word in range(120))
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
    return client.generate(messages=[message], images=[picture], max_tokens=6, ignore_eos=True, **options)


def failures(metrics: str, family: str = "wicore_kv_failures_total") -> dict[str, float]:
    """Counts by reason."""
    found = re.findall(rf'{family}\{{.*reason="(\w+)".*\}} (\S+)', metrics)
    return {reason: float(value) for reason, value in found}


def page(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        text: str = answer.read().decode()
    return text


def counted(server: Server, reasons: set[str], family: str = "wicore_kv_failures_total") -> dict[str, float]:
    """Wait until the server's metrics tell one of the reasons."""
    deadline = time.monotonic() + COUNTED_S
    while True:
        found = failures(page(server.addresses.metrics), family)
        if reasons & {reason for reason, value in found.items() if value}:
            return found
        assert time.monotonic() < deadline, f"none of {reasons} in {found}"
        time.sleep(0.5)


@pytest.fixture(scope="module")
def expected(repository: Path) -> Expected:
    """The answers of a server that keeps nothing."""
    with Place(repository, Path("/nowhere"), enable_hmt=False, nvme_path="").serve() as (_, client):
        return {number: ask(client, number).token_ids for number in QUESTIONS}


@pytest.fixture(scope="module")
def filled(repository: Path, tmp_path_factory: pytest.TempPathFactory, expected: Expected) -> Path:
    """A folder that a server filled with all conversations, under two salts, and left in order."""
    place = Place(repository, tmp_path_factory.mktemp("filled") / "kv")
    with place.serve() as (_, client):
        for number in QUESTIONS:
            for salt in SALTS:
                assert ask(client, number, session=str(number), cache_salt=salt).token_ids == expected[number]
                client.session(str(number), "save", cache_salt=salt)
    assert place.check() > 60
    return place.folder


@pytest.fixture
def place(repository: Path, filled: Path, tmp_path: Path) -> Place:
    """That folder, for this test alone."""
    shutil.copytree(filled, tmp_path / "kv")
    return Place(repository, tmp_path / "kv")


def answers_are_right(client: Client, expected: Expected) -> dict[str, int]:
    """Ask everything; the cached tokens by tier."""
    found: dict[str, int] = {}
    for number in QUESTIONS:
        for salt in SALTS:
            answer = ask(client, number, cache_salt=salt)
            assert answer.token_ids == expected[number]
            for tier, count in answer.usage.cached_tokens.items():
                found[tier] = found.get(tier, 0) + count
    return found


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.segment"))


def flip_bits(folder: Path, draw: random.Random) -> None:
    """One in every tenth page."""
    for path in segments(folder):
        content = bytearray(path.read_bytes())
        for start in range(PAGE, len(content), 10 * PAGE):
            content[start + draw.randrange(min(PAGE, len(content) - start))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)


def truncate(folder: Path, draw: random.Random) -> None:
    for path in segments(folder):
        os.truncate(path, draw.randrange(PAGE + 1, path.stat().st_size))


def overwrite(folder: Path, draw: random.Random) -> None:
    """The files of the tier and beside it are of somebody else."""
    for path in folder.iterdir():
        path.write_bytes(draw.randbytes(path.stat().st_size))


@pytest.mark.parametrize(
    ("damage", "rounds"),
    [
        (flip_bits, 1),
        (truncate, 1),
        (overwrite, 1),
        pytest.param(flip_bits, 20, marks=pytest.mark.soak),
        pytest.param(truncate, 60, marks=pytest.mark.soak),
    ],
)
def test_files_damaged_while_no_server_ran_change_no_answer_and_are_counted(
    place: Place, filled: Path, expected: Expected, damage: Callable[[Path, random.Random], None], rounds: int
) -> None:
    draw = random.Random(rounds)
    whole = sum(path.stat().st_size for path in segments(filled))
    for _ in range(rounds):
        shutil.rmtree(place.folder)
        shutil.copytree(filled, place.folder)
        damage(place.folder, draw)
        torn = sum(path.stat().st_size for path in segments(place.folder)) < whole
        with place.serve() as (server, client):
            answers_are_right(client, expected)
            assert sum(answers_are_right(client, expected).values()) > 0
            if not torn:  # what a file lacks at its end nobody knows of
                counted(server, {"checksum", "header", "identity", "superblock", "missing"})
        place.check()


def test_files_truncated_under_a_running_server_change_no_answer_and_are_counted(
    place: Place, expected: Expected
) -> None:
    with place.serve() as (server, client):
        for path in segments(place.folder):
            os.truncate(path, 2 * PAGE)
        answers_are_right(client, expected)
        counted(server, {"short"})
        counted(server, {"short"}, "wicore_kv_lost_total")
        assert answers_are_right(client, expected)["device"] > 0
    place.check()


@pytest.fixture
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What servers started from now on do to their files: the word in this file; see faults.c."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    library, word = tmp_path / "faults.so", tmp_path / "word"
    source = Path(__file__).with_name("faults.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    word.write_text("")
    monkeypatch.setenv("LD_PRELOAD", str(library))
    monkeypatch.setenv("KV_FAULTS", str(word))
    return word


def test_reads_that_fail_hang_or_flip_bits_change_no_answer_and_are_counted(
    place: Place, expected: Expected, faults: Path
) -> None:
    left = [(number, salt) for number in QUESTIONS for salt in SALTS]

    def asked() -> Any:
        number, salt = left.pop()
        answer = ask(client, number, cache_salt=salt)
        assert answer.token_ids == expected[number]
        return answer

    with place.serve() as (server, client):
        assert asked().usage.cached_tokens["nvme"] > 0
        settings = GatewaySettings(place.repository, "demo", triton=server.addresses.grpc, port=0)
        for word, reason in (("flip", "checksum"), ("hang", "late"), ("fail", "io")):
            faults.write_text(word)
            began = time.monotonic()
            asked()
            assert time.monotonic() - began < 30
            faults.write_text("")
            counted(server, {reason}, "wicore_kv_lost_total")
        time.sleep(RESTS_S)
        assert asked().usage.cached_tokens["nvme"] > 0, "the tier is well again"
        gateway = Gateway(settings)
        gateway.start()
        try:
            metrics = page(f"{gateway.address}/metrics")
            assert {"checksum", "io", "late"} <= failures(metrics, "wicore_kv_cache_lost_total").keys()
            assert {"checksum", "io"} <= failures(metrics, "wicore_kv_cache_failures_total").keys()
        finally:
            gateway.stop()
    place.check()


def test_a_clock_that_jumps_changes_no_answer_and_loses_nothing(place: Place, expected: Expected, faults: Path) -> None:
    place.settings["nvme_daily_writes_gb"] = 1.0
    for jump in (5 * 10**8, -(10**9)):
        faults.write_text(f"clock {jump}")
        with place.serve() as (_, client):
            answer = ask(client, 0)
            assert answer.token_ids == expected[0]
            assert answer.usage.cached_tokens["nvme"] > 0
            faults.write_text(f"clock {-jump}")
            for number in QUESTIONS:
                answer = ask(client, number, cache_salt="mine", session="jump")
                assert answer.token_ids == expected[number]
                assert answer.usage.cached_tokens["nvme"] > 0
                client.session("jump", "save", cache_salt="mine")
        assert place.check() > 60


def test_a_disk_that_is_full_or_refuses_writes_changes_no_answer_and_is_counted(
    repository: Path, expected: Expected, faults: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", disk], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("file systems cannot be mounted here")
    place = Place(repository, disk / "kv", nvme_memory_gb=0.016)
    try:
        with place.serve() as (server, client):
            assert ask(client, 0, session="first").token_ids == expected[0]
            client.session("first", "save")
            with (disk / "other").open("wb") as other, contextlib.suppress(OSError):
                while True:
                    other.write(bytes(MB))
                    other.flush()
            flood(client, expected)
            with pytest.raises(TierIoError, match="could not be saved"):
                ask_and_save(client)
            counted(server, {"disk", "limit"})
            (disk / "other").unlink()
            faults.write_text("refuse")
            with pytest.raises(TierIoError, match="could not be saved"):
                ask_and_save(client)
            counted(server, {"io", "paused"})
            faults.write_text("")
            answers_are_right(client, expected)
        assert place.check() > 0
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def flood(client: Client, expected: Expected) -> None:
    """Conversations that are to be on disk at once, more than the files there have room for."""
    for number in range(12):
        asked, salt = number % len(QUESTIONS), f"flood {random.random()}"
        answer = ask(client, asked, session=f"flood {number}", cache_salt=salt)
        assert answer.token_ids == expected[asked]
        client.session(f"flood {number}", "pin", cache_salt=salt)


def ask_and_save(client: Client) -> None:
    ask(client, 0, session="last", cache_salt="last")
    client.session("last", "save", cache_salt="last")


@contextlib.contextmanager
def forbidden(folder: Path) -> Iterator[None]:
    """Nothing can be made in the folder, nor its files opened for writing; root, too, is refused by the attribute."""
    if os.getuid():
        folder.chmod(0o500)
    elif subprocess.run(["chattr", "-R", "+i", folder], check=False, capture_output=True).returncode:
        pytest.skip("the file system has no immutable files")
    try:
        yield
    finally:
        if os.getuid():
            folder.chmod(0o700)
        else:
            subprocess.run(["chattr", "-R", "-i", folder], check=True)


def test_permissions_taken_away_change_no_answer_and_are_counted(place: Place, expected: Expected) -> None:
    with place.serve() as (server, client):
        with forbidden(place.folder):
            answers_are_right(client, expected)
            flood(client, expected)
            with contextlib.suppress(WiCoreError):
                client.session("flood 11", "save")
            counted(server, {"io", "paused"})
        answers_are_right(client, expected)
    with forbidden(place.folder), place.serve() as (_, client):
        answers_are_right(client, expected)
    place.check()


def test_of_two_servers_on_one_folder_the_second_does_without_and_both_are_right(
    place: Place, expected: Expected
) -> None:
    with place.serve() as (_, first), place.serve() as (second_server, second):
        assert answers_are_right(second, expected)["nvme"] == 0
        assert answers_are_right(first, expected)["nvme"] > 0
        assert 'tier="nvme"' not in page(second_server.addresses.metrics)
        assert "in use by another server" in second_server.log_path.read_text(errors="replace")
    assert place.check() > 60


@pytest.mark.parametrize("rounds", [2, pytest.param(200, marks=pytest.mark.soak)])
def test_a_server_killed_at_random_moments_of_a_write_heavy_load_is_right_when_it_is_back(
    place: Place, expected: Expected, rounds: int
) -> None:
    draw = random.Random(rounds)
    found = 0
    for number in range(rounds):
        with contextlib.suppress(WiCoreError), place.serve() as (server, client):
            found += answers_are_right(client, expected).get("nvme", 0)
            assert server.pid is not None
            killer = threading.Timer(draw.uniform(0, 2.5), os.killpg, (server.pid, signal.SIGKILL))
            killer.start()
            for turn in range(10_000):
                asked = draw.randrange(len(QUESTIONS))
                answer = ask(client, asked, session=f"{number}", cache_salt=f"{number} {turn % 7}")
                assert answer.token_ids == expected[asked]
                client.session(f"{number}", "save", cache_salt=f"{number} {turn % 7}")
        place.check()
    assert found > 0
    with place.serve() as (_, client):
        answers_are_right(client, expected)
    assert place.check() > 0
