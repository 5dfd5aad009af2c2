"""Every setting of a server and its default, once, for Triton's stages, the engine, the tiers and the gateway.

`wicore.json` beside the model repository's manifest (or the file that ``WICORE_CONFIG`` names) overrides the defaults;
environment variables named like the keys (``WICORE_MAX_BATCH_SIZE=4``) override both. `wicore serve` does this once and
hands the outcome to the stages' processes in ``WICORE_CONFIG``, so that all of them have the same values whenever they
start. Unknown keys and keys that contradict each other are refused.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_type_hints

from python_backends.errors import ConfigError

CONFIG_NAME = "wicore.json"
ENV_PREFIX = "WICORE_"
ENV_CONFIG = "WICORE_CONFIG"
"""A configuration file's path, or the JSON object itself."""
ENV_NEAR = 0.8
"""How like a key an unknown variable must be to be refused: others are somebody else's (Kubernetes sets some)."""
MAY_BE_ZERO = frozenset(
    (
        "num_threads",
        "max_images",
        "max_queue",
        "max_draft",
        "quantum_tokens",
        "max_overtakes",
        "cpu_memory_gb",
        "server_port",
        "max_concurrent_requests",
        "max_requests_per_minute",
        "nvme_memory_gb",
        "nvme_daily_writes_gb",
        "nvme_free_floor_gb",
        "kv_salt_quota_gb",
        "hmt_attention_weight",
        "prefetch_size",
        "drain_s",
    )
)
KV_PRECISIONS = ("as-is", "int8", "int4")
CHOICES = {
    "cpu_kernels": ("auto", "onnxruntime"),
    "execution_provider": ("auto", "cpu", "cuda"),
    "kv_host_precision": KV_PRECISIONS,
    "kv_nvme_precision": KV_PRECISIONS,
    "log_format": ("text", "json"),
    "trt_precision": ("auto", "fp32", "bf16", "fp16", "fp8", "int8", "int4"),
}

SHARES = frozenset(("kv_cache_share", "hmt_decay_factor", "hmt_gpu_threshold", "hmt_cpu_threshold", "trace_share"))


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of one server. Sizes are upper bounds, clipped to what the machine and the model have and reported.

    Raises:
        ConfigError: a value outside its range.
    """

    model_path: str = ""
    """What is served: the model repository of `wicore serve`, the checkpoint (folder or hub id) of `wicore up`."""
    max_batch_size: int = 16
    """Sequences decoded together, and so KV slots."""
    max_context_length: int = 131_072
    """Tokens of prompt and answer together; clipped to the model's own limit."""
    cpu_memory_gb: float = 128.0
    """Host memory for KV caches (GB); fewer slots or a shorter context where it does not suffice."""
    gpu_memory_gb: float = 48.0
    """Device memory for weights, KV pages and workspaces (GB), of every GPU used."""
    enable_cuda_graph: bool = True
    """Replay a step on the GPU as one CUDA graph instead of launching its parts."""
    num_streams: int = 4
    """CUDA streams: one for steps, the others for KV that leaves the GPU and enters it beside them, by turns; with 1 it
    waits in line with the steps."""
    enable_kernel_fusion: bool = True
    """Run whole groups of operations as one kernel; off, to look for a fault, each runs by itself."""
    trt_precision: str = "auto"
    """Precision of weights that `wicore build` takes for TensorRT where it is told none; "auto": what fits the GPU."""
    prefill_chunk: int = 512
    """Most prompt tokens computed in one step."""
    target_inter_token_ms: int = 100
    """Inter-token latency that prefill chunks are cut for while others decode."""
    max_draft: int = 4
    """Draft tokens per step of speculative decoding by prompt lookup; 0 turns it off."""
    quantum_tokens: int = 512
    """Tokens a sequence may draw before it can be set aside for one that waits; 0: never set aside."""
    max_overtakes: int = 8
    """Later requests that may be admitted before one that waits."""
    max_queue: int = 256
    """Requests waiting for a slot before new ones are refused as overloaded."""
    queue_timeout_ms: int = 60_000
    """How long a request may wait for a slot when it names no timeout of its own."""
    deadline_ms: int = 600_000
    """How long a request may take in all when it names no deadline of its own."""
    max_tokens: int = 256
    """Answer tokens when a request names no number."""
    max_images: int = 16
    """Images in one request."""
    max_image_bytes: int = 32 * 2**20
    """Encoded bytes of one image."""
    max_image_pixels: int = 64 * 2**20
    """Width × height of one image, read from its header before any pixel is decoded."""
    pan_and_scan: bool = False
    """Cut long images into crops as the Gemma-3 processor can (arXiv 2503.19786, section 2.1)."""
    num_threads: int = 0
    """Compute threads of the decoder; 0 takes every physical core."""
    cpu_kernels: str = "auto"
    """Kernels of quantized products on the CPU: "auto" takes our own where there are AVX-512 VNNI and a C++ compiler,
    "onnxruntime" those of ONNX Runtime."""
    execution_provider: str = "auto"
    """Where a build for ONNX Runtime runs: "cpu", "cuda" (needs wicore[cuda]), or "auto": the GPU where ONNX Runtime
    can use one, else the CPU."""
    server_port: int = 8080
    """The gateway's HTTP port; 0 picks a free one."""
    max_body_bytes: int = 64 * 2**20
    """Bytes of one request's body at the gateway; pictures in base64 take a third more than as files."""
    max_concurrent_requests: int = 0
    """Requests of one API key (or of everyone, where there are no keys) in flight at the gateway; 0: no limit."""
    max_requests_per_minute: int = 0
    """Requests of one API key (or of everyone) in a minute; 0: no limit."""
    image_hosts: str = ""
    """Hosts that the gateway may fetch pictures from, separated by commas; none: addresses are refused."""
    max_connections: int = 2048
    """Connections to the gateway at once."""
    body_timeout_s: float = 60.0
    """From a request's headers until its body is complete."""
    idle_timeout_s: float = 10.0
    """Between two parts of a body."""
    send_timeout_s: float = 30.0
    """How long a client may leave what was sent to it unread."""
    keep_alive_s: float = 75.0
    """How long the gateway keeps a connection without requests."""
    drain_s: int = 30
    """How long answers in flight may go on after a stop."""
    log_format: str = "text"
    """Of the logs of the gateway, Triton, its stages and `wicore serve`: "text", or "json" for one object a line."""
    otlp_endpoint: str = ""
    """Where traces go: base URL of an OpenTelemetry collector's OTLP/HTTP receiver (http://127.0.0.1:4318); none:
    nowhere."""
    trace_share: float = 1.0
    """Of requests whose client has not decided it (``traceparent``), how many are traced."""

    enable_hmt: bool = True
    """Keep KV beyond the requests that computed it, in tiers: device, host and, with ``nvme_path``, disk."""
    kv_cache_share: float = 0.5
    """Of ``cpu_memory_gb``, what kept KV may take; the rest is for the slots of running sequences."""
    kv_salt_quota_gb: float = 0.0
    """What the KV of one ``cache_salt`` may take on each tier (GB), so that nobody crowds others out; 0: no limit."""
    kv_block_tokens: int = 64
    """Tokens of a KV block."""
    kv_host_precision: str = "as-is"
    """What KV is kept in on the host tier: "as-is", or rounded to "int8" or "int4", which can change answers; see
    docs/hmt-tiers.md."""
    kv_nvme_precision: str = "as-is"
    """The same on the tier on disk."""
    prefetch_size: int = 131_072
    """Most tokens of a waiting prompt whose KV is brought up from the disk; what lies further is computed. 0: none."""
    hmt_eviction_policy: str = "a2cr"
    """What leaves a full tier first; see docs/hmt-policies.md."""
    hmt_attention_weight: float = 0.0
    """Exponent of the attention an entry received in its worth; 0: attention is not asked for."""
    hmt_decay_factor: float = 0.01
    """Per second since an entry's last use, how its attention loses weight."""
    hmt_gpu_threshold: float = 0.85
    """Share of the device tier above which entries move down."""
    hmt_cpu_threshold: float = 0.90
    """Share of the host tier above which entries move down."""
    nvme_path: str = ""
    """Folder for the tier on disk, for this server alone; none: no such tier."""
    nvme_memory_gb: float = 64.0
    """What the tier on disk may take (GB), 0: no such tier; clipped to what the disk has."""
    nvme_daily_writes_gb: float = 0.0
    """What may be written to it in a day (GB), to spare the disk; 0: any number."""
    nvme_free_floor_gb: float = 1.0
    """Free room on that disk that is left to others (GB)."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in CHOICES and value not in CHOICES[field.name]:
                raise ConfigError(f"{field.name} is {value!r}; choose one of {', '.join(CHOICES[field.name])}")
            if isinstance(value, bool | str):
                continue
            if field.name in SHARES:
                if not 0 < value <= 1:
                    raise ConfigError(f"{field.name} is {value}; it must be above 0 and at most 1")
                continue
            if isinstance(value, float) and field.name not in MAY_BE_ZERO:
                if not 0 < value < math.inf:
                    raise ConfigError(f"{field.name} is {value}; it must be above 0")
                continue
            low = 0 if field.name in MAY_BE_ZERO else 1
            if not low <= value < math.inf:  # also true for NaN
                raise ConfigError(f"{field.name} is {value}; it must be at least {low}")

    def changed(self) -> dict[str, Any]:
        """What is not as by default; `from_values` makes the same of it, and keys that nobody set contradict none."""
        defaults = Config()
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {key: value for key, value in values.items() if value != getattr(defaults, key)}

    def to_json(self) -> str:
        """What is not as by default, for another process; `load` reads it from ``WICORE_CONFIG``."""
        return json.dumps(self.changed())


def load(folder: Path, environment: Mapping[str, str] = os.environ) -> Config:
    """The configuration of a model repository: ``wicore.json`` or what ``WICORE_CONFIG`` says, then the environment.

    Raises:
        ConfigError: not JSON, an unknown key (the nearest valid name is given), a value of the wrong type or range,
            keys that contradict each other.
    """
    given = environment.get(ENV_CONFIG, "")
    if given.lstrip().startswith("{"):
        return from_values({**_parsed(given, ENV_CONFIG), **_from_environment(environment)}, ENV_CONFIG)
    return load_file(Path(given) if given else folder / CONFIG_NAME, environment, optional=not given)


def load_file(path: Path, environment: Mapping[str, str] = os.environ, *, optional: bool = False) -> Config:
    """The configuration in a file, then the environment; the defaults where the file is missing and ``optional``.

    Raises:
        ConfigError: as `load`.
    """
    values: dict[str, Any] = {}
    if not optional or path.exists():
        try:
            values = _parsed(path.read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error
    overrides = _from_environment(environment)
    where = f"{path} and {ENV_PREFIX}… variables" if overrides else str(path)
    return from_values(values | overrides, where)


def _parsed(text: str, where: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must hold one JSON object")
    return values


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """Keys that variables set. One that is nearly a key is a slip; what is like none is somebody else's."""
    types = get_type_hints(Config)
    found: dict[str, Any] = {}
    for variable, text in environment.items():
        key = variable.removeprefix(ENV_PREFIX).lower()
        if key == variable.lower():
            continue
        if key in types:
            found[key] = _read_text(variable, text, types[key])
        elif near := difflib.get_close_matches(key, types, n=1, cutoff=ENV_NEAR):
            raise ConfigError(f"unknown variable {variable}; did you mean {ENV_PREFIX}{near[0].upper()}?")
    return found


def _read_text(variable: str, text: str, wanted: type) -> Any:
    if wanted is str:
        return text
    try:
        if wanted is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.strip().lower()]
        return wanted(text)
    except (KeyError, ValueError) as error:
        kind = "true or false" if wanted is bool else f"of type {wanted.__name__}"
        raise ConfigError(f"{variable} is {text!r}; it must be {kind}") from error


def from_values(values: dict[str, Any], where: str) -> Config:
    """Check keys and types and build the configuration; ``where`` names the source in errors.

    Raises:
        ConfigError: as `load`.
    """
    types = get_type_hints(Config)
    for key, value in values.items():
        if key not in types:
            near = difflib.get_close_matches(key, types, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; valid keys: {', '.join(sorted(types))}"
            raise ConfigError(f"{where}: unknown key {key!r}{hint}")
        wanted = types[key]
        fits = isinstance(value, wanted) or (wanted is float and isinstance(value, int))
        if not fits or (isinstance(value, bool) and wanted is not bool):
            raise ConfigError(f"{where}: {key} must be {wanted.__name__}, not {value!r}")
    made = Config(**values)
    for names, is_contrary, why in CONTRARY:
        if all(name in values for name in names) and is_contrary(made):
            raise ConfigError(f"{where}: {' and '.join(names)} contradict each other: {why}")
    return made


CONTRARY: tuple[tuple[tuple[str, ...], Callable[[Config], bool], str], ...] = (
    (
        ("max_tokens", "max_context_length"),
        lambda config: config.max_tokens >= config.max_context_length,
        "an answer of max_tokens leaves no room for a prompt",
    ),
    (
        ("queue_timeout_ms", "deadline_ms"),
        lambda config: config.queue_timeout_ms > config.deadline_ms,
        "the deadline passes before the queue timeout can",
    ),
    (
        ("idle_timeout_s", "body_timeout_s"),
        lambda config: config.idle_timeout_s > config.body_timeout_s,
        "a body must be complete before a pause in it may end",
    ),
    (
        ("max_image_bytes", "max_body_bytes"),
        lambda config: config.max_image_bytes * 4 / 3 > config.max_body_bytes,
        "a picture of max_image_bytes is larger than a body in base64",
    ),
    (
        ("nvme_path", "enable_hmt"),
        lambda config: bool(config.nvme_path) and not config.enable_hmt,
        "the tier on disk is a part of HMT",
    ),
)
"""Keys, when they contradict each other, and why. Only keys that somebody set can: a default bends to what is set."""
