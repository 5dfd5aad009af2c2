"""The files of the tier on disk damaged under a real server: answers stay right, and the metrics tell what happened."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.server.kv_damage.place import PAGE, Expected, Place, answers_are_right, counted


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
