"""One log format for the gateway, Triton's stages and `wicore serve`: lines for a person, or JSON objects.

A JSON line has ``time`` (UTC), ``level``, ``process``, ``logger``, ``message``, and whatever a record brings
(``request_id``, ``trace_id``, ``status`` …); a line for a person has those behind the message.
"""

from __future__ import annotations

import datetime
import json
import logging
import re
import sys

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message", "taskName"}
_TRITON = re.compile(
    r"(?P<level>[IWEF])(?P<month>\d\d)(?P<day>\d\d) (?P<clock>\d\d:\d\d:\d\d\.\d+) \d+ (?P<where>\S+?)\] "
    r"(?P<message>.*)"
)
_LEVELS = {"I": "info", "W": "warning", "E": "error", "F": "critical"}


class JsonFormatter(logging.Formatter):
    """A record as JSON; `extra` values become keys."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        fields: dict[str, object] = {
            "time": moment.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
            **_extras(record),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """A record for a person."""

    def __init__(self, process: str) -> None:
        super().__init__(f"%(asctime)s {process}: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the library's name
        """The line, with `extra` values behind it."""
        more = "".join(f" {name}={value}" for name, value in _extras(record).items())
        return super().formatMessage(record) + more


def _extras(record: logging.LogRecord) -> dict[str, object]:
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


def start(process: str, log_format: str, level: int = logging.INFO) -> None:
    """Log to standard error: ``process`` names the gateway, serve or a stage, ``log_format`` is the configuration's."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(process) if log_format == "json" else TextFormatter(process))
    logging.basicConfig(handlers=[handler], level=level, force=True)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)


def triton_as_json(line: str) -> str:
    """A line of tritonserver's log as JSON; one that a stage has written as JSON already stays as it is."""
    if line.startswith("{"):
        return line
    now = datetime.datetime.now(datetime.UTC)
    fields = {"time": now.isoformat(timespec="milliseconds"), "level": "info", "process": "tritonserver"}
    if match := _TRITON.fullmatch(line):
        at = f"{now.year}-{match['month']}-{match['day']}T{match['clock'][:12]}+00:00"
        fields |= {"time": at, "level": _LEVELS[match["level"]], "logger": match["where"], "message": match["message"]}
    else:
        fields["message"] = line
    return json.dumps(fields, ensure_ascii=False)
