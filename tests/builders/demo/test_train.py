"""The trainer runs to its end on a CPU, saves, and goes on from what it saved."""

import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from builders.demo.quantization import MODES, WeightQuantizer, fake_quantize
from builders.demo.train import STATE, _interrupts, main, parse, rate_share

TINY = [
    "--picture-steps", "1", "--rows", "2", "--length", "160", "--pictures", "4", "--layers", "6", "--workers", "0",
    "--log-every", "1", "--check-every", "2", "--check-batches", "1", "--quantize-from", "0.5", "--device", "cpu",
]  # fmt: skip


def test_a_short_run_ends_and_a_longer_one_resumes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--out", str(tmp_path), "--steps", "2", *TINY])
    first = torch.load(tmp_path / STATE, weights_only=True)
    weights = load_file(tmp_path / "model.safetensors")
    assert first["step"] == 2
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}

    main(["--out", str(tmp_path), "--steps", "4", "--resume", *TINY])
    second = torch.load(tmp_path / STATE, weights_only=True)
    told = capsys.readouterr().out
    assert second["step"] == 4
    assert [line.split()[1] for line in told.splitlines() if line.startswith("step ")] == ["1", "2", "3", "4"]
    assert "validation" in told
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    moved = second["model"][name] - first["model"][name]
    assert 0 < moved.abs().mean() < 0.1
    rounded = load_file(tmp_path / "model.safetensors")["language_model.model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(rounded, second["model"][name].bfloat16())


def test_two_processes_train_one_model(tmp_path: Path) -> None:
    main(["--out", str(tmp_path), "--steps", "2", "--processes", "2", *TINY])
    assert torch.load(tmp_path / STATE, weights_only=True)["step"] == 2


def test_a_run_needs_a_length(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        parse(["--out", str(tmp_path)])


def test_the_learning_rate_rises_holds_and_falls_to_nothing() -> None:
    shares = [rate_share(step / 100, step, 10, 0.6) for step in range(101)]
    assert shares[0] == pytest.approx(0.1)
    assert shares[9:61] == [1.0] * 52
    assert shares[80] == pytest.approx(0.5)
    assert shares[100] == 0


@pytest.mark.parametrize(
    ("mode", "levels", "step"), [("int8", 255, 1 / 127), ("int4", 16, 1 / 7), ("int4-asymmetric", 16, 1 / 7)]
)
def test_rounded_blocks_have_few_levels_and_stay_close(mode: str, levels: int, step: float) -> None:
    blocks = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    rounded = fake_quantize(blocks, mode)
    assert max(len(block.unique()) for block in rounded) <= levels
    assert ((rounded - blocks).abs().amax(-1) <= blocks.abs().amax(-1) * step).all()


def test_weights_come_back_whole_after_a_rounded_step() -> None:
    from builders.demo.model import create_model

    model = create_model(0, num_hidden_layers=6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    quantizer = WeightQuantizer(model)
    for mode in MODES:
        with quantizer.quantized(mode):
            inside = model.state_dict()["model.language_model.layers.0.mlp.up_proj.weight"].clone()
        assert not torch.equal(inside, before["model.language_model.layers.0.mlp.up_proj.weight"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_ctrl_c_goes_back_to_whom_it_went_before() -> None:
    before = signal.getsignal(signal.SIGINT)
    with _interrupts(signal.SIG_IGN):
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGINT) == before
