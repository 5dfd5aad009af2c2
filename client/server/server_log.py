"""What tritonserver's log says about loading, in plain words."""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass, field

from python_backends.errors import BY_CODE

_LOADING = re.compile(r'"loading: (?P<model>[^:"]+):\d+"')
_LOADED = re.compile(r"\"successfully loaded '(?P<model>[^']+)'")
_FAILED = re.compile(r"\"failed to load '(?P<model>[^']+)' version \d+: (?P<reason>.*)\"$")
_POLL = re.compile(r"\"Poll failed for model directory '(?P<model>[^']+)': (?P<reason>.*)\"$")
_INVALID = re.compile(r"\"(?P<reason>Invalid argument: ensemble '?(?P<model>\w+)'?.*)\"$")
_FATAL = re.compile(r"^error: creating server: (?P<reason>.*)$")
_TAKEN = re.compile(r"already in use|Address already in use")
_STARVED = "boost::interprocess::lock_exception"
"""Triton gives up on a stage whose process does not get to its start-up handshake in time."""
_FLAG = re.compile(r"unrecognized option '(?P<flag>--[\w-]+)")
_EXCEPTION = re.compile(r"\b(?P<code>" + "|".join(sorted(BY_CODE, key=len, reverse=True)) + r"): (?P<message>.*)")
_CONSEQUENCE = "which has no loaded version"
TAIL = 40


@dataclass(frozen=True)
class Progress:
    """How far loading is; ``loading`` and ``loaded`` are model names in the order they were met."""

    loading: tuple[str, ...] = ()
    loaded: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.loading:
            return f"loading {', '.join(self.loading)}" + (f" ({len(self.loaded)} ready)" if self.loaded else "")
        return f"{len(self.loaded)} models ready" if self.loaded else "starting tritonserver"


@dataclass
class ServerLog:
    """Fed line by line; remembers what is loading, what failed and why, and the last lines."""

    progress: Progress = field(default_factory=Progress)
    failures: dict[str, str] = field(default_factory=dict)
    port_taken: bool = False
    starved: bool = False
    unknown_flag: str = ""
    fatal: str = ""
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=TAIL))

    def add(self, line: str) -> bool:
        """Take a line; True when loading has progressed."""
        self.tail.append(line)
        if match := _LOADING.search(line):
            self.progress = Progress((*self.progress.loading, match["model"]), self.progress.loaded)
            return True
        if match := _LOADED.search(line):
            rest = tuple(model for model in self.progress.loading if model != match["model"])
            self.progress = Progress(rest, (*self.progress.loaded, match["model"]))
            return True
        if match := _FAILED.search(line) or _POLL.search(line) or _INVALID.search(line):
            self.failures.setdefault(match["model"].rpartition("/")[2], cause(match["reason"]))
        elif match := _FATAL.search(line):
            self.fatal = match["reason"]
        elif match := _FLAG.search(line):
            self.unknown_flag = match["flag"]
        elif _TAKEN.search(line):
            self.port_taken = True
        elif _STARVED in line:
            self.starved = True
        return False

    def explain(self) -> str:
        """Why the server did not start: one line per model that failed, else the last words of the log."""
        # An ensemble also fails for each stage that does; that adds nothing.
        first = {model: reason for model, reason in self.failures.items() if _CONSEQUENCE not in reason}
        if self.failures:
            told: dict[str, list[str]] = {}
            for model, why in (first or self.failures).items():
                told.setdefault(why, []).append(model)
            return "\n".join(f"{', '.join(models)} did not load: {why}" for why, models in told.items())
        if self.unknown_flag:
            return f"this tritonserver does not know {self.unknown_flag}; WiCore needs 24.10 (2.51) or later"
        if self.port_taken:
            return "a port was taken by another program while the server started; try again"
        if self.starved:
            return "this machine was too busy for a stage to start in time; try again, or stop other programs"
        errors = [line for line in self.tail if line.startswith("E")]
        return self.fatal or (cause(errors[-1]) if errors else "tritonserver gave no reason")


def cause(reason: str) -> str:
    """The one line that tells a person what happened, out of Triton's wrapping of a stage's exception."""
    text = reason.replace("\\n", "\n").replace('\\"', '"').partition("\n\nAt:\n")[0].strip().strip('"')
    if match := _EXCEPTION.search(text):
        return match["message"].strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (
        re.sub(r"^(Internal|Invalid argument|Unavailable|Not found): ", "", lines[-1]) if lines else "no reason given"
    )
