"""API keys: never kept, taken away at once, and nobody gets in by accident."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from client.commands.app import app
from client.gateway import keys
from client.gateway.settings import KEYS_NAME
from python_backends.errors import AuthenticationError, ConfigError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "api_keys.json"


@pytest.fixture
def ring(path: Path, monkeypatch: pytest.MonkeyPatch) -> keys.KeyRing:
    monkeypatch.setattr(keys.KeyRing, "CHECK_S", -1.0)
    return keys.KeyRing(path)


def test_without_a_file_no_key_is_needed(ring: keys.KeyRing) -> None:
    assert not ring.needed


def test_a_key_is_known_by_its_hash_alone(ring: keys.KeyRing, path: Path) -> None:
    first, second = keys.add(path, "ann"), keys.add(path, "bob", 2, 60)
    assert first not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert ring.needed
    assert ring.check(first).name == "ann"
    assert (ring.check(second).max_concurrent_requests, ring.check(second).max_requests_per_minute) == (2, 60)
    for wrong in ("", "x", first[:-1], first + "x", first.upper(), "\udcff"):
        with pytest.raises(AuthenticationError):
            ring.check(wrong)


def test_a_removed_key_is_refused_and_the_last_one_leaves_the_door_shut(ring: keys.KeyRing, path: Path) -> None:
    key = keys.add(path, "ann")
    assert ring.check(key)
    keys.remove(path, "ann")
    assert ring.needed
    with pytest.raises(AuthenticationError):
        ring.check(key)


@pytest.mark.parametrize("damage", ["", "[{]", '[{"name": "x"}]', "{}", "[1]"])
def test_a_damaged_file_lets_nobody_in(ring: keys.KeyRing, path: Path, damage: str) -> None:
    key = keys.add(path, "ann")
    assert ring.check(key)
    path.write_text(damage)
    assert ring.needed
    with pytest.raises(AuthenticationError):
        ring.check(key)


def test_a_file_that_vanishes_while_serving_lets_nobody_in(ring: keys.KeyRing, path: Path) -> None:
    key = keys.add(path, "ann")
    assert ring.needed
    path.unlink()
    assert ring.needed
    with pytest.raises(AuthenticationError):
        ring.check(key)


def test_names_are_unique_and_unknown_ones_are_said(path: Path) -> None:
    keys.add(path, "ann")
    with pytest.raises(ConfigError, match="wicore keys remove ann"):
        keys.add(path, "ann")
    with pytest.raises(ConfigError, match="'bob'"):
        keys.remove(path, "bob")


def test_the_command_makes_shows_and_takes_away_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def wicore_keys(*arguments: str) -> str:
        app(["keys", *arguments, "--repository", str(tmp_path)], standalone_mode=False)
        return capsys.readouterr().out

    key = wicore_keys("add", "ann", "--concurrent", "2").strip()
    assert keys.KeyRing(tmp_path / KEYS_NAME).check(key).max_concurrent_requests == 2
    assert wicore_keys("list").split() == ["ann", "concurrent=2"]
    assert key not in wicore_keys("list", "--json")
    wicore_keys("remove", "ann")
    assert wicore_keys("list") == ""
