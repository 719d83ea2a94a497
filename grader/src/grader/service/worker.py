"""Grades what waits in the queue. One submission at a time: a machine runs as many workers as it has room for.

Everything here may happen twice: a worker is killed after it graded and before it wrote the report, and the
next one grades again. Only `submissions.finish` decides, and it lets one report in.
"""

import contextlib
import contextvars
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import select
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from grader.catalog import Catalog, Lab
from grader.errors import TopekaError
from grader.expected import expected_tests
from grader.grading import grade_lab
from grader.machine import Machine, describe
from grader.report import LabReport, Outcome, Report, Status, Trust
from grader.runner.protocol import Event, Job
from grader.sandbox import Sandbox, SandboxFailed
from grader.service import logs, submissions
from grader.service.claim import Claim
from grader.service.database import Database
from grader.service.models import State, Submission, Worker, now
from grader.service.settings import Settings
from grader.service.work_queue import Consumer, WorkQueue

log = logging.getLogger("topeka.worker")

# Results reach watchers in batches: a test takes milliseconds, a transaction that reaches the disk as many.
BATCH_S = 0.2
# A sandbox that fails is usually not the code's fault: an engine was restarted, memory ran out.
SANDBOX_TRIES = 3
# Code that ends its worker each time must not do so for ever.
MAX_ATTEMPTS = 10

T = TypeVar("T")


class WorkerRefused(TopekaError):
    """This worker may not run; the message says why."""


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
        cache: Path | None = None,
        on_displaced: Callable[[], None] = lambda: None,
        on_graded: Callable[[str, Report], None] = lambda *_: None,
    ) -> None:
        """Set up; nothing is taken before `start`.

        Args:
            database: the service's.
            settings: for the heartbeat, the drain and the machine's name.
            catalog: the course, with the tests.
            sandbox: started; the caller closes it.
            queues: what this machine can verify.
            stack: of the sandbox.
            slot: number of this worker on its host.
            cache: for expected test sets.
            on_displaced: called, from another thread, when this worker must end since another has its id.
            on_graded: called with a submission's id and its report once that is the final one; raises nothing.
        """
        self._host = settings.worker_host or socket.gethostname()
        self.id = f"{self._host}/{slot}"
        self._database, self._settings, self._catalog = database, settings, catalog
        self._sandbox, self._stack, self._cache = sandbox, stack, cache
        self._queues, self._on_displaced, self._on_graded = tuple(queues), on_displaced, on_graded
        # Draining: take nothing more. Given up: what still runs is somebody else's from now on.
        self._draining, self._given_up, self._ending = threading.Event(), threading.Event(), threading.Event()
        self._well = threading.Event()  # not set while the sandbox does not work
        self._well.set()
        self._claim = Claim(database, self.id)
        self._queue = WorkQueue(database)
        self._consumer = Consumer(database, self.id, queues, self.grade)
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def warm(self) -> None:
        """Run something of our own in the sandbox, so that nobody waits for one that is cold, or does not work.

        Raises:
            SandboxFailed: it does not work.
        """
        lab = min((lab for lab in self._catalog.labs if not lab.planned), key=lambda lab: len(lab.preload))
        expected_tests(self._catalog, lab, lambda: self._sandbox, None)

    def start(self) -> None:
        """Announce this worker and begin.

        Raises:
            WorkerRefused: another worker has this id.
        """
        if not self._claim.take():
            raise WorkerRefused(
                f"a worker {self.id} is running already: give this one another number with --slot, or, if it is on "
                "another machine of the same name, set TOPEKA_WORKER_HOST to a name of its own"
            )
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
        """Take nothing more, let what has begun end within `drain_s`, put back what has not, and say goodbye."""
        self._draining.set()
        with contextlib.suppress(DBAPIError), self._database.session() as session:
            if me := session.get(Worker, self.id):
                me.draining = True
        self._consumer.stop(self._settings.drain_s)
        self._given_up.set()
        self._ending.set()
        self._heart.join(timeout=5)
        try:
            back = self._queue.requeue_of([self.id], lambda s: queue_of_unfinished(self._database, s))
            for submission_id in back:
                log.warning("put back: this worker ends", extra={"submission": submission_id})
            with self._database.session() as session:
                if me := session.get(Worker, self.id):
                    me.seen = now() - timedelta(seconds=self._settings.lost_after_s)
        except DBAPIError as error:
            log.warning("the database does not answer; others will find what is left: %s", error.orig)
        self._claim.release()
        self._queue.close()

    # --- grading -----------------------------------------------------------------------------

    def grade(self, submission_id: str) -> None:
        """Grade one submission and give it its report, unless it is final already. Raises nothing."""
        with logs.about(submission_id):
            try:
                self._grade(submission_id)
            except Exception:
                if self._given_up.is_set():
                    log.info("cut off by the end of the worker; another begins again", exc_info=True)
                    return
                # The queue forgets work that raises. `mend` finds the submission and queues it again.
                log.exception("grading failed in a way that nobody thought of")

    def _grade(self, submission_id: str) -> None:
        if self._draining.is_set():
            # Taken from one queue while another's work was still running; nothing new begins now.
            if queue := queue_of_unfinished(self._database, submission_id):
                self._queue.put_back(submission_id, queue)
            return
        for tries_left in reversed(range(SANDBOX_TRIES)):
            begun = self._patiently(lambda session: self._begin(session, submission_id))
            if begun is None:
                log.info("nothing to do: it is final already")
                return
            log.info("begun", extra={"lab": begun.lab, "attempt": begun.attempt})
            created, started = datetime.now(UTC), time.monotonic()
            report, broken = self._report(begun, submission_id)
            if self._given_up.is_set():
                log.warning("given up: the time to drain is over")
                return
            if broken and tries_left:
                log.warning("the sandbox failed: %s; trying again", report.reason)
                self._wait_until_well()
                continue
            document = self._document(created, time.monotonic() - started, report)
            counts = self._patiently(partial(self._finish, submission_id, begun.attempt, document))
            if counts:
                self._on_graded(submission_id, document)
            log.info(
                "graded" if counts else "graded in vain: another attempt or a cancellation came first",
                extra={
                    "lab": begun.lab,
                    "status": report.status.value,
                    "seconds": round(time.monotonic() - started, 3),
                },
            )
            return

    def _begin(self, session: Session, submission_id: str) -> "_Begun | None":
        submission = submissions.begin(session, submission_id, self.id)
        if submission is None:
            return None
        return _Begun(submission.lab, submissions.code_of(submission), submission.attempts, submission.slow)

    @staticmethod
    def _finish(submission_id: str, attempt: int, document: Report, session: Session) -> bool:
        return submissions.finish(session, submission_id, attempt, document)

    def _report(self, begun: "_Begun", submission_id: str) -> tuple[LabReport, bool]:
        """Return the report, and whether the sandbox failed rather than the code."""
        lab = next((lab for lab in self._catalog.labs if lab.id == begun.lab), None)
        if lab is None:
            reason = f"the course on {self.id} has no lab {begun.lab}: grade it again once all workers are upgraded"
            return LabReport(lab=begun.lab, title=begun.lab, status=Status.ERROR, reason=reason), False
        if begun.attempt > MAX_ATTEMPTS:
            reason = (
                f"given up: {MAX_ATTEMPTS} attempts to grade this ended with the end of the worker; "
                "its log and the machine's say why"
            )
            return LabReport(lab=lab.id, title=lab.title, status=Status.ERROR, reason=reason), False
        observed = _Observed(self._sandbox)
        with _Batches(self._database, submission_id, begun.attempt) as batches:
            report = grade_lab(
                self._catalog,
                lab,
                observed,
                begun.code,
                slow=begun.slow,
                trust=self._settings.trust if lab.strict else Trust.SAME_PROCESS,
                cache=self._cache,
                job_id=submission_id,
                on_event=batches.take,
            )
        return report, observed.failed

    def _wait_until_well(self) -> None:
        """Wait until the sandbox runs something of our own.

        Meanwhile the heart is silent: a worker that cannot grade is as good as a lost one, so what it has
        begun goes to others.
        """
        delay = 0.5
        while not self._given_up.is_set():
            try:
                self.warm()
            except SandboxFailed as error:
                self._well.clear()
                log.warning("the sandbox does not work: %s", error)
            else:
                self._well.set()
                return
            self._given_up.wait(delay)
            delay = min(2 * delay, 10.0)

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

    def _patiently(self, change: Callable[[Session], T]) -> T:
        """Make a change in one transaction, again and again until the database answers."""
        delay = 0.1
        while True:
            try:
                with self._database.session() as session:
                    return change(session)
            except (OperationalError, InterfaceError, PoolTimeout) as error:
                log.warning("the database does not answer; trying again: %s", error)
                if self._given_up.wait(delay):
                    raise
                delay = min(2 * delay, 2.0)

    # --- the heart -----------------------------------------------------------------------------

    def _beat(self) -> None:
        answers_since: float | None = None
        while not self._ending.wait(self._settings.heartbeat_s):
            try:
                if not self._claim.keep():
                    log.error("another worker has taken the id %s; this one ends", self.id)
                    self._on_displaced()
                    return
                if not self._well.is_set():
                    continue
                with self._database.session() as session:
                    if me := session.get(Worker, self.id):
                        me.seen = now()
                if self._settings.alive_file:
                    self._settings.alive_file.touch()
                # After a pause of the database everybody looks lost, until they have had time to say otherwise.
                answers_since = answers_since or time.monotonic()
                if time.monotonic() - answers_since > 2 * self._settings.heartbeat_s:
                    requeue_lost(self._database, self._queue, self._settings)
            except (DBAPIError, PoolTimeout) as error:
                answers_since = None
                log.warning("the database does not answer: %s", error)
            except Exception:
                # A worker whose heart has stopped would be taken for lost while it grades.
                log.exception("a heartbeat failed")


@dataclass(frozen=True)
class _Begun:
    """What an attempt starts from."""

    lab: str
    code: dict[str, bytes]
    attempt: int
    slow: bool


class _Observed:
    """A sandbox that tells afterwards whether it failed, which a report does not."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox, self.failed = sandbox, False
        self.isolation = sandbox.isolation

    @property
    def machine(self) -> Machine:
        return self._sandbox.machine

    def run(self, job: Job, tar: bytes) -> Iterator[Event]:
        try:
            yield from self._sandbox.run(job, tar)
        except SandboxFailed:
            self.failed = True
            raise

    def close(self) -> None:
        """Leave it to its owner."""


def queue_of_unfinished(database: Database, submission_id: str) -> str | None:
    """Return where a submission belongs; None if it is final, or there is none."""
    with database.session() as session:
        found = session.get(Submission, submission_id)
        return found.queue if found and found.state in (State.QUEUED, State.RUNNING) else None


def requeue_lost(database: Database, queue: WorkQueue, settings: Settings) -> list[str]:
    """Put back the work of workers that have been silent for too long; any program may do it at any time."""
    limit = now() - timedelta(seconds=settings.lost_after_s)
    with database.session() as session:
        lost = list(session.scalars(select(Worker.id).where(Worker.seen < limit)))
    back = queue.requeue_of(lost, lambda submission_id: queue_of_unfinished(database, submission_id))
    for submission_id in back:
        log.warning("put back: its worker is lost", extra={"submission": submission_id})
    return back


class _Batches:
    """Writes a run's events, a few times a second, in a thread of its own."""

    def __init__(self, database: Database, submission_id: str, attempt: int) -> None:
        self._database, self._submission_id, self._attempt = database, submission_id, attempt
        self._waiting: list[tuple[str, dict[str, Any]]] = []
        self._lock, self._done = threading.Lock(), threading.Event()
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=lambda: context.run(self._write), name="events", daemon=True)

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
                try:
                    with self._database.session() as session:
                        submissions.record(session, self._submission_id, self._attempt, events)
                except (DBAPIError, PoolTimeout) as error:
                    # Watchers see them late, or not at all; the report has everything.
                    log.warning("events wait for the database: %s", error)
                    with self._lock:
                        self._waiting = events + self._waiting
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
