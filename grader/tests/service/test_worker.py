"""One worker, in this process: what it does with work that cannot end well, and when another takes its place."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from grader.catalog import Catalog
from grader.sandbox.local import LocalSandbox
from grader.service.claim import Claim
from grader.service.database import Database
from grader.service.models import Report, State, Submission, Worker
from grader.service.serve import open_database
from grader.service.settings import Settings
from grader.service.worker import MAX_ATTEMPTS, GradingWorker
from sqlalchemy import text, update

from .conftest import RIGHT
from .own import submit, until

MakeWorker = Callable[..., GradingWorker]


@pytest.fixture
def worker_on(course: Catalog, sandbox: LocalSandbox) -> Iterator[Callable[..., GradingWorker]]:
    """`worker_on(database, ...)`: the worker north/0, not started; there can be one at a time."""
    made: list[GradingWorker] = []

    def make(database: Database, **options: Any) -> GradingWorker:
        settings = Settings(database_url=database.url, heartbeat_s=1, worker_host="north")
        made.append(
            GradingWorker(database, settings, course, sandbox, queues=["cpu"], stack="cpu", **options)
        )
        return made[-1]

    yield make
    for worker in made:
        worker._consumer.stop(0)


def test_code_that_has_ended_its_worker_ten_times_is_given_up_and_not_run_again(
    course: Catalog, database: Database, worker_on: MakeWorker, tmp_path: Path
):
    ran = tmp_path / "ran"
    source = RIGHT + f"\nopen({str(ran)!r}, 'w').close()\n"
    worker = worker_on(database)
    for attempts, state, expected in ((MAX_ATTEMPTS - 1, "verified", True), (MAX_ATTEMPTS, "error", False)):
        submission_id = submit(database, course.labs[0], source + "#" * attempts)
        with database.session() as session:
            session.execute(
                update(Submission)
                .where(Submission.id == submission_id)
                .values(attempts=attempts, state=State.RUNNING)
            )
        worker.grade(submission_id)
        with database.session() as session:
            assert session.get_one(Submission, submission_id).status == state
            report = session.get_one(Report, submission_id).document["labs"][0]
        assert ran.exists() is expected
        ran.unlink(missing_ok=True)
    assert report["reason"].startswith("given up: 10 attempts to grade this ended with the end of the worker")


def test_a_submission_of_a_lab_this_course_does_not_have_says_so(
    course: Catalog, database: Database, worker_on: MakeWorker
):
    submission_id = submit(database, course.labs[0])
    with database.session() as session:
        session.execute(update(Submission).values(lab="ch09/lab07"))
    worker_on(database).grade(submission_id)
    with database.session() as session:
        [report] = session.get_one(Report, submission_id).document["labs"]
    assert report["status"] == "error"
    assert report["reason"].startswith("the course on north/0 has no lab ch09/lab07: grade it again")


def test_a_worker_whose_id_was_taken_while_it_was_cut_off_ends_itself(url: str, worker_on: MakeWorker):
    database = open_database(Settings(database_url=url))
    displaced = threading.Event()
    worker = worker_on(database, on_displaced=displaced.set)
    worker.start()
    try:
        # Its connection is cut, and before its next heartbeat another program claims the id.
        other = Claim(database, "north/0")
        with database.session() as session:
            session.execute(
                text(
                    "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted "
                    "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
                )
            )
        until(other.take, within_s=5)
        assert displaced.wait(10)
        with database.session() as session:
            seen = session.get_one(Worker, "north/0").seen
        time.sleep(2)
        with database.session() as session:
            assert session.get_one(Worker, "north/0").seen == seen, "its heart has stopped"
        other.release()
    finally:
        worker.stop()
        database.close()
