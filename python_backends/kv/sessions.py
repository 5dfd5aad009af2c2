"""KV kept by name: what the newest request of a session left behind, found again without its prompt.

A session is the name, within its salt, of one entry: the tail that its newest request ended with; the blocks before it
follow from their parents. Names are kept as hashes, in a file beside the tier on disk where there is one, so that a
pinned session outlives the server. Called under the cache's lock.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from python_backends.errors import InternalError
from python_backends.kv.blocks import EntryKey, Move
from python_backends.kv.manager import KvManager

log = logging.getLogger("wicore")

MOST_SESSIONS = 4096
"""Names remembered, beside the pinned ones: the oldest go first. Their entries stay, for who sends the prompt again."""


@dataclass
class Session:
    """Invariant: ``pinned`` are exactly the keys that the book-keeper counts a pin of ours for."""

    tip: EntryKey
    """Tail at the end of the newest request's answer."""
    prompt: EntryKey | None = None
    """Tail at the end of its prompt: an answer that comes back as text may have become other tokens."""
    wanted: bool = False
    """To be pinned, also what later requests leave."""
    pinned: tuple[EntryKey, ...] = ()


class Sessions:
    """See the module.

    Args:
        manager: of the entries.
        path: where names outlive the server; None: nowhere.
    """

    def __init__(self, manager: KvManager, path: Path | None = None) -> None:
        self._manager = manager
        self._path = path
        self._sessions: dict[str, Session] = {}
        self._read()

    @staticmethod
    def name_of(session: str, salt: bytes) -> str:
        """What a session is called here; nobody reads the session's own name out of it."""
        return blake2b(session.encode(), key=salt, digest_size=16, person=b"wicore.session").hexdigest()

    def keep(self, name: str, tip: EntryKey, prompt: EntryKey | None = None) -> None:
        """The session's newest request ended with this tail, its prompt with the other."""
        session = self._sessions.pop(name, None) or Session(tip)
        self._sessions[name] = session  # the newest last
        session.tip, session.prompt = tip, prompt
        if session.wanted:
            self._pin(session)
        elif len(self._sessions) > MOST_SESSIONS:
            oldest = next((each for each, known in self._sessions.items() if not known.wanted), name)
            del self._sessions[oldest]
        self._write()

    def keys(self, name: str) -> Sequence[EntryKey]:
        """Its blocks and its tails, the deepest last, where what leads to that one is held; else nothing."""
        session = self._sessions.get(name)
        return [] if session is None else self._keys_of(session)

    def _keys_of(self, session: Session) -> list[EntryKey]:
        keys = self._manager.ancestry(session.tip)
        if keys and session.prompt is not None and session.prompt != session.tip:
            keys[-1:-1] = self._manager.ancestry(session.prompt)[-1:]
        return keys

    def pin(self, name: str) -> bool:
        """Keep it until `unpin`, on the slowest tier too; False where there is no such session, or it has gone."""
        session = self._sessions.get(name)
        if session is None:
            return False
        session.wanted = True
        self._pin(session)
        self._write()
        return bool(session.pinned)

    def unpin(self, name: str) -> bool:
        """Leave it to the replacement again."""
        session = self._sessions.get(name)
        if session is None:
            return False
        session.wanted = False
        self._manager.unpin(session.pinned)
        session.pinned = ()
        self._write()
        return True

    def erase(self, name: str, now: float) -> list[Move]:
        """Forget it, and what no other prompt continues; the moves (drops) have begun."""
        if not self.unpin(name):
            return []
        session = self._sessions.pop(name)
        others = frozenset(key.id for each in self._sessions.values() for key in (each.tip, each.prompt) if key)
        own = self._manager.own_part(session.tip, others)
        own += [key for key in (session.prompt,) if key is not None and key.id not in others]
        self._write()
        return self._manager.erase(own, now)

    def __contains__(self, name: str) -> bool:
        return name in self._sessions

    def is_pinned(self, name: str) -> bool:
        """Whether it is kept until `unpin`."""
        return name in self._sessions and self._sessions[name].wanted

    def _pin(self, session: Session) -> None:
        keys = tuple(self._keys_of(session))
        self._manager.pin(keys)
        self._manager.unpin(session.pinned)
        session.pinned = keys

    # --- over a restart -------------------------------------------------------------------------------------------

    def _read(self) -> None:
        if self._path is None or not self._path.exists():
            return
        try:
            stored = json.loads(self._path.read_text(encoding="utf-8"))
            found = {
                name: Session(_decode(value["tip"]), value["prompt"] and _decode(value["prompt"]), value["wanted"])
                for name, value in stored.items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s cannot be read, so earlier sessions are unknown: %s", self._path, error)
            return
        self._sessions = {name: session for name, session in found.items() if self._manager.ancestry(session.tip)}
        for session in self._sessions.values():
            if session.wanted:
                self._pin(session)

    def _write(self) -> None:
        if self._path is None:
            return
        values = {
            name: {
                "tip": _encode(session.tip),
                "prompt": session.prompt and _encode(session.prompt),
                "wanted": session.wanted,
            }
            for name, session in self._sessions.items()
        }
        partial = self._path.with_suffix(".partial")
        try:
            fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with open(fd, "w", encoding="utf-8") as file:
                json.dump(values, file)
            partial.replace(self._path)
        except OSError as error:
            log.warning("%s cannot be written; sessions end with this server: %s", self._path, error)

    def check_integrity(self) -> None:
        """Raises InternalError where a session is pinned that should not be."""
        for session in self._sessions.values():
            if session.pinned and not session.wanted:
                raise InternalError("a session is pinned that nobody wants pinned")


def _encode(key: EntryKey) -> dict[str, Any]:
    return {name: value.hex() if isinstance(value, bytes) else value for name, value in dataclasses.asdict(key).items()}


def _decode(values: dict[str, Any]) -> EntryKey:
    hexed = {name: bytes.fromhex(values[name]) for name in ("id", "parent", "salt")}
    return EntryKey(**{**values, **hexed})
