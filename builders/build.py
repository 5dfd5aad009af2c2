"""From a checkpoint folder to a model repository that a server can load."""

from __future__ import annotations

import dataclasses
import errno
import importlib.metadata
import platform
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from builders import repository
from builders.checkpoint import Checkpoint, ModelConfig, open_checkpoint
from builders.identity import Fingerprint, source_identity
from builders.quantize import PER_CHANNEL, Precision, PrecisionName
from builders.side_files import write_image_processor, write_tokenizer
from python_backends import contract, manifest
from python_backends.config import Config
from python_backends.errors import ArtifactError, BuildError
from python_backends.manifest import ONNXRUNTIME, TENSORRT, TENSORRT_RTX, ImageShape, Manifest, ModelShape
from python_backends.prompt import open_files
from python_backends.runtime.gpu.engines import MODULES
from python_backends.runtime.gpu.weights import GROUP

if TYPE_CHECKING:
    from builders.gpu_plans import PlanWriter

RUNTIME = ONNXRUNTIME
RUNTIMES: dict[str, tuple[PrecisionName, ...]] = {
    ONNXRUNTIME: ("fp32", "bf16", "fp16", "int8", "int4"),
    TENSORRT: ("fp32", "bf16", "fp16", "fp8", "int8", "int4"),
    TENSORRT_RTX: ("fp32", "bf16", "fp16", "fp8", "int8", "int4"),
}
"""What executes a build, and the precisions it takes."""
_PACKAGES = ("wicore", "numpy", "onnx", "onnxruntime", "transformers", "tensorrt-rtx-cu13", "tensorrt")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Reporter(Protocol):
    """Hears how a build goes."""

    def begin(self, step: str, num_bytes: int = 0) -> None:
        """A step begins; it will read about ``num_bytes`` of weights (0: it is short)."""
        ...

    def read(self, num_bytes: int) -> None:
        """So many more bytes of weights have been read. Called from several threads."""
        ...


class Silence:
    """A reporter for callers that do not watch."""

    def begin(self, step: str, num_bytes: int = 0) -> None:
        """See `Reporter.begin`."""

    def read(self, num_bytes: int) -> None:
        """See `Reporter.read`."""


@dataclass(frozen=True)
class Options:
    """What to build.

    Raises:
        BuildError: a runtime that is not offered.
    """

    precision: Precision
    runtime: str = RUNTIME
    max_context_length: int | None = None
    """Tokens of prompt and answer together; None is the model's own limit."""

    plans: bool = False
    """Build TensorRT plans too; without them the GPU runtime's own kernels do all of the decoder's work."""
    compute_capabilities: tuple[str, ...] = ()
    """GPUs that the plans are for, such as "8.9"; none is TensorRT's own choice."""

    def __post_init__(self) -> None:
        if self.runtime not in RUNTIMES:
            raise BuildError(f"runtime {self.runtime!r} is not offered; choose one of {', '.join(RUNTIMES)}")
        if self.precision.name not in RUNTIMES[self.runtime]:
            raise BuildError(
                f"{self.runtime} has no precision {self.precision.name!r}; "
                f"choose one of {', '.join(RUNTIMES[self.runtime])}"
            )
        if self.compute_capabilities and not self.plans:
            raise BuildError("--compute-capability is for plans alone; add --plans or leave it out")
        if self.gpu:
            self._check_gpu()
        elif self.plans:
            raise BuildError(f"{self.runtime} has no plans; they are for --runtime {TENSORRT} and {TENSORRT_RTX}")

    def _check_gpu(self) -> None:
        if self.plans and self.precision.name == "fp32":
            raise BuildError("plans have no precision 'fp32': TensorRT has no attention in it; build without --plans")
        block = {"int8": PER_CHANNEL, "int4": GROUP}.get(self.precision.name)
        if block is not None and (self.precision.block != block or not self.precision.symmetric):
            raise BuildError(
                f"{self.runtime} stores {self.precision.name} symmetric with --block-size {block}; "
                "leave --block-size and --asymmetric out"
            )

    @property
    def gpu(self) -> bool:
        """Whether the build is for GPUs."""
        return self.runtime != ONNXRUNTIME

    def as_dict(self) -> dict[str, Any]:
        """For the build's identity."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Result:
    """A finished build."""

    manifest: Manifest
    up_to_date: bool
    """Nothing was to do: the repository already held this build, and its files are whole."""
    seconds: float
    source_bytes: int
    """Weights read."""
    artifact_bytes: int
    peak_memory_bytes: int
    """Largest resident memory of this process so far."""
    kept_files: tuple[str, ...]
    """Literal files of the repository that differ from the project's and were left as they are."""


def build(
    checkpoint: Path, target: Path, options: Options, *, force: bool = False, reporter: Reporter | None = None
) -> Result:
    """Build the checkpoint into the model repository ``target``, or find that it is already there.

    Until the last step, the replacement of the manifest, the repository's previous build stays complete and servable,
    whatever happens: an error, Ctrl-C, a kill, a full disk.

    Raises:
        BuildError: the checkpoint or the options cannot be built, another build is running, or the disk is full.
    """
    began = time.monotonic()
    reporter = reporter or Silence()
    with repository.locked(target):
        try:
            differing = repository.add_literal_files(target)
            identity = source_identity(checkpoint, options.as_dict())
            current = None if force else _current(target, identity)
            source_bytes = 0
            if current is None:
                opened = open_checkpoint(checkpoint, reporter.read)
                _shape(opened.config, options.max_context_length)
                source_bytes = opened.num_bytes
                current = _build(opened, target, options, identity, reporter)
        except OSError as error:
            raise BuildError(_explain(error, target)) from error
        repository.link_vision_plan(current)
        repository.sweep(target)
    sizes = (file.size for stage in current.stages.values() for file in stage.files)
    seconds = time.monotonic() - began
    return Result(
        current, source_bytes == 0, seconds, source_bytes, sum(sizes), peak_memory(), kept_files=tuple(differing)
    )


def _current(target: Path, identity: str) -> Manifest | None:
    """The repository's build if it is the wanted one and whole."""
    try:
        found = manifest.read(target)
        return manifest.load(target) if found.source == identity else None
    except ArtifactError:
        return None


def _build(checkpoint: Checkpoint, target: Path, options: Options, identity: str, reporter: Reporter) -> Manifest:
    repository.sweep(target)  # what killed builds left may be the space this one needs
    _check_space(checkpoint, target, options.precision)
    build_id = repository.new_build_id(identity)
    fingerprint = Fingerprint(checkpoint)
    try:
        shape = _shape(checkpoint.config, options.max_context_length)
        _write_side_files(checkpoint, target, shape, build_id)
        if options.gpu:
            _write_gpu(checkpoint, target, options, build_id, reporter)
        else:
            _write_graphs(checkpoint, target, options.precision, build_id, reporter)
        reporter.begin("checking")
        weights = fingerprint.result()
        _check_unchanged(checkpoint.folder, options, identity)
        built = Manifest(
            format=manifest.FORMAT,
            build_id=build_id,
            fingerprint=weights,
            source=identity,
            name=_name(checkpoint.folder),
            precision=options.precision.name,
            block_size=options.precision.block if options.precision.quantized else 0,
            symmetric=options.precision.symmetric,
            runtime=options.runtime,
            ranks=1,
            versions=_versions(),
            model=shape,
            stages=repository.describe_stages(target, build_id),
            repository=target,
        )
        repository.commit(built)
    except BaseException:
        fingerprint.cancel()
        repository.discard(target, build_id)
        raise
    return built


def _write_side_files(checkpoint: Checkpoint, target: Path, shape: ModelShape, build_id: str) -> None:
    """What the first two stages read, opened as they will open it, before the first weight is read."""
    vision = checkpoint.config.vision
    stages = [contract.TOKENIZER] + ([contract.IMAGE_PROCESSOR] if vision else [])
    folders = {stage: repository.stage_folder(target, stage, build_id) for stage in stages}
    write_tokenizer(checkpoint.folder, folders[contract.TOKENIZER])
    if vision is not None:
        write_image_processor(checkpoint.folder, vision, folders[contract.IMAGE_PROCESSOR])
    try:
        open_files(folders.__getitem__, shape, Config(pan_and_scan=True))
    except ArtifactError as error:
        raise BuildError(
            f"{checkpoint.folder}: its tokenizer or processor files cannot be served ({error.__cause__ or error}); "
            "download them again"
        ) from error


def _write_graphs(
    checkpoint: Checkpoint, target: Path, precision: Precision, build_id: str, reporter: Reporter
) -> None:
    from builders.graph.decoder import write_decoder
    from builders.graph.vision import write_vision_encoder

    vision_bytes = _vision_bytes(checkpoint)
    reporter.begin("decoder", checkpoint.num_bytes - vision_bytes)
    write_decoder(checkpoint, precision, repository.stage_folder(target, contract.DECODER, build_id))
    if checkpoint.config.vision is not None:
        reporter.begin("vision encoder", vision_bytes)
        write_vision_encoder(checkpoint, precision, repository.stage_folder(target, contract.VISION_ENCODER, build_id))


def _write_gpu(checkpoint: Checkpoint, target: Path, options: Options, build_id: str, reporter: Reporter) -> None:
    from builders.gpu_weights import write_gpu_weights
    from builders.graph.vision import write_vision_encoder

    plans = _open_plans(target, options)  # refused before the first weight is read
    vision_bytes = _vision_bytes(checkpoint)
    reporter.begin("weights", checkpoint.num_bytes - vision_bytes)
    folder = repository.stage_folder(target, contract.DECODER, build_id)
    write_gpu_weights(checkpoint, options.precision, folder)
    if plans:
        plans.decoder(checkpoint.config.text, folder, lambda name: reporter.begin(f"plan {name}"))
    if checkpoint.config.vision is not None:
        folder = repository.stage_folder(target, contract.VISION_ENCODER, build_id)
        if plans:
            reporter.begin("plan vision", vision_bytes)
            plans.vision(checkpoint, folder)
            return
        reporter.begin("vision encoder", vision_bytes)
        # The tower without a plan runs on the CPU.
        write_vision_encoder(checkpoint, Precision.of("fp32" if options.precision.name == "fp32" else "int8"), folder)


def _open_plans(target: Path, options: Options) -> PlanWriter | None:
    if not options.plans:
        return None
    from builders.gpu_plans import PlanWriter
    from builders.plan import PlanBuilder

    timing = target / f".timing-{options.runtime}.cache"
    builder = PlanBuilder(MODULES[options.runtime], options.compute_capabilities, timing)
    return PlanWriter(builder, options.precision.name)


def _vision_bytes(checkpoint: Checkpoint) -> int:
    parts = ("vision.", "projector.")
    return sum(tensor.num_bytes for name, tensor in checkpoint.tensors.items() if name.startswith(parts))


def _shape(config: ModelConfig, max_context_length: int | None) -> ModelShape:
    text = config.text
    limit = text.max_context_length if max_context_length is None else max_context_length
    if not 1 <= limit <= text.max_context_length:
        raise BuildError(f"a context of {limit} tokens is outside what this model takes, 1 … {text.max_context_length}")
    image = None
    if config.vision is not None and config.image_token_id and config.boi_token_id and config.eoi_token_id:
        image = ImageShape(
            image_size=config.vision.image_size,
            tokens_per_image=config.vision.tokens_per_image,
            image_token_id=config.image_token_id,
            boi_token_id=config.boi_token_id,
            eoi_token_id=config.eoi_token_id,
        )
    shared = {entry.name for entry in dataclasses.fields(ModelShape)} - {"max_context_length", "image"}
    return ModelShape(**{name: getattr(text, name) for name in shared}, max_context_length=limit, image=image)


def _name(folder: Path) -> str:
    """A name for people: the hub id where the folder is a download, else the folder's own."""
    cached = re.search(r"models--(.+?)/snapshots/", folder.as_posix())
    return cached[1].replace("--", "/") if cached else folder.resolve().name


def _versions() -> dict[str, str]:
    """Versions of what made the artefacts; a package that runs from a checkout without being installed has none."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _check_unchanged(folder: Path, options: Options, identity: str) -> None:
    if source_identity(folder, options.as_dict()) != identity:
        raise BuildError(f"{folder} changed while it was being built; build again when it is complete")


def _check_space(checkpoint: Checkpoint, target: Path, precision: Precision) -> None:
    """Refuse before the work what cannot fit: at least every weight at the wanted width."""
    elements = sum(tensor.num_bytes // (4 if tensor.dtype == "F32" else 2) for tensor in checkpoint.tensors.values())
    needed, free = elements * precision.bits // 8, shutil.disk_usage(target).free
    if needed > free:
        raise BuildError(
            f"{target} has {free / 1e9:.1f} GB free, this build needs {needed / 1e9:.1f} GB beside the previous one; "
            "free space, choose another --repository or a smaller --precision"
        )


def _explain(error: OSError, target: Path) -> str:
    if error.errno in _FULL:
        return (
            f"the disk of {target} is full ({error.strerror}); the previous build is intact: free space, "
            "choose another --repository or a smaller --precision"
        )
    return f"{error.filename or target}: {error.strerror or error}; the previous build is intact"


def peak_memory() -> int:
    """The largest resident memory this process has had (bytes)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
