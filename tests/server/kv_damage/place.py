"""Servers of the demo model over a tier on disk that something happens to, for the tests here."""

from __future__ import annotations

import contextlib
import re
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from client import Client
from client.server import Server, ServerOptions
from python_backends import manifest
from python_backends.config import Config
from python_backends.decoder.open import _fingerprint, open_runtime
from python_backends.errors import EntryLostError
from python_backends.kv.open import open_cache
from python_backends.runtime.base import KvLayout

PAGE, MB = 4096, 2**20
CONFIG = Config(
    max_batch_size=4,
    max_context_length=2048,
    cpu_memory_gb=0.5,
    kv_cache_share=0.06,
    kv_block_tokens=16,
    nvme_memory_gb=0.05,
    nvme_free_floor_gb=0.0,
    cpu_kernels="onnxruntime",  # ours are compiled first
)
QUESTIONS = range(6)
SALTS = ("", "mine")
COUNTED_S = 20.0
"""Metrics are written every few seconds."""
Expected = Mapping[int, tuple[int, ...]]


class Place:
    """A repository, a folder for the tier, and servers on it, one after another."""

    def __init__(self, repository: Path, folder: Path, **settings: Any) -> None:
        self.repository, self.folder = repository, folder
        self.settings = {"nvme_path": str(folder), **settings}

    @property
    def config(self) -> Config:
        values = {name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__}
        return Config(**values | self.settings)

    @contextlib.contextmanager
    def serve(self) -> Iterator[tuple[Server, Client]]:
        options = ServerOptions(
            self.repository,
            http_port=0,
            grpc_port=0,
            metrics_port=0,
            drain_s=2,
            config=self.config,
        )
        with Server(options) as server, Client(server.addresses.grpc, timeout_s=60) as client:
            yield server, client
            server.check()

    def check(self) -> int:
        """What the next server would find is whole: the books hold, and every entry gives its bytes or says why not.

        Returns how many could be read.
        """
        layout, fingerprint = about(self.repository)
        cache = open_cache(layout, fingerprint, self.config, 32 * MB)
        assert cache is not None
        store = cache._stores["nvme"]
        found = 0
        for key in store.entries():
            with contextlib.suppress(EntryLostError):
                store.read(key, memoryview(bytearray(key.num_bytes)))
                found += 1
        for key in store.take_lost():
            cache._manager.lost(key, "nvme", "damaged", 0.0)
        cache.check_integrity()
        cache.close()
        return found


_ABOUT: dict[Path, tuple[KvLayout, str]] = {}


def about(repository: Path) -> tuple[KvLayout, str]:
    if repository not in _ABOUT:
        built = manifest.load(repository)
        runtime = open_runtime(built, CONFIG)
        _ABOUT[repository] = runtime.kv_layout, _fingerprint(built, CONFIG)
        runtime.close()
    return _ABOUT[repository]


def ask(client: Client, number: int, **options: Any) -> Any:
    """Question ``number``, about a picture, some 300 tokens long."""
    picture = Image.new("RGB", (64, 64), (40 * number, 20, 200))
    text = " ".join(str((number + 3) * word % 97) for word in range(120))
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
    return client.generate(messages=[message], images=[picture], max_tokens=6, ignore_eos=True, **options)


def failures(metrics: str, family: str = "wicore_kv_failures_total") -> dict[str, float]:
    """Counts by reason."""
    found = re.findall(rf'{family}\{{.*reason="(\w+)".*\}} (\S+)', metrics)
    return {reason: float(value) for reason, value in found}


def page(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        text: str = answer.read().decode()
    return text


def counted(server: Server, reasons: set[str], family: str = "wicore_kv_failures_total") -> dict[str, float]:
    """Wait until the server's metrics tell one of the reasons."""
    deadline = time.monotonic() + COUNTED_S
    while True:
        found = failures(page(server.addresses.metrics), family)
        if reasons & {reason for reason, value in found.items() if value}:
            return found
        assert time.monotonic() < deadline, f"none of {reasons} in {found}"
        time.sleep(0.5)


def answers_are_right(client: Client, expected: Expected) -> dict[str, int]:
    """Ask everything; the cached tokens by tier."""
    found: dict[str, int] = {}
    for number in QUESTIONS:
        for salt in SALTS:
            answer = ask(client, number, cache_salt=salt)
            assert answer.token_ids == expected[number]
            for tier, count in answer.usage.cached_tokens.items():
                found[tier] = found.get(tier, 0) + count
    return found
