"""How a server is started: defaults that are safe on a shared machine, and tritonserver's flags for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_urlsafe

from client.server.installation import Installation
from client.server.launcher import SECRET_PLACE, SECRET_VARIABLE
from python_backends.config import ENV_CONFIG, Config

ADMIN_APIS = ("model-repository", "shared-memory", "logging", "trace")
"""APIs that change the server or open files of its host. Statistics and model configuration only read, and
perf_analyzer needs them, so they stay open."""
ADMIN_HEADER = "wicore-admin-key"
MIB = 2**20
_UNSENDABLE = "\n"
"""In a key that opens nothing: neither HTTP nor gRPC lets a header's value have it, so everyone may read the key."""


@dataclass(frozen=True)
class ServerOptions:
    """Settings of one server process. Sizes are MiB, times seconds; port 0 picks a free one."""

    repository: Path
    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    metrics_host: str | None = None
    """Where the metrics are to be had; None: on ``host``."""
    admin_key: str = field(default="", repr=False)
    """Value of the header that opens `ADMIN_APIS`; none: nothing opens them."""
    response_cache_mb: int = 256
    pinned_memory_mb: int = 256
    cuda_memory_mb: int = 64
    """Triton's own staging pool on GPU 0; the decoder's memory is not in it."""
    http_threads: int = 16
    model_config_name: str | None = None
    log_verbose: int = 0
    log_path: Path | None = None
    """The server's whole log; a file in the cache folder, removed after a clean stop, where None."""
    start_timeout_s: float = 900.0
    drain_s: int = 5
    """How long answers in flight may go on after a stop."""
    config: Config | None = None
    """Of the stages; None: they read the repository's ``wicore.json`` themselves."""


@dataclass(frozen=True)
class Addresses:
    """Where a running server listens."""

    host: str
    http_port: int
    grpc_port: int
    metrics_port: int

    @property
    def grpc(self) -> str:
        """``host:port`` as gRPC clients take it."""
        return f"{reachable(self.host)}:{self.grpc_port}"

    @property
    def http(self) -> str:
        """URL of the HTTP API."""
        return f"http://{reachable(self.host)}:{self.http_port}"

    @property
    def metrics(self) -> str:
        """URL of the Prometheus metrics."""
        return f"http://{reachable(self.host)}:{self.metrics_port}/metrics"


def environment(options: ServerOptions, installation: Installation) -> dict[str, str]:
    """tritonserver's environment, which its stages inherit: the configuration goes that way."""
    found = installation.environment() | {SECRET_VARIABLE: options.admin_key or token_urlsafe(24) + _UNSENDABLE}
    return found if options.config is None else {**found, ENV_CONFIG: options.config.to_json()}


def reachable(host: str) -> str:
    """Where to reach a server that listens on ``host``: listening everywhere includes this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def command(options: ServerOptions, installation: Installation, addresses: Addresses, shm_prefix: str) -> list[str]:
    """tritonserver's command line, but for the key that `launcher` puts into its place."""
    restricted = f"{','.join(ADMIN_APIS)}:{ADMIN_HEADER}={SECRET_PLACE}"
    flags = {
        "model-repository": options.repository.resolve(),
        "model-control-mode": "none",
        "exit-on-error": "true",
        "strict-readiness": "true",
        "exit-timeout-secs": options.drain_s,
        "http-address": options.host,
        "http-port": addresses.http_port,
        "http-thread-count": options.http_threads,
        "grpc-address": options.host,
        "grpc-port": addresses.grpc_port,
        "metrics-address": options.metrics_host or options.host,
        "metrics-port": addresses.metrics_port,
        "http-restricted-api": restricted,
        "grpc-restricted-protocol": restricted,
        "pinned-memory-pool-byte-size": options.pinned_memory_mb * MIB,
        "cuda-memory-pool-byte-size": f"0:{options.cuda_memory_mb * MIB}",
        "cache-config": f"local,size={options.response_cache_mb * MIB}",
        "backend-config": f"python,shm-region-prefix-name={shm_prefix}",
        "log-verbose": options.log_verbose,
    }
    if installation.backends:
        flags["backend-directory"] = installation.backends
    if installation.caches:
        flags["cache-directory"] = installation.caches
    if options.model_config_name:
        flags["model-config-name"] = options.model_config_name
    # The configurations are complete, and without this each stage's process would start twice.
    return [str(installation.binary), "--disable-auto-complete-config", *(f"--{k}={v}" for k, v in flags.items())]
