"""A disk that fails, hangs, is full or may not be written, and a clock that jumps, under a real server: answers stay
right, and the metrics tell what happened."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from client import Client
from client.gateway.settings import GatewaySettings
from client.server.gateway import Gateway
from python_backends.errors import TierIoError, WiCoreError
from tests.server.kv_damage.place import (
    MB,
    QUESTIONS,
    SALTS,
    Expected,
    Place,
    answers_are_right,
    ask,
    counted,
    failures,
    page,
)

RESTS_S = 16.0
"""After several failures in a row the tier leaves the disk alone."""


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
