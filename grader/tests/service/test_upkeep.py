"""Retention, and work that would have been stranded."""

from datetime import timedelta

import pytest
from grader.catalog import Catalog
from grader.report import LabReport, Status
from grader.report import Report as GradingReport
from grader.sandbox.local import LocalSandbox
from grader.service import submissions
from grader.service.database import Database
from grader.service.models import Duplicate, Event, Report, State, Submission, now
from grader.service.upkeep import mend, retain
from grader.service.work_queue import WorkQueue
from sqlalchemy import func, select, update

from .own import submit


@pytest.fixture
def queue(database: Database):
    opened = WorkQueue(database)
    yield opened
    opened.close()


def grade(database: Database, submission_id: str, days_ago: float) -> None:
    """Give the submission a report, as if so long ago."""
    sandbox = LocalSandbox()
    report = GradingReport(
        created=now(),
        code="submission",
        stack="cpu",
        isolation=sandbox.isolation,
        machine=sandbox.machine,
        commit=None,
        seconds=1,
        labs=(LabReport(lab="ch01/lab01", title="", status=Status.VERIFIED, reason=""),),
    )
    moment = now() - timedelta(days=days_ago)
    with database.session() as session:
        begun = submissions.begin(session, submission_id, "north/0")
        assert begun is not None
        assert submissions.finish(session, submission_id, begun.attempts, report)
        session.execute(update(Submission).where(Submission.id == submission_id).values(finished=moment))
        session.execute(
            update(Duplicate).where(Duplicate.submission_id == submission_id).values(created=moment)
        )


def rows(database: Database) -> dict[str, int]:
    with database.session() as session:
        return {
            table.__tablename__: session.scalar(select(func.count()).select_from(table)) or 0
            for table in (Submission, Report, Event, Duplicate)
        }


def test_what_is_older_is_deleted_and_what_is_not_finished_stays(
    course: Catalog, database: Database, queue: WorkQueue
):
    old, young, waiting = (submit(database, course.labs[0], name=name, days_ago=100) for name in "abc")
    grade(database, old, days_ago=31)
    grade(database, young, days_ago=29)
    before = rows(database)
    assert (before["submissions"], before["reports"], before["duplicates"]) == (3, 2, 3)
    assert retain(database, queue, keep_days=30) == 1
    with database.session() as session:
        assert set(session.scalars(select(Submission.id))) == {young, waiting}
        assert set(session.scalars(select(Event.submission_id))) == {young, waiting}
        assert set(session.scalars(select(Report.submission_id))) == {young}
        assert set(session.scalars(select(Duplicate.submission_id))) == {young, waiting}
    assert queue.ended([old, young, waiting]) == {old}, "the queue has forgotten the old one only"
    assert retain(database, queue, keep_days=30) == 0


def test_many_old_ones_go_in_small_steps(course: Catalog, database: Database, queue: WorkQueue, monkeypatch):
    monkeypatch.setattr("grader.service.upkeep._CHUNK", 2)
    for n in range(5):
        grade(database, submit(database, course.labs[0], name=f"learner {n}"), days_ago=2)
    assert retain(database, queue, keep_days=1) == 5
    assert set(rows(database).values()) == {0}


def test_work_that_the_queue_has_lost_is_queued_again(course: Catalog, database: Database, queue: WorkQueue):
    lost, there, fresh = (
        submit(database, course.labs[0], name=name, days_ago=days)
        for name, days in (("a", 1), ("b", 1), ("c", 0))
    )
    queue.forget([lost, fresh])
    assert mend(database, queue, course) == [lost], "one that was just submitted is given time"
    assert queue.ended([lost, there]) == set()
    assert queue.depth() == {"cpu": 2}
    assert mend(database, queue, course) == []


def test_a_queue_that_an_upgrade_has_renamed_is_not_a_trap(
    course: Catalog, database: Database, queue: WorkQueue
):
    trapped = submit(database, course.labs[0], days_ago=1, queue="cpu-6g")
    assert queue.depth() == {"cpu-6g": 1}
    assert mend(database, queue, course) == [trapped]
    assert queue.depth() == {"cpu": 1}
    with database.session() as session:
        found = session.get_one(Submission, trapped)
        assert (found.queue, found.state) == ("cpu", State.QUEUED)
