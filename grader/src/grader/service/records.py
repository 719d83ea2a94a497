"""What users may see, and how far they are: the same for the API and for the dashboard."""

from collections.abc import Iterable

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from grader.service.accounts import Identity
from grader.service.models import Role, State, Submission, User
from grader.service.problems import Problem


def visible(session: Session, asker: Identity, submission_id: str) -> Submission:
    """Return a submission that `asker` may see.

    Raises:
        Problem: there is none, or it is somebody else's and the asker does not teach: for them there is none.
    """
    found = session.get(Submission, submission_id)
    if found is None or (found.user_id != asker.user_id and not asker.teaches):
        raise Problem(404, f"there is no submission {submission_id}")
    return found


def best(session: Session, user_id: str) -> dict[str, str]:
    """Return the best status of each lab: verified if it ever was, otherwise the last."""
    return _best(
        session.execute(
            select(Submission.lab, Submission.status)
            .where(Submission.user_id == user_id, Submission.state == State.GRADED)
            .order_by(Submission.finished)
        ).tuples()
    )


def gradebook(session: Session) -> list[tuple[User, dict[str, str]]]:
    """Return every learner, and whoever else has submitted, by name, with their best status of every lab."""
    submitted = select(Submission.user_id).distinct()
    users = session.scalars(
        select(User).where(or_(User.role == Role.LEARNER, User.id.in_(submitted))).order_by(User.name)
    ).all()
    results: dict[str, list[tuple[str, str | None]]] = {user.id: [] for user in users}
    for user_id, lab, status in session.execute(
        select(Submission.user_id, Submission.lab, Submission.status)
        .where(Submission.state == State.GRADED)
        .order_by(Submission.finished)
    ):
        if user_id in results:  # who came between the two queries is in the next answer
            results[user_id].append((lab, status))
    return [(user, _best(results[user.id])) for user in users]


def _best(results: Iterable[tuple[str, str | None]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for lab, status in results:
        if status is not None and found.get(lab) != "verified":
            found[lab] = status
    return found
