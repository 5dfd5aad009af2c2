"""`wicore build --runtime tensorrt-rtx` writes plans beside the weights; what stops it leaves nothing behind."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from builders.build import Options, Silence, build
from builders.quantize import Precision
from builders.repository import TRITON_PLAN, link_vision_plan
from client.commands.app import app
from python_backends import contract, manifest
from python_backends.errors import BuildError
from python_backends.runtime.gpu.plans import PIECES, VISION, open_plans
from python_backends.runtime.gpu.weights import open_weights
from tests.checkpoints import DEMO

RTX = "tensorrt-rtx"


class Steps(Silence):
    def __init__(self) -> None:
        self.names: list[str] = []

    def begin(self, step: str, num_bytes: int = 0) -> None:
        self.names.append(step)


def test_plans_lie_beside_the_weights_and_are_part_of_the_manifest(tmp_path: Path) -> None:
    steps = Steps()
    options = Options(Precision.of("fp8"), RTX, plans=True, compute_capabilities=("8.9",))
    built = build(DEMO, tmp_path, options, reporter=steps).manifest
    loaded = manifest.load(tmp_path)  # every file hashed
    assert loaded == built
    assert built.versions["tensorrt-rtx-cu13"].startswith("1.6")
    decoder, vision = (loaded.folder(stage) for stage in (contract.DECODER, contract.VISION_ENCODER))
    plans = open_plans(decoder)
    assert plans is not None
    assert (tuple(plans.plans), plans.compute_capabilities, plans.ranks) == (PIECES, ("8.9",), 1)
    tower = open_plans(vision)
    assert tower is not None
    assert tuple(tower.plans) == (VISION,)
    # Every weight that a piece takes is in the weight file, of the same type.
    weights = open_weights(decoder)
    for plan in plans.plans.values():
        for tensor in plan.inputs:
            if tensor.name not in {"stream", "attended"}:
                entry = weights[f"layers.3.{tensor.name}"]
                assert (entry.dtype, entry.shape) == (tensor.dtype, tensor.shape)
    assert [name for name in steps.names if name.startswith("plan")] == [f"plan {p}" for p in (*PIECES, "vision")]
    assert build(DEMO, tmp_path, options).up_to_date
    others = dataclasses.replace(options, compute_capabilities=("8.9", "12.0"))
    assert not build(DEMO, tmp_path, others).up_to_date


def test_the_command_line_builds_plans_where_it_is_told_to(tmp_path: Path) -> None:
    found = []
    for flags in (["--plans"], []):
        arguments = [
            "build",
            str(DEMO),
            "--repository",
            str(tmp_path),
            "--runtime",
            RTX,
            "--precision",
            "bf16",
            "--json",
        ]
        result = CliRunner().invoke(app, [*arguments, *flags])
        stages = json.loads(result.stdout)["stages"]
        found.append({file["name"] for file in stages[contract.DECODER]["files"] if file["name"].endswith(".plan")})
    assert found == [{f"{piece}.plan" for piece in PIECES}, set()]


def test_a_plan_that_tensorrt_refuses_leaves_the_repository_as_it_was(tmp_path: Path) -> None:
    before = build(DEMO, tmp_path, Options(Precision.of("int8"))).manifest
    with pytest.raises(BuildError, match="fp8"):
        build(DEMO, tmp_path, Options(Precision.of("fp8"), RTX, plans=True, compute_capabilities=("8.6",)))
    assert manifest.load(tmp_path) == before
    assert [path.name for path in (tmp_path / contract.DECODER / "1").iterdir() if path.is_dir()] == [before.build_id]


def test_a_missing_tensorrt_is_told_before_any_weight_is_read(tmp_path: Path) -> None:
    steps = Steps()
    with pytest.raises(BuildError, match=r"tensorrt cannot be imported.*--plans"):
        build(DEMO, tmp_path, Options(Precision.of("bf16"), "tensorrt", plans=True), reporter=steps)
    assert steps.names == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": Precision.of("fp32"), "plans": True}, "no precision 'fp32'.*--plans"),
        ({"precision": Precision.of("bf16"), "compute_capabilities": ("8.9",)}, "for plans alone"),
    ],
)
def test_options_about_plans_that_do_not_go_together_are_refused(options: Any, message: str) -> None:
    with pytest.raises(BuildError, match=message):
        Options(runtime=RTX, **options)


def test_tritons_own_backend_finds_the_plan_of_the_current_build_and_only_tensorrts(tmp_path: Path) -> None:
    built = build(
        DEMO, tmp_path, Options(Precision.of("bf16"), RTX, plans=True, compute_capabilities=("8.9",))
    ).manifest
    link = tmp_path / contract.VISION_ENCODER / "1" / TRITON_PLAN
    assert not link.is_symlink()
    for _ in range(2):  # also over an older link
        link_vision_plan(dataclasses.replace(built, runtime="tensorrt"))
        assert link.resolve() == (built.folder(contract.VISION_ENCODER) / f"{VISION}.plan").resolve()
        assert link.read_bytes()[:4] == b"vtrt"
    without = build(DEMO, tmp_path, Options(Precision.of("bf16"), RTX)).manifest
    assert without.build_id != built.build_id
    assert not link.is_symlink()
