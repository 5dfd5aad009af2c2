"""Lines of tritonserver 2.51's log, and what a person is told."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.server.server_log import ServerLog, cause

PREFIX = "E1123 04:34:26.560371 7235 model_lifecycle.cc:642] "


def log_of(*lines: str) -> ServerLog:
    log = ServerLog()
    for line in lines:
        log.add(line)
    return log


def test_progress_follows_the_models() -> None:
    log = log_of('I1 model_lifecycle.cc:472] "loading: decoder:1"', 'I1 model_lifecycle.cc:472] "loading: tokenizer:1"')
    assert str(log.progress) == "loading decoder, tokenizer"
    assert log.add("I1 model_lifecycle.cc:839] \"successfully loaded 'decoder'\"")
    assert str(log.progress) == "loading tokenizer (1 ready)"


def test_a_failed_stage_is_shown_without_triton_s_wrapping() -> None:
    reason = (
        "Internal: ArtifactError: artifact: decoder.onnx is corrupt; run `wicore build`\\n\\nAt:\\n  model.py(4)\\n"
    )
    log = log_of(f"{PREFIX}\"failed to load 'decoder' version 1: {reason}\"")
    assert log.explain() == "decoder did not load: decoder.onnx is corrupt; run `wicore build`"


def test_an_ensemble_that_fails_for_its_stage_is_not_a_second_failure() -> None:
    ensemble = "ensemble 'gemma3' depends on 'decoder' which has no loaded version. Model 'decoder' loading failed"
    log = log_of(
        f"{PREFIX}\"failed to load 'decoder' version 1: Internal: ArtifactError: artifact: corrupt\"",
        f'E1 model_repository_manager.cc:703] "Invalid argument: {ensemble}"',
    )
    assert log.explain() == "decoder did not load: corrupt"
    assert log_of(f'E1 x.cc:1] "Invalid argument: {ensemble}"').explain().startswith("gemma3 did not load")


def test_one_reason_of_several_stages_is_told_once() -> None:
    log = log_of(
        *(f"{PREFIX}\"failed to load '{name}' version 1: Internal: gone\"" for name in ("decoder", "tokenizer"))
    )
    assert log.explain() == "decoder, tokenizer did not load: gone"


@pytest.mark.parametrize(
    ("reason", "shown"),
    [
        (
            "Internal: ModuleNotFoundError: No module named 'x'\\n\\nAt:\\n  y\\n",
            "ModuleNotFoundError: No module named 'x'",
        ),
        ("Invalid argument: unable to find backend", "unable to find backend"),
        ("", "no reason given"),
    ],
)
def test_other_reasons_keep_their_last_line(reason: str, shown: str) -> None:
    assert cause(reason) == shown


@given(st.text())
def test_no_line_can_break_the_reader(line: str) -> None:
    log = log_of(line)
    assert log.explain()


def test_an_option_that_triton_does_not_know_is_named() -> None:
    log = log_of("tritonserver: unrecognized option '--cache-config=local,size=1'", "Usage: tritonserver [options]")
    assert "--cache-config" in log.explain()


def test_a_machine_too_busy_to_start_a_stage_is_told_as_that() -> None:
    log = ServerLog()
    log.add("terminate called after throwing an instance of 'boost::interprocess::lock_exception'")
    assert log.starved
    assert "too busy" in log.explain()
