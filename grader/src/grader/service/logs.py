"""Logs: one JSON object a line, and every line about a grading names its submission."""

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import UTC, datetime

_SUBMISSION: ContextVar[str | None] = ContextVar("submission", default=None)


@contextlib.contextmanager
def about(submission_id: str) -> Iterator[None]:
    """Whatever this thread logs meanwhile, in whatever library, names the submission."""
    token = _SUBMISSION.set(submission_id)
    try:
        yield
    finally:
        _SUBMISSION.reset(token)


class _JsonLines(logging.Formatter):
    """Time, level, where, what, and what `extra` adds (submission, lab, ...)."""

    _KNOWN = frozenset(vars(logging.makeLogRecord({})))

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if submission := _SUBMISSION.get():
            line["submission"] = submission
        line |= {k: v for k, v in vars(record).items() if k not in self._KNOWN | {"message", "asctime"}}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _Seldom(logging.Filter):
    """Lets the queue's threads say the same once in ten seconds, not twenty times a second while a database is away."""

    _EVERY_S = 10.0

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name != "dbos":
            return True
        what, moment = record.getMessage()[:60], time.monotonic()
        if moment - self._said.get(what, -self._EVERY_S) < self._EVERY_S:
            return False
        if len(self._said) > 100:
            self._said.clear()
        self._said[what] = moment
        return True


def log_as_json() -> None:
    """Send logs to standard error, one JSON object a line; TOPEKA_LOG_LEVEL chooses how much."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines())
    level = os.environ.get("TOPEKA_LOG_LEVEL", "INFO").upper()
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for noisy in ("dbos", "alembic", "uvicorn.error"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, logging.getLogger().level))
    # DBOS gives its logger a handler of its own if it has none, whose lines are not JSON.
    dbos = logging.getLogger("dbos")
    dbos.handlers[:] = [logging.NullHandler()]
    dbos.propagate = True
    handler.addFilter(_Seldom())
