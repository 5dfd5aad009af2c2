"""What the tests here share: right answers, a folder that a server filled, and a library that makes a disk fail."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.server.kv_damage.place import QUESTIONS, SALTS, Expected, Place, ask


@pytest.fixture(scope="session")
def expected(repository: Path) -> Expected:
    """The answers of a server that keeps nothing."""
    with Place(repository, Path("/nowhere"), enable_hmt=False, nvme_path="").serve() as (_, client):
        return {number: ask(client, number).token_ids for number in QUESTIONS}


@pytest.fixture(scope="session")
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
