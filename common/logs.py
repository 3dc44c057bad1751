"""Log lines for people or for machines, with the run, round and farm they belong to."""

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal

Style = Literal["text", "json"]
STYLE_VARIABLE = "FIELDFED_LOG"

_bound: ContextVar[dict[str, str | int]] = ContextVar("fieldfed_log_fields", default={})  # noqa: B039


@contextmanager
def bound(**fields: str | int) -> Iterator[None]:
    """Every line inside carries these fields (run, round, farm)."""
    token = _bound.set(_bound.get() | fields)
    try:
        yield
    finally:
        _bound.reset(token)


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Time (UTC), level, logger, message and the bound fields."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_bound.get(),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line)


class TextFormatter(logging.Formatter):
    """``12:00:01 warning round 3, apple: ...``; the level only when it is not information."""

    def format(self, record: logging.LogRecord) -> str:
        """Local time, level where it matters, message."""
        time = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S")
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()} "
        text = f"{time} {level}{record.getMessage()}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def start_logging(style: Style | None = None) -> None:
    """Write our log lines to standard error.

    Args:
        style: text or json; absent: what ``FIELDFED_LOG`` says, which child processes inherit.
    """
    chosen = style or ("json" if os.environ.get(STYLE_VARIABLE) == "json" else "text")
    os.environ[STYLE_VARIABLE] = chosen
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if chosen == "json" else TextFormatter())
    for room in ("common", "server", "client"):
        logger = logging.getLogger(room)
        logger.handlers[:] = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False
