"""`wicore build`: the command line around `builders.build`. Imports stay inside, so that other commands start fast."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import json
import sys
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated

import typer

from python_backends.errors import WiCoreError

if TYPE_CHECKING:
    from rich.progress import TaskID

    from builders.build import Result


class PrecisionChoice(enum.StrEnum):
    """Values of --precision."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    FP8 = "fp8"
    INT8 = "int8"
    INT4 = "int4"


def build(
    checkpoint: Annotated[
        str,
        typer.Argument(help="Folder of a Hugging Face Gemma-3 checkpoint, or a hub id such as google/gemma-3-4b-it."),
    ],
    *,
    repository: Annotated[
        Path, typer.Option(help="Model repository to fill; made, with its literal files, where it does not exist.")
    ] = Path("model_repository"),
    precision: Annotated[
        PrecisionChoice | None,
        typer.Option(
            help="How weights are stored. int8 is nearly lossless at half of bfloat16's size; int4 halves it again at "
            "some cost; fp16 and fp32 are for comparisons. bf16 and fp8 are for GPUs. [default: int8; on GPUs the "
            "configuration's trt_precision, where it names one]",
            show_default=False,
        ),
    ] = None,
    block_size: Annotated[
        int | None,
        typer.Option(
            help="int8, int4: weights per scale, a power of two from 16 on; smaller is finer. 0: per channel. "
            "[default: 32 for int8, 128 for int4; on GPUs 0 for int8, 128 for int4]"
        ),
    ] = None,
    asymmetric: Annotated[
        bool,
        typer.Option("--asymmetric", help="int8, int4: a zero point per block; a little finer, larger and slower."),
    ] = False,
    runtime: Annotated[
        str,
        typer.Option(
            help="What executes the model: onnxruntime (CPU, or a GPU without TensorRT), tensorrt-rtx (GPU, from PyPI) "
            "or tensorrt (GPU, in NVIDIA's container or from its index)."
        ),
    ] = "onnxruntime",
    plans: Annotated[
        bool,
        typer.Option(
            "--plans/--no-plans",
            help="GPUs: build TensorRT plans beside the weights, for the vision tower and for enable_kernel_fusion "
            "false. Those of tensorrt-rtx build without a GPU. Without plans our own kernels decode, and the tower "
            "runs on the CPU.",
        ),
    ] = False,
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(
            help="GPUs that plans of tensorrt-rtx are for: 8.9 is L20 and RTX 4090. Give it several times for several. "
            "[default: those that TensorRT-RTX covers by itself, H200 among them; with tensorrt the GPU present]",
            show_default=False,
        ),
    ] = None,
    max_context: Annotated[
        int | None, typer.Option(help="Longest prompt and answer together, in tokens. [default: the model's own limit]")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Build even where the repository is up to date.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text and bars.")] = False,
) -> None:
    """Turn a Gemma-3 checkpoint into a model repository that Triton serves.

    Weights stream: memory stays below 6 GB whatever the model's size. The repository's previous build stays complete
    until the new one is; stopping this command at any time leaves it as it was. A second run with the same checkpoint
    and options finds that nothing is to do.

    wicore build google/gemma-3-1b-it

    wicore build ./gemma-3-4b-it --precision int4 --block-size 64 --repository /srv/models
    """
    try:
        from builders.build import Options, Silence
        from builders.build import build as run
        from builders.hub import resolve
        from builders.quantize import PER_CHANNEL, Precision
        from python_backends.manifest import ONNXRUNTIME

        precision = precision or default_precision(runtime, repository)
        if block_size is None and runtime != ONNXRUNTIME and precision is PrecisionChoice.INT8:
            block_size = PER_CHANNEL
        options = Options(
            Precision.of(precision.value, block_size, not asymmetric),
            runtime,
            max_context,
            plans=plans,
            compute_capabilities=tuple(compute_capability or ()),
        )
        folder = resolve(checkpoint, revision)
        with contextlib.nullcontext(Silence()) if as_json else Bars() as reporter:
            result = run(folder, repository, options, force=force, reporter=reporter)
    except WiCoreError as error:
        if as_json:
            print(json.dumps({"error": {"code": error.code, "message": error.message}}))
        else:
            print(f"wicore build: {error.message}", file=sys.stderr)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        print("wicore build: stopped; the repository is as it was", file=sys.stderr)
        raise typer.Exit(130) from None
    print(_as_json(result) if as_json else _summary(result))


def default_precision(runtime: str, repository: Path) -> PrecisionChoice:
    """What is built where nobody says: ``trt_precision`` of the repository's configuration on GPUs, else int8.

    Raises:
        ConfigError: the configuration cannot be used.
    """
    from python_backends import config
    from python_backends.manifest import ONNXRUNTIME

    wanted = "auto" if runtime == ONNXRUNTIME else config.load(repository).trt_precision
    return PrecisionChoice.INT8 if wanted == "auto" else PrecisionChoice(wanted)


class Bars:
    """Shows the steps of a build as bars over the bytes of weights read."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self._progress = Progress(
            TextColumn("{task.description:>16}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            transient=True,
            console=Console(stderr=True),
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begin(self, step: str, num_bytes: int = 0) -> None:
        """A step begins."""
        if self._task is not None:
            self._progress.stop_task(self._task)
        self._task = self._progress.add_task(step, total=num_bytes or None)

    def read(self, num_bytes: int) -> None:
        """Weights have been read."""
        if self._task is not None:
            self._progress.advance(self._task, num_bytes)


def _as_json(result: Result) -> str:
    manifest = result.manifest
    return json.dumps(
        {
            "status": "up-to-date" if result.up_to_date else "built",
            "repository": str(manifest.repository),
            "name": manifest.name,
            "build_id": manifest.build_id,
            "fingerprint": manifest.fingerprint,
            "precision": manifest.precision,
            "block_size": manifest.block_size,
            "runtime": manifest.runtime,
            "seconds": round(result.seconds, 3),
            "checkpoint_bytes": result.source_bytes,
            "artifact_bytes": result.artifact_bytes,
            "peak_memory_bytes": result.peak_memory_bytes,
            "kept_files": result.kept_files,
            "stages": {name: dataclasses.asdict(stage) for name, stage in manifest.stages.items()},
        }
    )


def _summary(result: Result) -> str:
    manifest = result.manifest
    lines = [f"note: {path} differs from the project's and was left as it is" for path in result.kept_files]
    precision = manifest.precision
    if precision.startswith("int"):
        precision += f" (block {manifest.block_size})" if manifest.block_size else " (per channel)"
    if result.up_to_date:
        size = _size(result.artifact_bytes)
        return "\n".join([*lines, f"{manifest.repository} is up to date: {manifest.name}, {precision}, {size}"])
    lines += [
        f"{manifest.repository}: {manifest.name}, {precision}",
        *(
            f"  {name:<16}{_size(sum(file.size for file in stage.files)):>10}  {stage.folder}"
            for name, stage in manifest.stages.items()
        ),
        f"  {_size(result.source_bytes)} of weights read, {_size(result.artifact_bytes)} written in "
        f"{result.seconds:.1f} s, peak memory {_size(result.peak_memory_bytes)}",
    ]
    return "\n".join(lines)


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.2f} GB"
