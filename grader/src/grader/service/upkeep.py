"""What a running service needs done from time to time: old things deleted, stranded ones queued again."""

import logging
import threading
import time
from datetime import timedelta

from sqlalchemy import delete, select, update
from sqlalchemy.exc import DBAPIError

from grader.catalog import Catalog
from grader.service.database import Database
from grader.service.hardware import queue_of
from grader.service.models import FINAL, Duplicate, State, Submission, Worker, now
from grader.service.settings import Settings
from grader.service.work_queue import WorkQueue

log = logging.getLogger("topeka.upkeep")

MEND_EVERY_S, RETAIN_EVERY_S = 60.0, 3600.0
# Few enough that nobody waits long for a lock.
_CHUNK = 200


def retain(database: Database, queue: WorkQueue, keep_days: float) -> int:
    """Delete submissions that were final `keep_days` ago, with reports, events and what the queue knows of them.

    Unfinished ones stay, however old. So does a submission whose re-grade is younger.

    Returns:
        how many submissions were deleted.
    """
    limit, deleted = now() - timedelta(days=keep_days), 0
    while True:
        with database.session() as session:
            old = list(
                session.scalars(
                    select(Submission.id)
                    .where(Submission.state.in_(FINAL), Submission.finished < limit)
                    .order_by(Submission.finished)
                    .limit(_CHUNK)
                )
            )
        if not old:
            break
        # The queue's rows first: were they left over, nobody would find them again.
        queue.forget(old)
        with database.session() as session:
            session.execute(delete(Submission).where(Submission.id.in_(old)))  # the rest goes with them
        deleted += len(old)
    with database.session() as session:
        session.execute(delete(Duplicate).where(Duplicate.created < limit))
        session.execute(delete(Worker).where(Worker.seen < limit))
    return deleted


def mend(database: Database, queue: WorkQueue, catalog: Catalog) -> list[str]:
    """Queue again what waits where nobody will find it; returns the ids.

    That is a submission without work in the queue, since its work ended by an error that nobody thought of, and
    one on a queue that an upgrade of the course has renamed.
    """
    limit = now() - timedelta(seconds=MEND_EVERY_S)
    with database.session() as session:
        waiting = list(
            session.scalars(
                select(Submission)
                .where(Submission.state.in_((State.QUEUED, State.RUNNING)), Submission.created < limit)
                .order_by(Submission.created)
                .limit(10_000)
            )
        )
    labs = {lab.id: lab for lab in catalog.labs}
    mended = []
    for start in range(0, len(waiting), _CHUNK):
        chunk = waiting[start : start + _CHUNK]
        stranded = queue.ended([found.id for found in chunk])
        for found in chunk:
            right = queue_of(labs[found.lab]) if found.lab in labs else found.queue
            if found.id in stranded:
                queue.forget([found.id])
                with database.session() as session:
                    unfinished = session.execute(
                        update(Submission)
                        .where(Submission.id == found.id, Submission.state.in_((State.QUEUED, State.RUNNING)))
                        .values(queue=right)
                        .returning(Submission.id)
                    ).first()
                    if unfinished:
                        queue.put(session, found.id, right)
            elif found.state == State.QUEUED and found.queue != right:
                queue.put_back(found.id, right)
                with database.session() as session:
                    session.execute(update(Submission).where(Submission.id == found.id).values(queue=right))
            else:
                continue
            mended.append(found.id)
            log.warning("queued again: nobody would have found it", extra={"submission": found.id})
    return mended


class Upkeep:
    """Does both in a thread of the server's; several servers may do so at once."""

    def __init__(self, database: Database, queue: WorkQueue, catalog: Catalog, settings: Settings) -> None:
        self._database, self._queue, self._catalog = database, queue, catalog
        self._settings = settings
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="upkeep", daemon=True)

    def start(self) -> None:
        """Begin; the first round comes at once."""
        self._thread.start()

    def stop(self) -> None:
        """End, after the round that runs."""
        self._ending.set()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        retained = -RETAIN_EVERY_S
        while True:
            try:
                mend(self._database, self._queue, self._catalog)
                if self._settings.keep_days and time.monotonic() - retained > RETAIN_EVERY_S:
                    count = retain(self._database, self._queue, self._settings.keep_days)
                    retained = time.monotonic()
                    log.info("deleted what was too old", extra={"submissions": count})
            except DBAPIError as error:
                log.warning("the database does not answer: %s", error.orig)
            except Exception:
                # A thread that ended here would be missed by nobody until the disk is full; the next round tries again.
                log.exception("upkeep failed")
            if self._ending.wait(MEND_EVERY_S):
                return
