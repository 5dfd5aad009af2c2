"""Whole steps of the GPU's decoder, interpreted, beside the CPU's decoder on the same weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from builders.checkpoint import open_checkpoint
from builders.gpu_weights import write_gpu_weights
from builders.quantize import Precision
from python_backends.errors import InternalError
from python_backends.runtime.base import DecoderRuntime, StepInputs, StepOutputs
from python_backends.runtime.gpu import decoder
from python_backends.runtime.gpu.decoder import GpuDecoder, GpuOptions
from python_backends.runtime.gpu.device_weights import load_weights
from python_backends.runtime.gpu.inputs import bucket_of
from python_backends.runtime.gpu.interpreter import InterpreterDevice
from python_backends.runtime.gpu.launch import Launch
from python_backends.runtime.gpu.weights import open_weights
from tests.builders.graph.sampling_graph import words_of
from tests.checkpoints import FAMILIES, FIRST_TEXT, IMAGE, Family, make_model
from tests.driver import decoder as cpu_decoder
from tests.driver import model_shape, step_inputs

SLOTS, CONTEXT = 2, 128
IDS = np.random.default_rng(0).integers(FIRST_TEXT, IMAGE, (SLOTS, 20)).tolist()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, one of each kind."""
    text = {**FAMILIES["270m"].text, "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    folder = tmp_path_factory.mktemp("checkpoint")
    make_model(Family(text)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def begun(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[GpuDecoder, StepOutputs]:
    """With the first tokens in both slots. What later steps append may be written again: drafts leave no trace."""
    opened, folder = open_checkpoint(checkpoint), tmp_path_factory.mktemp("weights")
    write_gpu_weights(opened, Precision.of("fp32"), folder)
    device = InterpreterDevice()
    weights = load_weights(device, open_weights(folder))
    runtime = GpuDecoder(device, model_shape(opened.config), weights, GpuOptions(SLOTS, CONTEXT, 1 << 30, 8))
    return runtime, begin(runtime)


@pytest.fixture
def gpu(begun: tuple[GpuDecoder, StepOutputs]) -> GpuDecoder:
    return begun[0]


@pytest.fixture
def cpu(checkpoint: Path) -> DecoderRuntime:
    return cpu_decoder(checkpoint, num_slots=SLOTS, context=CONTEXT)


def begin(runtime: DecoderRuntime) -> StepOutputs:
    """The first tokens of both slots."""
    return runtime.step(step_inputs(0, [IDS[0][:7], IDS[1][:5]], [0, 0]), want_logits=True)


def everything(vocab_size: int) -> StepInputs:
    """Four and three more tokens, with everything that a step may ask of sampling."""
    rng = np.random.default_rng(1)
    inputs = step_inputs(
        0,
        [IDS[0][7:11], IDS[1][5:8]],
        [7, 5],
        targets=np.full((2, 4), -1, np.int32),
        temperature=np.array([0.9, 0], np.float32),
        top_k=np.array([20, 0], np.int32),
        top_p=np.array([0.9, 1], np.float32),
        min_p=np.array([0.01, 0], np.float32),
        uniform=rng.random((2, 4), np.float32),
        adjust_ids=np.array([[400, -1, 17], [300, 200, -1]], np.int32),
        adjust_factor=np.array([[1.3, 1, 0.5], [1, 2, 1]], np.float32),
        adjust_bias=np.array([[4, 0, -2], [0, 9, 0]], np.float32),
        token_mask=words_of(rng.random((2, 4, vocab_size)) < 0.5),
        top_n=3,
    )
    assert inputs.targets is not None
    inputs.targets[0, 2] = inputs.targets[1, 1] = 8
    return inputs


def check_equal(found: StepOutputs, wanted: StepOutputs, query_len: list[int]) -> None:
    for row, count in enumerate(query_len):
        assert found.next_token[row, :count].tolist() == wanted.next_token[row, :count].tolist()
        np.testing.assert_allclose(found.logprob[row, :count], wanted.logprob[row, :count], atol=2e-4)
        assert (found.top_ids is None) == (wanted.top_ids is None)
        if found.top_ids is not None and wanted.top_ids is not None:
            assert found.top_ids[row, :count].tolist() == wanted.top_ids[row, :count].tolist()
            np.testing.assert_allclose(found.top_logprobs[row, :count], wanted.top_logprobs[row, :count], atol=2e-4)


def test_a_step_reports_draws_and_adjusts_as_the_cpu_does(
    begun: tuple[GpuDecoder, StepOutputs], cpu: DecoderRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, first = begun
    check_equal(first, begin(cpu), [7, 5])
    inputs = everything(gpu.spec.vocab_size)
    check_equal(gpu.step(inputs), cpu.step(inputs), [4, 3])
    # More of the most likely tokens than the kernel reports, and more rows of logits than the head has room for.
    monkeypatch.setattr(decoder, "MAX_LOGIT_ROWS", 4)
    many = dataclasses.replace(inputs, top_n=40)
    begin(cpu)
    check_equal(gpu.step(many), cpu.step(many), [4, 3])


def test_drafts_are_drawn_as_plain_decoding_draws(gpu: GpuDecoder) -> None:
    inputs = dataclasses.replace(everything(gpu.spec.vocab_size), top_n=0, targets=None)
    together = gpu.step(inputs)
    for position in range(4):
        fields = ("token_mask", "uniform")
        single = dataclasses.replace(
            inputs,
            input_ids=inputs.input_ids[:, position : position + 1],
            past_len=inputs.past_len + position,
            query_len=(inputs.query_len > position).astype(np.int32),
            logit_positions=np.zeros((2, 1), np.int32),
            **{name: getattr(inputs, name)[:, position : position + 1] for name in fields},
        )
        alone = gpu.step(single)
        for row in np.flatnonzero(single.query_len):
            assert alone.next_token[row, 0] == together.next_token[row, position]


def test_a_greedy_step_launches_nothing_that_it_does_not_need(gpu: GpuDecoder) -> None:
    def head(inputs: StepInputs) -> list[str]:
        gpu.step(inputs)
        recording = gpu.recordings[("head", bucket_of(inputs))]
        return [step.kernel for step in recording.steps if isinstance(step, Launch)]  # type: ignore[attr-defined]

    greedy = step_inputs(0, [IDS[0][7:8], IDS[1][5:6]], [7, 5])
    kernels = head(greedy)
    assert kernels[-2:] == ["choice.pieces_kernel", "choice.choose_kernel"]
    drawn = head(dataclasses.replace(greedy, temperature=np.array([0, 1], np.float32)))
    assert [name for name in drawn if name not in kernels] == ["sampling.tally_kernel", "sampling.draw_kernel"]
    ranked = head(dataclasses.replace(greedy, top_n=5))
    assert [name for name in ranked if name not in kernels] == ["most_likely.pieces_kernel", "most_likely.join_kernel"]
    masked = head(dataclasses.replace(greedy, token_mask=np.full((2, 1, 16), -1, np.int32)))
    assert [name for name in masked if name not in kernels] == ["adjust.mask_kernel"]


def test_idle_rows_and_padding_draw_within_the_vocabulary(gpu: GpuDecoder) -> None:
    inputs = step_inputs(0, [[], IDS[1][5:8]], [7, 5], temperature=np.array([1, 1], np.float32))
    found = gpu.step(inputs)
    assert ((found.next_token >= 0) & (found.next_token < gpu.spec.vocab_size)).all()


def test_masks_of_another_vocabulary_are_refused(gpu: GpuDecoder) -> None:
    with pytest.raises(InternalError, match="words"):
        gpu.step(step_inputs(0, [[5]], [0], token_mask=np.zeros((1, 1, 15), np.int32)))
