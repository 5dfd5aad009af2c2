"""API keys: made once, shown once, kept as hashes in a file beside the model repository's manifest."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import os
import secrets
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from python_backends.errors import AuthenticationError, ConfigError

PREFIX = "wk-"
KEY_BYTES = 32
"""Of randomness. A hash without salt and stretching is enough: nobody guesses 256 random bits."""


@dataclasses.dataclass(frozen=True)
class ApiKey:
    """A key as it is kept. Limits of 0 are those of wicore.json."""

    name: str
    sha256: str
    created: int
    """Seconds since 1970."""
    max_concurrent_requests: int = 0
    max_requests_per_minute: int = 0


def add(path: Path, name: str, max_concurrent_requests: int = 0, max_requests_per_minute: int = 0) -> str:
    """Make a key, keep its hash, and return it: it cannot be read again.

    Raises:
        ConfigError: the name is taken, or the file cannot be used.
    """
    keys = load(path) if path.exists() else []
    if any(key.name == name for key in keys):
        raise ConfigError(f"there is a key named {name!r} already; remove it first: wicore keys remove {name}")
    text = PREFIX + secrets.token_urlsafe(KEY_BYTES)
    made = ApiKey(name, _hash(text), int(time.time()), max_concurrent_requests, max_requests_per_minute)
    _write(path, [*keys, made])
    return text


def remove(path: Path, name: str) -> None:
    """Take a key away; a running gateway refuses it within a second.

    Raises:
        ConfigError: there is none of that name.
    """
    keys = load(path)
    kept = [key for key in keys if key.name != name]
    if len(kept) == len(keys):
        raise ConfigError(f"there is no key named {name!r}; wicore keys list shows them")
    _write(path, kept)


def load(path: Path) -> list[ApiKey]:
    """The keys of a file.

    Raises:
        ConfigError: it is not there or cannot be read.
    """
    try:
        return [ApiKey(**values) for values in json.loads(path.read_text(encoding="utf-8"))]
    except FileNotFoundError as error:
        raise ConfigError(f"there is no {path}; wicore keys add NAME makes it") from error
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read as API keys: {error}") from error


class KeyRing:
    """The keys of a file, read again when it changes. Without the file no key is needed.

    A file that cannot be read lets nobody in, and so does one without keys.
    """

    CHECK_S = 1.0

    def __init__(self, path: Path) -> None:
        self._path = path
        self._keys: Sequence[ApiKey] | None = None
        self._stamp: tuple[int, int] | None = None
        self._checked_s = float("-inf")

    @property
    def needed(self) -> bool:
        """Whether requests need a key."""
        self._refresh()
        return self._keys is not None

    def check(self, text: str) -> ApiKey:
        """The key; every kept one is compared, in constant time, so that time tells nothing.

        Raises:
            AuthenticationError: it is none of ours.
        """
        self._refresh()
        given, found = _hash(text), None
        for key in self._keys or ():
            if hmac.compare_digest(key.sha256, given):
                found = key
        if found is None:
            raise AuthenticationError("this API key is not valid; ask the operator for one (wicore keys add NAME)")
        return found

    def _refresh(self) -> None:
        now = time.monotonic()
        if now - self._checked_s < self.CHECK_S:
            return
        self._checked_s = now
        try:
            status = self._path.stat()
        except FileNotFoundError:
            # Gone while serving: whoever had it removed wanted no keys to be valid, not none to be needed.
            self._keys = None if self._keys is None else ()
            return
        if (stamp := (status.st_mtime_ns, status.st_size)) != self._stamp:
            self._stamp = stamp
            try:
                self._keys = load(self._path)
            except ConfigError:
                self._keys = ()


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _write(path: Path, keys: Sequence[ApiKey]) -> None:
    """Atomically, for the owner alone."""
    text = json.dumps([dataclasses.asdict(key) for key in keys], indent=2)
    try:
        handle, made = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text + "\n")
        Path(made).replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
