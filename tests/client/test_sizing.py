"""What `wicore up` decides to build and how large to serve it, on machines of many sizes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders.build import ONNXRUNTIME, TENSORRT
from builders.checkpoint import open_checkpoint
from client import sizing
from python_backends.config import Config, from_values
from python_backends.errors import ConfigError
from python_backends.runtime.memory import plan_slots
from tests.checkpoints import tiny
from tests.driver import model_shape
from tests.paths import DEMO_CHECKPOINT

GB = 1e9


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Free bytes of memory and, where there is a GPU, of its own."""
    made = SimpleNamespace(memory=64 * GB, gpu=None)

    def read(_: object) -> SimpleNamespace | None:
        return made.gpu and SimpleNamespace(memory_total_bytes=made.gpu + GB, memory_used_bytes=GB)

    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=made.memory))
    monkeypatch.setattr(sizing.GpuMeter, "read", read)
    monkeypatch.setattr(sizing.importlib.util, "find_spec", lambda name: name == "tensorrt" or None)
    return made


def num_weights(folder: Path) -> int:
    return sizing._num_weights(open_checkpoint(folder))


def test_the_finest_precision_that_fits_is_taken(machine: SimpleNamespace) -> None:
    weights = num_weights(DEMO_CHECKPOINT)
    room = weights / sizing.WEIGHTS_SHARE
    found = []
    for bytes_a_weight in (1.2, 1.0):
        machine.memory = room * bytes_a_weight
        found.append(sizing.choose(DEMO_CHECKPOINT, Config()).precision)
    assert found == ["int8", "int4"]
    machine.memory = room * 0.5
    with pytest.raises(ConfigError, match=r"smaller model or a larger machine"):
        sizing.choose(DEMO_CHECKPOINT, Config())


def test_a_gpu_is_preferred_and_bounded_by_the_configuration(machine: SimpleNamespace) -> None:
    machine.gpu = 24 * GB
    plan = sizing.choose(DEMO_CHECKPOINT, Config())
    assert (plan.runtime, plan.precision, plan.free_gb) == (TENSORRT, "bf16", 24.0)
    assert plan.configuration()["gpu_memory_gb"] == 24.0
    bounded = sizing.choose(DEMO_CHECKPOINT, Config(gpu_memory_gb=2.0, trt_precision="fp8"))
    assert (bounded.precision, bounded.free_gb) == ("fp8", 2.0)
    machine.gpu = None
    assert sizing.choose(DEMO_CHECKPOINT, Config()).runtime == ONNXRUNTIME


def test_a_gpu_without_tensorrt_is_onnx_runtimes_where_it_has_its_cuda_provider(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.gpu = 24 * GB
    monkeypatch.setattr(sizing.importlib.util, "find_spec", lambda _: None)
    for missing, provider, wanted in (
        ("", "auto", ("bf16", "gpu_memory_gb")),
        ("", "cpu", ("int8", "cpu_memory_gb")),
        ("this ONNX Runtime has no CUDA provider", "auto", ("int8", "cpu_memory_gb")),
    ):
        monkeypatch.setattr(sizing, "missing_for_cuda", lambda missing=missing: missing)
        plan = sizing.choose(DEMO_CHECKPOINT, Config(execution_provider=provider))
        assert plan.runtime == ONNXRUNTIME
        assert (plan.precision, wanted[1] in plan.configuration()) == (wanted[0], True)


@given(
    memory_gb=st.floats(0.02, 200),
    slots=st.integers(1, 64),
    context=st.sampled_from([512, 2048, 8192, 131_072]),
    hmt=st.booleans(),
    share=st.floats(0.1, 0.9),
)
def test_what_is_planned_is_what_the_server_makes_of_it(
    memory_gb: float, slots: int, context: int, hmt: bool, share: float
) -> None:
    """The written configuration gives the runtime as many slots of as many tokens as the plan says."""
    checkpoint = open_checkpoint(tiny("1b"))
    settings = Config(max_batch_size=slots, max_context_length=context, enable_hmt=hmt, kv_cache_share=share)
    kept = share if hmt else 0.0
    room = memory_gb * GB * (1 - kept)
    planned, length, kv = sizing._slots(checkpoint, settings, room)
    assert kv <= room
    assert 1 <= planned <= slots
    assert length <= context
    if planned == 1 and kv == room:
        return  # not even one fits; the server says so
    made = plan_slots(model_shape(checkpoint.config), planned, length, int(kv), 2)
    assert (made.num_slots, made.context_length) == (planned, length)


def test_the_plan_is_a_configuration_and_says_itself(machine: SimpleNamespace) -> None:
    plan = sizing.choose(DEMO_CHECKPOINT, Config(max_batch_size=3))
    written = from_values(plan.configuration(), "here")
    assert written.max_batch_size == plan.max_batch_size == 3
    text = open_checkpoint(DEMO_CHECKPOINT).config.text
    assert written.max_context_length == plan.max_context_length == text.max_context_length
    assert written == dataclasses.replace(
        Config(), max_batch_size=3, max_context_length=plan.max_context_length, cpu_memory_gb=written.cpu_memory_gb
    )
    assert "int8 for onnxruntime" in str(plan)
    assert "3 sequences" in str(plan)


@pytest.mark.parametrize("gpu", [None, 24 * GB])
@pytest.mark.parametrize("bytes_a_weight", [0.65, 1.2, 40.0])
def test_a_second_run_plans_what_the_first_wrote(
    machine: SimpleNamespace, bytes_a_weight: float, gpu: float | None
) -> None:
    machine.memory, machine.gpu = num_weights(DEMO_CHECKPOINT) / sizing.WEIGHTS_SHARE * bytes_a_weight, gpu
    first = sizing.choose(DEMO_CHECKPOINT, Config())
    second = sizing.choose(DEMO_CHECKPOINT, from_values(first.configuration(), "what the first wrote"))
    assert dataclasses.replace(second, kv_gb=first.kv_gb) == first
    assert second.kv_gb == pytest.approx(first.kv_gb, abs=0.001)  # as it is written


def test_the_context_shrinks_before_the_number_of_sequences(machine: SimpleNamespace) -> None:
    machine.memory = 0.25 * GB
    plan = sizing.choose(DEMO_CHECKPOINT, Config(max_batch_size=64))
    text = open_checkpoint(DEMO_CHECKPOINT).config.text
    assert plan.max_context_length < text.max_context_length or plan.max_batch_size < 64
    if plan.max_batch_size < 64:
        assert plan.max_context_length <= sizing.SHORTEST_CONTEXT
