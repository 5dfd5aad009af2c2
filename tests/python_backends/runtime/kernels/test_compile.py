"""The library is compiled once, for this user alone, and what cannot work says what to do."""

import os
import shutil
import stat
import subprocess

import pytest

from python_backends.errors import InternalError
from python_backends.runtime.kernels import compile as module
from python_backends.runtime.kernels import cpu
from python_backends.runtime.kernels.self_check import check

VARIANT = cpu.variant() or cpu.Variant.AVX2


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "wicore" / "kernels"


def test_a_second_process_finds_the_library_and_only_its_owner_can_change_it(cache):
    first = module.library(VARIANT)
    made = first.stat().st_mtime_ns
    assert module.library(VARIANT) == first
    assert first.stat().st_mtime_ns == made
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert [entry.name for entry in cache.iterdir()] == [first.name]
    first.chmod(0o666)
    module.library(VARIANT)
    assert not first.stat().st_mode & stat.S_IWOTH


@pytest.mark.parametrize("variant", list(cpu.Variant))  # those that this processor cannot run, too
def test_the_sources_compile_without_a_warning(variant, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_OPTIONS", (*module._OPTIONS, "-Wall", "-Wextra", "-Werror"))
    assert module._compile(module._compiler(), variant, tmp_path).is_file()


def test_other_sources_make_another_library(cache, monkeypatch, tmp_path):
    sources = tmp_path / "src"
    shutil.copytree(module._SOURCES, sources)
    compiler = module._compiler()
    same = module._key(compiler)
    module._key.cache_clear()
    monkeypatch.setattr(module, "_SOURCES", sources)
    assert module._key(compiler) == same
    module._key.cache_clear()
    (sources / "ops.cc").write_bytes(b"// changed\n")
    assert module._key(compiler) != same
    module._key.cache_clear()


def test_no_compiler_and_a_failing_one_are_named(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InternalError, match=r"install g\+\+ or clang\+\+"):
        module.library(VARIANT)
    broken = tmp_path / "broken"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho it is broken >&2\nexit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(InternalError, match="it is broken"):
        module.library(VARIANT)
    assert not any(cache.iterdir())


def test_a_cache_that_others_can_write_is_not_used(cache, monkeypatch, tmp_path):
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.setattr(module.tempfile, "gettempdir", lambda: str(other))
    assert module.kernel_folder() == other / f"wicore-{os.geteuid()}"
    (other / f"wicore-{os.geteuid()}").chmod(0o777)
    with pytest.raises(InternalError, match="XDG_CACHE_HOME"):
        module.kernel_folder()


def test_a_library_that_multiplies_wrongly_is_refused(compiled, tmp_path, monkeypatch):
    sources = tmp_path / "src"
    shutil.copytree(module._SOURCES, sources)
    for source in sources.rglob("*.cc"):
        text = source.read_text(encoding="utf-8")
        source.write_text(text.replace("_srli_epi16(both, 4)", "_srli_epi16(both, 3)"), encoding="utf-8")
    monkeypatch.setattr(module, "_SOURCES", sources)
    wrong = module._compile(module._compiler(), VARIANT, tmp_path)
    check(compiled)
    with pytest.raises(InternalError, match="rows times 4-bit weights are off by"):
        check(wrong)


def test_what_is_no_library_is_refused(tmp_path):
    broken = tmp_path / "broken.so"
    subprocess.run(["touch", str(broken)], check=True)
    with pytest.raises(InternalError, match="cannot be loaded"):
        check(broken)
