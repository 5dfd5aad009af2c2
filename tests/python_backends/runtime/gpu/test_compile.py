"""Kernels are compiled ahead of time on a machine without a GPU, once, and found again; what is missing is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from python_backends.errors import ArtifactError, BuildError, InternalError
from python_backends.runtime.gpu import compile as compiling
from python_backends.runtime.gpu.compile import KernelCache, argument_types, launch_key
from python_backends.runtime.gpu.interpreter import InterpreterDevice
from python_backends.runtime.gpu.kernels import adjust, choice, most_likely, sampling
from python_backends.runtime.gpu.launch import Launch, Tensor

VOCABULARY = 262_208
ROWS = 4


def choose_launch(rows: int = 2) -> Launch:
    """A small kernel."""
    device = InterpreterDevice()
    pieces = choice.Scratch.allocate(device, rows, 9000)
    logits, targets = device.allocate("fp32", rows, 9000), device.allocate("i32", rows, 1)
    return choice.choose(logits, targets, pieces, device.allocate("i32", rows), device.allocate("fp32", rows))


def sampling_launches() -> list[Launch]:
    """Everything that a head may launch behind its logits, at the published vocabulary."""
    device = InterpreterDevice()

    def new(dtype: str, *shape: int) -> Tensor:
        return device.allocate(dtype, *shape)

    logits, adjusted = (new("fp32", ROWS, VOCABULARY) for _ in range(2))
    pieces = choice.Scratch.allocate(device, ROWS, VOCABULARY)
    drawing = sampling.Scratch.allocate(device, ROWS)
    targets, temperature = new("i32", ROWS, 1), new("fp32", ROWS)
    filters = sampling.Filters(
        temperature, new("i32", ROWS), new("fp32", ROWS), new("fp32", ROWS), new("fp32", ROWS, 1)
    )
    listed = {"adjust_factor": new("fp32", ROWS, 16), "adjust_bias": new("fp32", ROWS, 16)}
    listed["adjust_ids"] = new("i32", ROWS, 16)
    mask = new("i32", ROWS, 1, VOCABULARY // 32)
    result = new("i32", ROWS), new("fp32", ROWS)
    ranks, top = most_likely.allocate_scratch(device, ROWS, VOCABULARY), (new("i32", ROWS, 32), new("fp32", ROWS, 32))
    return [
        *adjust.adjust(logits, adjusted, 1, **listed, token_mask=mask),
        *adjust.adjust(logits, adjusted, 1, **listed),
        choice.largest(logits, adjusted, pieces),
        *sampling.draw(adjusted, pieces.bests, targets, filters, drawing),
        choice.choose(logits, targets, pieces, *result, drawn=drawing.drawn, temperature=temperature),
        choice.choose(logits, targets, pieces, *result),
        *most_likely.most_likely(logits, pieces, ranks, *top),
    ]


@pytest.mark.parametrize("capability", [89, 90])
def test_sampling_kernels_compile_without_a_gpu(tmp_path: Path, capability: int) -> None:
    told: list[tuple[int, int]] = []
    launches = sampling_launches()
    compiled = KernelCache(tmp_path).compile_all(launches, capability, lambda *done: told.append(done), processes=2)
    assert len(compiled) == len(launches)
    assert told[-1] == (len(launches), len(launches))
    for kernel in compiled:
        assert kernel.cubin.startswith(b"\x7fELF")
        assert 0 < kernel.registers <= 255
        assert kernel.spilled_bytes <= 128
        assert kernel.shared_bytes <= 99 * 1024  # what a program may have on compute capability 8.9


def test_a_kernel_is_compiled_once_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = choose_launch()
    cache = KernelCache(tmp_path / "new")
    first = cache.get(launch, 90)
    assert cache.get(launch, 90) is first

    def refuse(*_: Any) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(compiling, "require_compiler", refuse)
    assert KernelCache(tmp_path / "new").get(launch, 90) == first
    assert KernelCache(tmp_path / "new").compile_all([launch, launch], 90) == [first]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [f"{first.key}.cubin", f"{first.key}.json"]


def test_what_goes_into_a_kernel_is_in_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = choose_launch()
    assert launch_key(choose_launch(), 90) == launch_key(launch, 90)  # not the addresses
    assert launch_key(launch, 89) != launch_key(launch, 90)
    other = Launch(launch.kernel, launch.grid, launch.args, {**launch.constants, "V": 9001}, launch.num_warps)
    assert launch_key(other, 90) != launch_key(launch, 90)
    before = launch_key(launch, 90)
    monkeypatch.setattr(compiling, "source_hash", lambda module: f"another text of {module}")
    assert launch_key(launch, 90) != before


def test_a_modules_hash_covers_the_kernel_modules_it_imports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def hashed(lang: str) -> str:
        (tmp_path / "sampling.py").write_text("from python_backends.runtime.gpu.kernels.lang import tl\n")
        (tmp_path / "lang.py").write_text(lang)
        compiling.source_hash.cache_clear()
        return compiling.source_hash("sampling")

    monkeypatch.setattr(compiling, "_KERNEL_FOLDER", tmp_path)
    try:
        assert hashed("a = 1") != hashed("a = 2")
    finally:
        compiling.source_hash.cache_clear()


def test_without_a_compiler_the_missing_kernel_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "TRITON_VERSION", "0.0")
    for attempt in (KernelCache(tmp_path).get, lambda launch, card: KernelCache(tmp_path).compile_all([launch], card)):
        with pytest.raises(ArtifactError, match=r"choice\.choose_kernel for compute capability 8\.9.*triton==0\.0"):
            attempt(choose_launch(), 89)


def test_a_damaged_description_says_how_to_make_it_anew(tmp_path: Path) -> None:
    launch = choose_launch()
    (tmp_path / f"{launch_key(launch, 90)}.json").write_text(json.dumps({"name": "x"}))
    (tmp_path / f"{launch_key(launch, 90)}.cubin").write_bytes(b"")
    with pytest.raises(ArtifactError, match="--force"):
        KernelCache(tmp_path).get(launch, 90)


def test_what_does_not_compile_or_is_not_aligned_is_refused(tmp_path: Path) -> None:
    launch = choose_launch()
    wrong = Launch(launch.kernel, launch.grid, launch.args, {**launch.constants, "LANES": 3}, launch.num_warps)
    with pytest.raises(BuildError, match=r"(?s)choice\.choose_kernel.*power"):
        KernelCache(tmp_path).get(wrong, 90)
    with pytest.raises(InternalError, match="aligned"):
        argument_types(Launch("choice.choose_kernel", (1, 1, 1), (Tensor(8, "fp32", (4,)),)))
    with pytest.raises(InternalError, match="arguments for the parameters"):
        KernelCache(tmp_path).get(Launch(launch.kernel, launch.grid, launch.args[:3], launch.constants), 90)
