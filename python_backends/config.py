"""Defaults, once. `wicore.json` beside the model repository's manifest overrides them; unknown keys are refused."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from pathlib import Path
from typing import Any, get_type_hints

from python_backends.errors import ConfigError

CONFIG_NAME = "wicore.json"
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
        "kv_salt_quota_gb",
    )
)
CHOICES = {"cpu_kernels": ("auto", "onnxruntime")}

SHARES = frozenset(("kv_cache_share", "hmt_decay_factor", "hmt_gpu_threshold", "hmt_cpu_threshold"))


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of one server. Sizes are upper bounds, clipped to what the machine and the model have and reported.

    Raises:
        ConfigError: a value outside its range.
    """

    max_batch_size: int = 16
    """Sequences decoded together, and so KV slots."""
    max_context_length: int = 131_072
    """Tokens of prompt and answer together; clipped to the model's own limit."""
    cpu_memory_gb: float = 128.0
    """Host memory for KV caches (GB); fewer slots or a shorter context where it does not suffice."""
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

    enable_hmt: bool = True
    """Keep KV beyond the requests that computed it, in tiers: device, host and, with ``nvme_path``, disk."""
    kv_cache_share: float = 0.5
    """Of ``cpu_memory_gb``, what kept KV may take; the rest is for the slots of running sequences."""
    kv_salt_quota_gb: float = 0.0
    """What the KV of one ``cache_salt`` may take on each tier (GB), so that nobody crowds others out; 0: no limit."""
    kv_block_tokens: int = 64
    """Tokens of a KV block."""
    hmt_eviction_policy: str = "a2cr"
    """What leaves a full tier first; see docs/hmt-policies.md."""
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
            low = 0 if field.name in MAY_BE_ZERO else 1
            if not low <= value < math.inf:  # also true for NaN
                raise ConfigError(f"{field.name} is {value}; it must be at least {low}")


def load(folder: Path) -> Config:
    """Read ``wicore.json`` of a model repository; the defaults where there is none.

    Raises:
        ConfigError: not JSON, an unknown key (the nearest valid name is given), a value of the wrong type or range.
    """
    path = folder / CONFIG_NAME
    if not path.exists():
        return Config()
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold one JSON object")
    return from_values(values, str(path))


def from_values(values: dict[str, Any], where: str) -> Config:
    """Check keys and types and build the configuration; ``where`` names the source in errors."""
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
    return Config(**values)
