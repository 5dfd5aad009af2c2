"""Finding a tritonserver, and what is laid out around it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from client.server import installation
from python_backends.errors import ServerStartError


def test_one_on_path_wins_and_keeps_its_own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = tmp_path / "tritonserver"
    binary.write_text("#!/bin/sh\n", encoding="utf-8")
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert installation.find() == installation.Installation(binary)


def test_the_wheel_s_backend_is_staged_with_the_stub_of_this_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    found = installation.find()
    assert found.backends
    staged = found.backends / "python"
    assert (staged / "libtriton_python.so").resolve().is_file()
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert (staged / installation.STUB).resolve().parent.name == version
    before = os.stat(staged).st_mtime_ns
    assert installation.find() == found
    assert os.stat(staged).st_mtime_ns == before


def test_links_of_a_replaced_wheel_are_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    backends = installation.find().backends
    assert backends
    link = backends / "python" / "libtriton_python.so"
    link.unlink()
    link.symlink_to("/nowhere/libtriton_python.so")
    assert installation.find().backends == backends
    assert link.resolve().is_file()


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("", encoding="utf-8")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("XDG_CACHE_HOME", str(occupied))
    with pytest.raises(ServerStartError, match="XDG_CACHE_HOME"):
        installation.find()


def test_the_stub_finds_this_interpreter_first() -> None:
    environment = installation.Installation(Path("tritonserver")).environment()
    assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)


def test_an_interpreter_without_wicore_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python3"
    python.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'python_backends'\" >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ServerStartError, match="pip install"):
        installation.check_environment(installation.Installation(Path("tritonserver")))
