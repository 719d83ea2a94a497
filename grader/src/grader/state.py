"""What a checkout remembers: attempts and hints, in `.topeka/state.db`.

SQLite in WAL mode: several processes may read and write at once. A read-only checkout can be
graded all the same; nothing is remembered then.
"""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from grader.errors import TopekaError
from grader.report import LabReport, Report, Status

_SCHEMA = """
CREATE TABLE IF NOT EXISTS attempts (
    id INTEGER PRIMARY KEY,
    lab TEXT NOT NULL,
    created TEXT NOT NULL,      -- UTC, ISO 8601
    status TEXT NOT NULL,
    report TEXT NOT NULL        -- the LabReport as JSON
);
CREATE INDEX IF NOT EXISTS attempts_by_lab ON attempts (lab, id);
CREATE TABLE IF NOT EXISTS hints (
    lab TEXT NOT NULL,
    topic TEXT NOT NULL,        -- the function or misconception a hint is about
    shown INTEGER NOT NULL,     -- how many steps have been revealed
    PRIMARY KEY (lab, topic)
);
"""
_VERSION = 1


class StateUnusable(TopekaError):
    """The state file cannot be used; the message says what to do."""


class Attempt(NamedTuple):
    """One remembered grading of one lab.

    Attributes:
        created: when.
        report: the lab's report.
    """

    created: datetime
    report: LabReport


class State:
    """The state of one checkout.

    Args:
        folder: the folder `.topeka`; made at the first write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = folder / "state.db"

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        self.folder.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self._file, timeout=15, isolation_level=None)
        try:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version > _VERSION:
                raise StateUnusable(
                    f"{self._file} was written by a newer version of the course (format {version}, "
                    f"this one knows {_VERSION}): update the course, or move the file away"
                )
            if version < _VERSION:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.executescript(
                    f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT;"
                )
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("COMMIT")
        except sqlite3.DatabaseError as error:
            raise StateUnusable(
                f"{self._file} cannot be used ({error}). Nothing was changed. If it is damaged, move it away; "
                "your code in labs/ is not affected"
            ) from error
        finally:
            connection.close()

    def remember(self, report: Report) -> None:
        """Keep every lab report of a grading of the learner's own code."""
        rows = [
            (lab.lab, report.created.astimezone(UTC).isoformat(), lab.status.value, lab.model_dump_json())
            for lab in report.labs
        ]
        with self._open() as connection:
            connection.executemany(
                "INSERT INTO attempts (lab, created, status, report) VALUES (?, ?, ?, ?)", rows
            )

    def last(self, lab: str) -> Attempt | None:
        """Return the newest attempt at `lab`, or None."""
        if not self._file.exists():
            return None
        with self._open() as connection:
            row = connection.execute(
                "SELECT created, report FROM attempts WHERE lab = ? ORDER BY id DESC LIMIT 1", (lab,)
            ).fetchone()
        return _attempt(row) if row else None

    def last_by_lab(self) -> dict[str, Attempt]:
        """Return the newest attempt of every lab that has one."""
        if not self._file.exists():
            return {}
        with self._open() as connection:
            rows = connection.execute(
                "SELECT created, report FROM attempts WHERE id IN (SELECT max(id) FROM attempts GROUP BY lab)"
            ).fetchall()
        attempts = [_attempt(row) for row in rows]
        return {a.report.lab: a for a in attempts}

    def statuses(self) -> dict[str, str]:
        """Return the status of the newest attempt of every lab that has one."""
        if not self._file.exists():
            return {}
        with self._open() as connection:
            rows = connection.execute(
                "SELECT lab, status FROM attempts WHERE id IN (SELECT max(id) FROM attempts GROUP BY lab)"
            ).fetchall()
        return dict(rows)

    def verified(self) -> set[str]:
        """Return the labs that have ever been verified."""
        if not self._file.exists():
            return set()
        with self._open() as connection:
            rows = connection.execute(
                "SELECT DISTINCT lab FROM attempts WHERE status = ?", (Status.VERIFIED.value,)
            ).fetchall()
        return {row[0] for row in rows}

    def count(self, lab: str) -> int:
        """Return how many attempts at `lab` are remembered."""
        if not self._file.exists():
            return 0
        with self._open() as connection:
            return int(
                connection.execute("SELECT count(*) FROM attempts WHERE lab = ?", (lab,)).fetchone()[0]
            )

    def next_hint(self, lab: str, topic: str) -> int:
        """Return how many hints on `topic` were shown before, and count one more."""
        with self._open() as connection:
            row = connection.execute(
                "INSERT INTO hints (lab, topic, shown) VALUES (?, ?, 1) "
                "ON CONFLICT (lab, topic) DO UPDATE SET shown = shown + 1 RETURNING shown",
                (lab, topic),
            ).fetchone()
        return int(row[0]) - 1

    def forget_hints(self, lab: str) -> None:
        """Start the hints of `lab` over."""
        with self._open() as connection:
            connection.execute("DELETE FROM hints WHERE lab = ?", (lab,))


def _attempt(row: tuple[str, str]) -> Attempt:
    values = json.loads(row[1])
    values.pop("passed", None)  # computed, not stored
    return Attempt(datetime.fromisoformat(row[0]), LabReport.model_validate(values))
