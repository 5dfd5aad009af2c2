"""What a check found, and which section of docs/troubleshooting.md tells more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Level = Literal["ok", "warning", "error"]
PAGE = "docs/troubleshooting.md"


@dataclass(frozen=True)
class Finding:
    """One check's outcome."""

    check: str
    """Its name, and the section of the page."""
    level: Level
    """error: serving fails; warning: it works, but slowly or not all of it."""
    found: str
    advice: str = ""
    """What to do; empty where nothing is to do."""

    @property
    def link(self) -> str:
        """Where to read more."""
        return f"{PAGE}#{self.check}"

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        more = {"advice": self.advice, "link": self.link} if self.advice else {}
        return {"check": self.check, "level": self.level, "found": self.found, **more}


def worst(findings: list[Finding]) -> Level:
    """The level of the whole machine."""
    levels = {finding.level for finding in findings}
    return "error" if "error" in levels else "warning" if "warning" in levels else "ok"
