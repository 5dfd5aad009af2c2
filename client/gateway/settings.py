"""What a gateway needs to know: where things are, and the configuration; made by `wicore serve`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Self

from client.connection import DEFAULT_ADDRESS
from python_backends.config import Config

KEYS_NAME = "api_keys.json"
"""API keys beside the manifest of a model repository; where the file is, a key is needed."""


@dataclasses.dataclass(frozen=True)
class GatewaySettings:
    """Limits and times are the configuration's."""

    repository: Path
    """For its manifest (name and tokenizer), API keys and limits."""
    model: str
    """The name that clients ask for."""
    created: int = 0
    """When the model was built, in seconds since 1970."""
    max_model_len: int | None = None
    """Tokens of prompt and answer together."""
    triton: str = DEFAULT_ADDRESS
    """gRPC ``host:port``."""
    host: str = "127.0.0.1"
    port: int = 8080
    config: Config = dataclasses.field(default_factory=Config)

    @property
    def answer_timeout_s(self) -> float:
        """Longer than the decoder's own deadline, which is the one to speak."""
        return self.config.deadline_ms / 1000 + 30

    @property
    def image_hosts(self) -> frozenset[str]:
        """Hosts to fetch pictures from, in lower case."""
        return frozenset(host.strip().lower() for host in self.config.image_hosts.split(",") if host.strip())

    @property
    def keys_path(self) -> Path:
        """Where API keys are, if there are any."""
        return self.repository / KEYS_NAME

    def to_json(self) -> str:
        """For the gateway's own process."""
        return json.dumps(dataclasses.asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `to_json` wrote."""
        values: dict[str, Any] = json.loads(text)
        values |= {"repository": Path(values["repository"]), "config": Config(**values["config"])}
        return cls(**values)
