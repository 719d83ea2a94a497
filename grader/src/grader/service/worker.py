"""Grades what waits in the queue. One submission at a time: a machine runs as many workers as it has room for.

Everything here may happen twice: a worker is killed after it graded and before it wrote the report, and the
next one grades again. Only `submissions.finish` decides, and it lets one report in.
"""

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.exc import DBAPIError

from grader.catalog import Catalog, Lab
from grader.grading import grade_lab
from grader.machine import describe
from grader.report import LabReport, Outcome, Report
from grader.runner.protocol import Event
from grader.sandbox import Sandbox
from grader.service import submissions
from grader.service.database import Database
from grader.service.models import State, Submission, Worker, now
from grader.service.settings import Settings
from grader.service.work_queue import Consumer, WorkQueue

log = logging.getLogger("topeka.worker")

# Results reach watchers in batches: a test takes milliseconds, a transaction that reaches the disk as many.
BATCH_S = 0.2


class GradingWorker:
    """A worker: its heart, its sandbox, and its end of the queue."""

    def __init__(
        self,
        database: Database,
        settings: Settings,
        catalog: Catalog,
        sandbox: Sandbox,
        *,
        queues: Sequence[str],
        stack: str,
        slot: int = 0,
        host: str | None = None,
        cache: Path | None = None,
    ) -> None:
        """Set up; nothing is taken before `start`.

        Args:
            database: the service's.
            settings: for the heartbeat.
            catalog: the course, with the tests.
            sandbox: started; the caller closes it.
            queues: what this machine can verify.
            stack: of the sandbox.
            slot: number of this worker on its host.
            host: name of the machine, unique and stable; None means its hostname.
            cache: for expected test sets.
        """
        self.id = f"{host or socket.gethostname()}/{slot}"
        self._database, self._settings, self._catalog = database, settings, catalog
        self._sandbox, self._stack, self._cache = sandbox, stack, cache
        self._queues, self._host = tuple(queues), host or socket.gethostname()
        self._ending = threading.Event()
        self._queue = WorkQueue(database)
        self._consumer = Consumer(database, self.id, queues, self.grade)
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Announce this worker and begin."""
        with self._database.session() as session:
            session.merge(
                Worker(
                    id=self.id,
                    host=self._host,
                    queues=list(self._queues),
                    machine=describe().model_dump(mode="json"),
                    started=now(),
                    seen=now(),
                    draining=False,
                )
            )
        self._consumer.start()
        self._heart.start()

    def stop(self) -> None:
        """Take nothing more, let what has begun end, and say goodbye."""
        with contextlib.suppress(DBAPIError), self._database.session() as session:
            if me := session.get(Worker, self.id):
                me.draining = True
        self._consumer.stop(self._settings.drain_s)
        self._ending.set()
        self._heart.join(timeout=5)
        self._queue.close()

    # --- grading -----------------------------------------------------------------------------

    def grade(self, submission_id: str) -> None:
        """Grade one submission and give it its report, unless it is final already."""
        with self._database.session() as session:
            submission = submissions.begin(session, submission_id, self.id)
            if submission is None:
                log.info("nothing to do", extra={"submission": submission_id})
                return
            code, attempt, slow = submissions.code_of(submission), submission.attempts, submission.slow
            [lab] = self._catalog.select([submission.lab])
        log.info("begun", extra={"submission": submission_id, "lab": lab.id, "attempt": attempt})
        created, started = datetime.now(UTC), time.monotonic()
        with _Batches(self._database, submission_id, attempt) as batches:
            report = grade_lab(
                self._catalog,
                lab,
                self._sandbox,
                code,
                slow=slow,
                cache=self._cache,
                on_event=batches.take,
            )
        document = self._document(created, time.monotonic() - started, report)
        with self._database.session() as session:
            counts = submissions.finish(session, submission_id, attempt, document)
        log.info(
            "graded" if counts else "graded in vain: another attempt or a cancellation came first",
            extra={"submission": submission_id, "lab": lab.id, "status": report.status.value},
        )

    def _document(self, created: datetime, seconds: float, report: LabReport) -> Report:
        return Report(
            created=created,
            code="submission",
            stack=self._stack,
            isolation=self._sandbox.isolation,
            machine=self._sandbox.machine,
            commit=None,
            seconds=seconds,
            labs=(report,),
        )

    # --- the heart -----------------------------------------------------------------------------

    def _beat(self) -> None:
        while not self._ending.wait(self._settings.heartbeat_s):
            try:
                with self._database.session() as session:
                    if me := session.get(Worker, self.id):
                        me.seen = now()
                requeue_lost(self._database, self._queue, self._settings)
            except DBAPIError as error:
                log.warning("the database does not answer: %s", error.orig)


def requeue_lost(database: Database, queue: WorkQueue, settings: Settings) -> list[str]:
    """Put back the work of workers that have been silent for too long; any program may do it at any time."""
    limit = now() - timedelta(seconds=settings.lost_after_s)
    with database.session() as session:
        lost = list(session.scalars(select(Worker.id).where(Worker.seen < limit)))

    def queue_of(submission_id: str) -> str | None:
        with database.session() as session:
            found = session.get(Submission, submission_id)
            return found.queue if found and found.state in (State.QUEUED, State.RUNNING) else None

    back = queue.requeue_of(lost, queue_of)
    for submission_id in back:
        log.warning("put back: its worker is lost", extra={"submission": submission_id})
    return back


class _Batches:
    """Writes a run's events, a few times a second, in a thread of its own."""

    def __init__(self, database: Database, submission_id: str, attempt: int) -> None:
        self._database, self._submission_id, self._attempt = database, submission_id, attempt
        self._waiting: list[tuple[str, dict[str, Any]]] = []
        self._lock, self._done = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._write, name="events", daemon=True)

    def __enter__(self) -> "_Batches":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def take(self, lab: Lab, event: Event) -> None:
        for found in _told(event):
            with self._lock:
                self._waiting.append(found)

    def _write(self) -> None:
        while True:
            last = self._done.wait(BATCH_S)
            with self._lock:
                events, self._waiting = self._waiting, []
            if events:
                with contextlib.suppress(DBAPIError), self._database.session() as session:
                    submissions.record(session, self._submission_id, self._attempt, events)
            if last:
                return


def _told(event: Event) -> Iterator[tuple[str, dict[str, Any]]]:
    """What watchers are told while the tests run: names, outcomes and messages."""
    # Tests marked slow that were not asked for are skipped, and no report knows them.
    if event["event"] == "test" and not event["message"].startswith("slow:"):
        outcome = Outcome.NOT_WRITTEN.value if event["not_written"] else event["outcome"]
        yield (
            "test",
            {
                "test": event["test"],
                "outcome": outcome,
                "seconds": event["seconds"],
                "message": event["message"],
            },
        )
