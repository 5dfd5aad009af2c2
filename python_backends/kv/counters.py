"""What the manager counts since start."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from python_backends.kv.blocks import Move, Tier


@dataclass
class Counters:
    """Keys of the mappings are ``tier/reason`` or ``source>target/reason``, as labels of metrics."""

    inserted: int = 0
    refused: int = 0
    """Insertions that found no room."""
    moves: Counter[str] = field(default_factory=Counter)
    """Ended well."""
    moved_bytes: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)

    def count_move(self, move: Move) -> None:
        """It ended well."""
        label = f"{move.source}>{move.target or 'nowhere'}/{move.reason}"
        self.moves[label] += 1
        self.moved_bytes[label] += move.key.num_bytes

    def count_failed(self, move: Move, reason: str) -> None:
        """The copy did not arrive."""
        self.failed[f"{move.source}>{move.target}/{reason or 'unknown'}"] += 1

    def count_lost(self, tier: Tier, reason: str) -> None:
        """A payload could not be given back."""
        self.lost[f"{tier}/{reason}"] += 1

    def as_dict(self) -> dict[str, object]:
        """JSON-ready."""
        return {
            "inserted": self.inserted,
            "refused": self.refused,
            "moves": dict(self.moves),
            "moved_bytes": dict(self.moved_bytes),
            "failed": dict(self.failed),
            "lost": dict(self.lost),
        }
