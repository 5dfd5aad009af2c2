"""Tables and raw results of a run on a card."""

from __future__ import annotations

import json
import platform
import time
import traceback
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any


class Report:
    """Collects rows of sections, prints them as they come, and keeps all of them in one JSON file."""

    def __init__(self, path: Path, machine: dict[str, Any]) -> None:
        self._path = path
        self.values: dict[str, Any] = {
            "date": time.strftime("%Y-%m-%d"),
            "python": platform.python_version(),
            "versions": _versions(),
            "machine": machine,
            "sections": {},
        }
        self.save()

    def row(self, section: str, **values: Any) -> None:
        """Add and print one row."""
        self.values["sections"].setdefault(section, []).append(values)
        shown = "  ".join(f"{name} {_short(value)}" for name, value in values.items())
        print(f"[{section}] {shown}", flush=True)
        self.save()

    def guard(self, part: str, run: Callable[[], None]) -> None:
        """Run a part; one that fails says so and lets the others run."""
        try:
            run()
        except Exception as error:
            traceback.print_exc()
            self.row("failed", part=part, error=f"{type(error).__name__}: {error}"[:600])

    def save(self) -> None:
        """Write everything so far: a run that is cut off keeps what it measured."""
        self._path.write_text(json.dumps(self.values, indent=1) + "\n")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _versions() -> dict[str, str]:
    names: Sequence[str] = ("tensorrt-rtx-cu13", "cuda-bindings", "triton", "torch", "transformers", "numpy")
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
