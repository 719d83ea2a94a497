"""What the pages show, gathered from catalogue and database. Templates only draw."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from statistics import median
from typing import TYPE_CHECKING, Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session, load_only

from grader.catalog import Chapter, Lab
from grader.service import records
from grader.service.dashboard.gauge import Gauge, gauge
from grader.service.dashboard.sessions import Visitor
from grader.service.hardware import needs_of
from grader.service.models import FINAL, Report, State, Submission, User, Worker
from grader.state import State as Checkout
from grader.state import StateUnusable

if TYPE_CHECKING:
    from grader.service.api import Service

WORDS = {
    "verified": "verified",
    "failed": "not yet right",
    "error": "could not run",
    "timeout": "ran out of time",
    "not_verified_here": "not verified here",
    "not_attempted": "to do",
    "queued": "waiting",
    "running": "running",
    "cancelled": "cancelled",
    "planned": "planned",
}
"""Each status in the words that pages use. The keys are also names of icons."""


@dataclass(frozen=True)
class Cell:
    """A lab and how far somebody is with it; `status` is a key of `WORDS`."""

    lab: Lab
    status: str

    @property
    def number(self) -> str:
        """Such as `1.1`."""
        return number(self.lab)


@dataclass(frozen=True)
class ChapterView:
    """A chapter, its labs, and the measurement its milestone has so far."""

    chapter: Chapter
    cells: tuple[Cell, ...]
    milestone: dict[str, Any] | None

    @property
    def verified(self) -> int:
        """How many of its labs are verified."""
        return sum(cell.status == "verified" for cell in self.cells)


@dataclass(frozen=True)
class CourseMap:
    """The whole course for one user."""

    phases: tuple[tuple[str, tuple[ChapterView, ...]], ...]
    next: Lab | None

    @property
    def chapters(self) -> tuple[ChapterView, ...]:
        """All chapters in order."""
        return tuple(chapter for _, chapters in self.phases for chapter in chapters)

    @property
    def cells(self) -> tuple[Cell, ...]:
        """All labs in order."""
        return tuple(cell for chapter in self.chapters for cell in chapter.cells)

    def count(self, status: str) -> int:
        """How many labs have a status."""
        return sum(cell.status == status for cell in self.cells)

    @property
    def milestones(self) -> int:
        """How many chapters' milestones are reached."""
        return sum(bool(c.milestone and c.milestone["reached"]) for c in self.chapters)


def number(lab: Lab) -> str:
    """Return a lab's number, such as `1.1`."""
    return f"{int(lab.chapter_id[2:])}.{int(lab.folder[3:5])}"


def chapter_of(service: "Service", lab: Lab) -> Chapter:
    """Return the chapter that a lab is in."""
    return next(chapter for chapter in service.catalog.chapters if chapter.id == lab.chapter_id)


def statuses(session: Session, service: "Service", visitor: Visitor) -> dict[str, str]:
    """Return the status of every lab; on one's own machine, what `topeka grade` verified counts too."""
    found = records.best(session, visitor.identity.user_id)
    if visitor.is_local:
        checkout = Checkout(service.catalog.root / ".topeka")
        try:
            by_command, verified = checkout.statuses(), checkout.verified()
        except StateUnusable:
            by_command, verified = {}, set()
        found = by_command | found | dict.fromkeys(verified, "verified")
    active = session.execute(
        select(Submission.lab, Submission.state).where(
            Submission.user_id == visitor.identity.user_id, Submission.state.not_in(FINAL)
        )
    )
    for lab, state in active:
        if found.get(lab) != "verified":
            found[lab] = state
    return {
        lab.id: "planned" if lab.planned else found.get(lab.id, "not_attempted")
        for lab in service.catalog.labs
    }


def course_map(session: Session, service: "Service", visitor: Visitor) -> CourseMap:
    """Return the course as `visitor` stands in it."""
    found = statuses(session, service, visitor)
    measured = _milestones(session, service, visitor.identity.user_id)
    chapters = [
        ChapterView(
            chapter, tuple(Cell(lab, found[lab.id]) for lab in chapter.labs), measured.get(chapter.id)
        )
        for chapter in service.catalog.chapters
    ]
    phases = tuple(
        (phase, tuple(group)) for phase, group in itertools.groupby(chapters, lambda c: c.chapter.phase)
    )
    todo = (lab for lab in service.catalog.labs if not lab.planned and found[lab.id] != "verified")
    return CourseMap(phases, next(todo, None))


def _milestones(session: Session, service: "Service", user_id: str) -> dict[str, dict[str, Any]]:
    """The measurement of each chapter's milestone: of the last verified submission, else of the last."""
    labs = {f"{c.id}/{c.milestone.lab[:5]}": c for c in service.catalog.chapters}
    chosen: dict[str, tuple[str, str | None]] = {}
    for lab, submission_id, status in session.execute(
        select(Submission.lab, Submission.id, Submission.status)
        .where(Submission.user_id == user_id, Submission.state == State.GRADED, Submission.lab.in_(labs))
        .order_by(Submission.finished)
    ):
        if status == "verified" or chosen.get(lab, ("", None))[1] != "verified":
            chosen[lab] = (submission_id, status)
    documents = session.execute(
        select(Submission.lab, Report.document)
        .join(Report, Report.submission_id == Submission.id)
        .where(Submission.id.in_([submission_id for submission_id, _ in chosen.values()]))
    )
    return {
        labs[lab].id: document["labs"][0]["milestones"][0]
        for lab, document in documents
        if document["labs"][0]["milestones"]
    }


# Submissions with their users' names.
_LISTED = select(Submission, User.name).join(User, User.id == Submission.user_id)


# --- one submission ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """A submission with its report, if it has one."""

    submission: Submission
    user: str
    title: str
    report: dict[str, Any] | None
    gauges: tuple[tuple[dict[str, Any], Gauge | None], ...] = ()
    by_outcome: Mapping[str, Sequence[dict[str, Any]]] = field(default_factory=dict)

    @property
    def status(self) -> str:
        """A key of `WORDS`."""
        return self.submission.status or self.submission.state

    @property
    def is_final(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.submission.state in FINAL

    @property
    def lab(self) -> dict[str, Any]:
        """The lab's part of the report."""
        assert self.report is not None
        found: dict[str, Any] = self.report["labs"][0]
        return found

    @property
    def hardware(self) -> str:
        """What it ran on, in one line."""
        assert self.report is not None
        machine = self.report["machine"]
        gpus = [gpu["name"] for gpu in machine["gpus"]]
        named = ", ".join(f"{len(list(same))} × {name}" for name, same in itertools.groupby(sorted(gpus)))
        libraries = [f"{name} {version}" for name, version in machine["libraries"].items() if name == "torch"]
        cores = f"{machine['cores']} cores of {machine['cpu_model']}"
        return ", ".join(part for part in (cores, named, *libraries) if part)


def result(session: Session, service: "Service", submission: Submission) -> Result:
    """Return what a page shows of one submission."""
    kept = session.get(Report, submission.id)
    user = session.get_one(User, submission.user_id).name
    lab = service.labs.get(submission.lab)
    title = lab.title if lab else submission.lab
    if kept is None:
        return Result(submission, user, title, None)
    graded = kept.document["labs"][0]
    grouped: dict[str, list[dict[str, Any]]] = {}
    for test in graded["tests"]:
        grouped.setdefault(test["outcome"], []).append(test)
    gauges = []
    for milestone in graded["milestones"]:
        # Reports spell what JSON has no number for, such as Infinity, as text.
        value, target = float(milestone["value"]), float(milestone["target"])
        shown = milestone | {"value": value, "target": target}
        gauges.append((shown, gauge(value, target, milestone["better"])))
    return Result(submission, user, title, kept.document, tuple(gauges), grouped)


def attempts(
    session: Session, user_id: str | None, lab: str | None, limit: int = 50
) -> list[tuple[Submission, str]]:
    """Return submissions with their users' names, the newest first; None stands for all."""
    query = _LISTED
    if user_id is not None:
        query = query.where(Submission.user_id == user_id)
    if lab is not None:
        query = query.where(Submission.lab == lab)
    rows = session.execute(query.order_by(Submission.created.desc(), Submission.id).limit(limit))
    return [(submission, name) for submission, name in rows]


# --- for instructors ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class QueueView:
    """What waits, what runs, what was done lately, and who works.

    Attributes:
        waiting: how many submissions wait, by queue.
        untaken: queues in which some wait and that no worker takes from, each with what a machine must have.
        oldest: since when the oldest waits.
        active: what waits or runs, each with whose it is.
        recent: what was graded lately, likewise.
        workers: each with whether it is alive.
        waited_s: how long submissions lately waited, the median.
        graded_s: how long they were graded, likewise.
    """

    waiting: dict[str, int]
    untaken: list[tuple[str, str]]
    oldest: datetime | None
    active: list[tuple[Submission, str]]
    recent: list[tuple[Submission, str]]
    workers: list[tuple[Worker, bool]]
    waited_s: float | None
    graded_s: float | None


def queue(session: Session, service: "Service") -> QueueView:
    """Return the state of queue and workers now."""
    waiting: dict[str, int] = dict.fromkeys((lab.stack for lab in service.catalog.labs), 0)
    counted = session.execute(
        select(Submission.queue, func.count())
        .where(Submission.state == State.QUEUED)
        .group_by(Submission.queue)
    ).tuples()
    waiting |= dict(counted.all())
    listed = _LISTED.limit(20)
    active = session.execute(
        listed.where(Submission.state.not_in(FINAL)).order_by(Submission.created)
    ).tuples()
    recent = session.execute(
        listed.where(Submission.state == State.GRADED).order_by(Submission.finished.desc())
    ).tuples()
    latest = session.scalars(
        select(Submission)
        .where(Submission.state == State.GRADED)
        .options(load_only(Submission.created, Submission.started, Submission.finished))
        .order_by(Submission.finished.desc())
        .limit(100)
    )
    times = [(s.started - s.created, s.finished - s.started) for s in latest if s.started and s.finished]
    workers = session.scalars(select(Worker).order_by(Worker.seen.desc())).all()
    lost_after_s = service.settings.lost_after_s
    untaken = [
        name
        for name, count in waiting.items()
        if count and not any(worker.takes_from(name, lost_after_s) for worker in workers)
    ]
    words = {needs.queue: needs.words for needs in map(needs_of, service.catalog.labs)}
    return QueueView(
        waiting=waiting,
        untaken=[(name, words.get(name, "")) for name in untaken],
        oldest=session.scalar(select(func.min(Submission.created)).where(Submission.state == State.QUEUED)),
        active=list(active),
        recent=list(recent),
        workers=[(worker, worker.is_alive(lost_after_s)) for worker in workers],
        waited_s=median(waited.total_seconds() for waited, _ in times) if times else None,
        graded_s=median(took.total_seconds() for _, took in times) if times else None,
    )


@dataclass(frozen=True)
class GradebookRow:
    """One user of the gradebook."""

    name: str
    labs: dict[str, str]

    @property
    def verified(self) -> int:
        """How many labs are verified."""
        return list(self.labs.values()).count("verified")


def gradebook(session: Session, sort: str, descending: bool) -> list[GradebookRow]:
    """Return the class.

    Args:
        session: a transaction.
        sort: `name`, `verified`, or the id of a lab: those who verified it, those who tried, the others.
        descending: the other way round.
    """
    rows = [GradebookRow(user.name, labs) for user, labs in records.gradebook(session)]

    def rank(row: GradebookRow) -> int:
        status = row.labs.get(sort)
        return 0 if status == "verified" else 1 if status else 2

    rows.sort(key=lambda row: row.name.casefold(), reverse=descending and sort == "name")
    if sort == "verified":
        rows.sort(key=lambda row: row.verified, reverse=descending)
    elif sort != "name":
        rows.sort(key=rank, reverse=descending)
    return rows
