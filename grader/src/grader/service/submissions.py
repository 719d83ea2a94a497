"""Every change of a submission's state.

A submission is queued, then running, then graded; until it is graded it may be cancelled. Each change is one
UPDATE that names the states it may start from, so that of two who try only one succeeds, whatever
dies in between. Events are numbered from 1 within a submission.
"""

import hashlib
import io
import tarfile
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any, cast

from sqlalchemy import CursorResult, func, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from grader.catalog import Lab
from grader.errors import UsageError
from grader.report import Report as GradingReport
from grader.service.models import Duplicate, Event, Report, State, Submission, Worker, new_id, now
from grader.submission import MAX_FILE_BYTES


class RefusedSubmission(UsageError):
    """The code cannot be taken; the message says why."""


def check_code(lab: Lab, code: Mapping[str, bytes]) -> None:
    """Refuse what is no submission for this lab.

    Raises:
        RefusedSubmission: no file, one that the lab does not list, one that is too large.
    """
    if lab.planned:
        raise RefusedSubmission(f"{lab.id} is planned and not yet written")
    if not code:
        raise RefusedSubmission(f"no file was sent; {lab.id} has {', '.join(lab.files)}")
    if strangers := sorted(code.keys() - set(lab.files)):
        raise RefusedSubmission(f"{lab.id} has {', '.join(lab.files)}; it takes no {', '.join(strangers)}")
    for name, content in code.items():
        if len(content) > MAX_FILE_BYTES:
            raise RefusedSubmission(
                f"{name} has {len(content):,} bytes; a source file may have {MAX_FILE_BYTES:,}"
            )


def submit(
    session: Session,
    user_id: str,
    lab: Lab,
    queue: str,
    code: Mapping[str, bytes],
    *,
    slow: bool,
    duplicate_window_s: float,
    enqueue: Callable[[str, str], None],
    regrade_of: str | None = None,
) -> tuple[Submission, bool]:
    """Accept code, in one transaction with its place in the queue: both are there, or neither.

    Args:
        session: the transaction.
        user_id: whose code it is.
        lab: for which lab; `check_code` has seen the code.
        queue: where it waits.
        code: source files by name.
        slow: whether tests marked slow run too.
        duplicate_window_s: for so long the same code for the same lab is the same submission.
        enqueue: called with the submission's id and the queue, to put it there by this transaction.
        regrade_of: the submission that is graded again; never a duplicate.

    Returns:
        the submission, and whether it is new.
    """
    digest = hashlib.sha256(b"".join(_framed(name, code[name]) for name in sorted(code))).hexdigest()
    digest = hashlib.sha256(f"{digest} slow={slow}".encode()).hexdigest()
    moment, submission_id = now(), new_id()
    submission = Submission(
        id=submission_id,
        user_id=user_id,
        lab=lab.id,
        stack=lab.stack,
        queue=queue,
        slow=slow,
        digest=digest,
        code=_tar(code),
        regrade_of=regrade_of,
        created=moment,
    )
    session.add(submission)
    session.flush()
    if regrade_of is None:
        # One statement decides, so that two requests at once get the same answer.
        dialect = postgresql if session.get_bind().dialect.name == "postgresql" else sqlite
        mine = {"submission_id": submission_id, "created": moment}
        claim = dialect.insert(Duplicate).values(user_id=user_id, lab=lab.id, digest=digest, **mine)
        claim = claim.on_conflict_do_update(
            index_elements=["user_id", "lab", "digest"],
            set_=mine,
            where=Duplicate.created < moment - timedelta(seconds=duplicate_window_s),
        )
        session.execute(claim)
        first = session.get_one(Duplicate, (user_id, lab.id, digest), populate_existing=True).submission_id
        if first != submission_id:
            session.delete(submission)
            session.flush()
            return session.get_one(Submission, first), False
    _append(session, submission_id, [("queued", {"queue": queue})])
    enqueue(submission_id, queue)
    return submission, True


def begin(session: Session, submission_id: str, worker_id: str) -> Submission | None:
    """Say that a worker grades the submission now; None if it is final already.

    A running one may begin again: its worker was lost, or grades it for the second time after a restart.
    """
    row = _change(
        session,
        submission_id,
        (State.QUEUED, State.RUNNING),
        state=State.RUNNING,
        worker_id=worker_id,
        started=now(),
        attempts=Submission.attempts + 1,
    )
    if row:
        submission = session.get_one(Submission, submission_id, populate_existing=True)
        _append(session, submission_id, [("started", {"worker": worker_id, "attempt": submission.attempts})])
        return submission
    return None


def record(
    session: Session, submission_id: str, attempt: int, events: Iterable[tuple[str, dict[str, Any]]]
) -> bool:
    """Append events of a running attempt; False if another attempt has taken over, or it was cancelled."""
    current = session.execute(
        select(Submission.id)
        .where(
            Submission.id == submission_id,
            Submission.attempts == attempt,
            Submission.state == State.RUNNING,
        )
        .with_for_update()
    ).first()
    if current is None:
        return False
    _append(session, submission_id, events)
    return True


def finish(session: Session, submission_id: str, attempt: int, report: GradingReport) -> bool:
    """Give the submission its report; False if it has one, was cancelled, or another attempt took over."""
    [lab] = report.labs
    if not _change(
        session,
        submission_id,
        (State.RUNNING,),
        Submission.attempts == attempt,
        state=State.GRADED,
        finished=now(),
        status=lab.status.value,
        passed=lab.passed,
        tests=len(lab.tests),
    ):
        return False
    session.add(Report(submission_id=submission_id, document=report.model_dump(mode="json")))
    session.execute(
        update(Worker)
        .where(
            Worker.id == select(Submission.worker_id).where(Submission.id == submission_id).scalar_subquery()
        )
        .values(graded=Worker.graded + 1)
    )
    _append(
        session,
        submission_id,
        [("graded", {"status": lab.status.value, "passed": lab.passed, "tests": len(lab.tests)})],
    )
    return True


def cancel(session: Session, submission_id: str) -> bool:
    """End a submission that is not graded yet; False if it is final already."""
    if _change(session, submission_id, (State.QUEUED, State.RUNNING), state=State.CANCELLED, finished=now()):
        _append(session, submission_id, [("cancelled", {})])
        return True
    return False


def code_of(submission: Submission) -> dict[str, bytes]:
    """Return the submitted files by name."""
    with tarfile.open(fileobj=io.BytesIO(submission.code)) as tar:
        return {m.name: cast("io.BufferedReader", tar.extractfile(m)).read() for m in tar.getmembers()}


def events_after(session: Session, submission_id: str, number: int, limit: int = 500) -> list[Event]:
    """Return the events behind event `number`, in order."""
    return list(
        session.scalars(
            select(Event)
            .where(Event.submission_id == submission_id, Event.number > number)
            .order_by(Event.number)
            .limit(limit)
        )
    )


def _change(
    session: Session, submission_id: str, before: tuple[State, ...], *conditions: Any, **values: Any
) -> bool:
    result = session.execute(
        update(Submission)
        .where(Submission.id == submission_id, Submission.state.in_(before), *conditions)
        .values(**values)
    )
    return bool(cast("CursorResult[Any]", result).rowcount)


def _append(session: Session, submission_id: str, events: Iterable[tuple[str, dict[str, Any]]]) -> None:
    last = session.scalar(select(func.max(Event.number)).where(Event.submission_id == submission_id)) or 0
    rows = [
        {"submission_id": submission_id, "number": number, "kind": kind, "data": data, "created": now()}
        for number, (kind, data) in enumerate(events, last + 1)
    ]
    if rows:
        session.execute(insert(Event), rows)


def _tar(code: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in sorted(code):
            entry = tarfile.TarInfo(name)
            entry.size = len(code[name])
            tar.addfile(entry, io.BytesIO(code[name]))
    return buffer.getvalue()


def _framed(name: str, content: bytes) -> bytes:
    return f"{name}\0{len(content)}\0".encode() + content
