"""Why a submission still waits: what it needs, who takes such work, and how many are before it."""

from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from grader.catalog import Lab
from grader.service.hardware import needs_of
from grader.service.models import State, Submission, Worker
from grader.service.settings import Settings


@dataclass(frozen=True)
class Waiting:
    """What a submission waits for.

    Attributes:
        needs: what a machine must have to verify the lab, in words; empty if any machine can.
        workers: alive, and taking such work.
        ahead: how many submissions of its queue are before it.
    """

    needs: str
    workers: int
    ahead: int


def waiting(session: Session, submission: Submission, lab: Lab | None, settings: Settings) -> Waiting | None:
    """Return what a submission waits for; None unless it waits.

    Args:
        session: a transaction.
        submission: the submission.
        lab: its lab; None if the course has it no more.
        settings: of the service.
    """
    if submission.state != State.QUEUED:
        return None
    ahead = session.scalar(
        select(func.count())
        .select_from(Submission)
        .where(
            Submission.state == State.QUEUED,
            Submission.queue == submission.queue,
            Submission.created < submission.created,
        )
    )
    workers = session.scalars(select(Worker))
    takers = sum(worker.takes_from(submission.queue, settings.lost_after_s) for worker in workers)
    return Waiting(needs_of(lab).words if lab else "", takers, ahead or 0)
