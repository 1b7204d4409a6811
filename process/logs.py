"""Logs: one event and its fields per line, on stderr, as logfmt or JSON; the standard library's logging
underneath.

    log = get_logger("cloud.rounds")
    log.info("round_started", round=3, cohort=16)
    # time=2026-11-03T10:00:00.123Z level=info logger=cloud.rounds event=round_started round=3 cohort=16

Laws: never a payload, key or token (bytes become their length, telling names are struck out); a line is a
line, whatever a peer put into a field; foreign libraries' records come out in the same form.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

from process import progress
from wire.errors import ConfigurationError

Form = Literal["logfmt", "json"]
LEVELS = ("debug", "info", "warning", "error")

MAX_VALUE_CHARACTERS = 300
_MAX_TRACE_CHARACTERS = 8_000
_STRUCK_OUT = "[redacted]"
_SECRET_WORDS = ("token", "secret", "password", "private", "payload")
_LOGFMT_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.,:/+@%*()[]{}<>")

Scalar = str | int | float | bool | None


class EventLogger:
    """Writes events of one part of the program. Field names are the parameters' names."""

    __slots__ = ("_logger",)

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def debug(self, event: str, /, **fields: Any) -> None:
        self._log(logging.DEBUG, event, fields)

    def info(self, event: str, /, **fields: Any) -> None:
        """For what an operator would care about: one line per such thing."""
        self._log(logging.INFO, event, fields)

    def warning(self, event: str, /, **fields: Any) -> None:
        self._log(logging.WARNING, event, fields)

    def error(self, event: str, /, **fields: Any) -> None:
        self._log(logging.ERROR, event, fields)

    def exception(self, event: str, /, **fields: Any) -> None:
        """An error with the traceback of the exception that is being handled."""
        self._log(logging.ERROR, event, fields, trace=True)

    def _log(self, level: int, event: str, fields: dict[str, Any], *, trace: bool = False) -> None:
        if self._logger.isEnabledFor(level):
            self._logger.log(level, "%s", event, extra={"fields": fields}, exc_info=trace, stacklevel=3)


def get_logger(name: str) -> EventLogger:
    """The logger of a part (`cloud.rounds`); usable before `configure_logs`."""
    return EventLogger(logging.getLogger(name))


def configure_logs(form: Form = "logfmt", level: str = "info", stream: TextIO | None = None) -> None:
    """Sends all records of the process to `stream` (stderr). May be called again.

    Raises:
        ConfigurationError: (operator) an unknown form or level.
    """
    if form not in ("logfmt", "json") or level not in LEVELS:
        raise ConfigurationError(
            f"no log form {form!r} with level {level!r}", hint=f"logfmt or json; {', '.join(LEVELS)}"
        )
    handler = _LineHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(_JsonFormatter() if form == "json" else _LogfmtFormatter())
    root = logging.getLogger()
    for old in list(root.handlers):
        if isinstance(old, _LineHandler):
            root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())


class _LineHandler(logging.StreamHandler[TextIO]):
    """Writes above a progress bar that is being drawn on the same terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        with progress.aside(self.stream):
            super().emit(record)


class _LogfmtFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return " ".join(f"{name}={_logfmt(value)}" for name, value in _fields(record).items())


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(_fields(record), ensure_ascii=True, separators=(",", ":"))


def _fields(record: logging.LogRecord) -> dict[str, Scalar]:
    time = (
        datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    )
    line: dict[str, Scalar] = {
        "time": time,
        "level": record.levelname.lower(),
        "logger": record.name,
        "event": _clean(record.getMessage()),
    }
    given = getattr(record, "fields", None)
    if isinstance(given, dict):
        for name, value in given.items():
            hidden = any(word in name.lower() for word in _SECRET_WORDS)
            line[str(name) if name not in line else f"{name}_"] = _STRUCK_OUT if hidden else _clean(value)
    if record.exc_info and record.exc_info[1] is not None:
        trace = "".join(traceback.format_exception(record.exc_info[1]))
        line["error"] = _clean(f"{type(record.exc_info[1]).__name__}: {record.exc_info[1]}")
        line["trace"] = trace[-_MAX_TRACE_CHARACTERS:]
    return line


def _clean(value: Any) -> Scalar:
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else str(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value)} bytes>"
    text = str(value)
    return text if len(text) <= MAX_VALUE_CHARACTERS else text[:MAX_VALUE_CHARACTERS] + "…"


def _logfmt(value: Scalar) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return text if text and set(text) <= _LOGFMT_PLAIN else json.dumps(text, ensure_ascii=True)
