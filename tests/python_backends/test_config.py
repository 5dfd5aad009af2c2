"""`wicore.json`: what it may say, and that anything else is refused by name before a server starts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from python_backends.config import CONFIG_NAME, Config, from_values, load
from python_backends.errors import ConfigError

NAMES = [field.name for field in dataclasses.fields(Config)]


def test_without_a_file_everything_is_the_default(tmp_path: Path) -> None:
    assert load(tmp_path) == Config()


def test_what_the_file_says_replaces_the_default(tmp_path: Path) -> None:
    (tmp_path / CONFIG_NAME).write_text('{"max_batch_size": 3, "cpu_memory_gb": 2, "pan_and_scan": true}', "utf-8")
    assert load(tmp_path) == dataclasses.replace(Config(), max_batch_size=3, cpu_memory_gb=2, pan_and_scan=True)


REFUSED = [
    ("{", "cannot be read as JSON"),
    ("[]", "must hold one JSON object"),
    ('{"max_batchsize": 3}', "did you mean 'max_batch_size'"),
    ('{"colour": 3}', "valid keys: "),
    ('{"max_batch_size": "3"}', "max_batch_size must be int, not '3'"),
    ('{"max_batch_size": true}', "max_batch_size must be int, not True"),
    ('{"max_batch_size": 0}', "max_batch_size is 0; it must be at least 1"),
    ('{"max_queue": -1}', "max_queue is -1; it must be at least 0"),
    ('{"cpu_memory_gb": NaN}', "cpu_memory_gb is nan; it must be at least 0"),
    ('{"cpu_memory_gb": Infinity}', "cpu_memory_gb is inf"),
]


@pytest.mark.parametrize(("text", "reason"), REFUSED)
def test_a_file_that_cannot_be_meant_is_refused_by_name(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / CONFIG_NAME).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=reason):
        load(tmp_path)


def test_zero_is_taken_where_it_means_something() -> None:
    assert from_values({"max_draft": 0, "max_queue": 0, "num_threads": 0}, "here").max_queue == 0


@given(st.sampled_from(NAMES), st.integers(0, 40))
def test_a_key_with_one_letter_missing_is_led_back_to_itself(name: str, position: int) -> None:
    cut = name[: position % len(name)] + name[position % len(name) + 1 :]
    if cut in NAMES:
        return
    with pytest.raises(ConfigError, match="did you mean") as refused:
        from_values({cut: 1}, "here")
    assert json.dumps(cut)[1:-1] in str(refused.value)
