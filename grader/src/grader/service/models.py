"""The tables. Times are UTC; SQLite gives them back without a zone, so `UtcTime` puts it on again."""

import enum
import uuid
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    LargeBinary,
    String,
    TypeDecorator,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class UtcTime(TypeDecorator[datetime]):
    """A moment; aware in Python, UTC in the database."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Refuse a time without a zone, and store the moment in UTC."""
        if value is not None and value.tzinfo is None:
            raise ValueError("a time without a zone is not a moment")
        return value and value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Return the moment with its zone."""
        if value is not None and value.tzinfo is None:
            return value.replace(tzinfo=UTC)
        return value


def now() -> datetime:
    """Return this moment."""
    return datetime.now(UTC)


def new_id() -> str:
    """Return an id that nobody can guess."""
    return uuid.uuid4().hex


class Role(enum.StrEnum):
    """What a user may see: their own work, or the class's."""

    LEARNER = "learner"
    INSTRUCTOR = "instructor"


class State(enum.StrEnum):
    """Where a submission is. The last three are final: nothing leaves them."""

    QUEUED = "queued"
    RUNNING = "running"
    GRADED = "graded"
    CANCELLED = "cancelled"


FINAL = (State.GRADED, State.CANCELLED)


class Base(DeclarativeBase):
    """What all tables have in common."""

    type_annotation_map = {datetime: UtcTime, dict[str, Any]: JSON}  # noqa: RUF012 (SQLAlchemy reads it so)


class User(Base):
    """Somebody who submits or teaches."""

    __tablename__ = "users"

    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=new_id)
    name: Mapped[str] = mapped_column(String(200), unique=True)
    role: Mapped[str] = mapped_column(String(20))
    created: Mapped[datetime] = mapped_column(default=now)


class Token(Base):
    """What a user shows to be recognised. Only its SHA-256 is kept: the token itself has 256 random bits."""

    __tablename__ = "tokens"

    id: Mapped[str] = mapped_column(String(12), primary_key=True)
    user_id: Mapped[str] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), index=True)
    digest: Mapped[str] = mapped_column(String(64))
    created: Mapped[datetime] = mapped_column(default=now)
    revoked: Mapped[datetime | None]


class Submission(Base):
    """One learner's code for one lab, handed in once."""

    __tablename__ = "submissions"
    __table_args__ = (
        Index("ix_submissions_user_lab", "user_id", "lab", "created"),
        Index("ix_submissions_state", "state", "stack"),
    )

    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=new_id)
    user_id: Mapped[str] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"))
    lab: Mapped[str] = mapped_column(String(40))
    stack: Mapped[str] = mapped_column(String(20))
    queue: Mapped[str] = mapped_column(String(40))
    slow: Mapped[bool] = mapped_column(default=False)
    digest: Mapped[str] = mapped_column(String(64))
    code: Mapped[bytes] = mapped_column(
        LargeBinary, deferred=True
    )  # read where it is needed, not by every look
    state: Mapped[str] = mapped_column(String(20), default=State.QUEUED)
    regrade_of: Mapped[str | None] = mapped_column(ForeignKey("submissions.id", ondelete="SET NULL"))
    worker_id: Mapped[str | None] = mapped_column(String(200))
    attempts: Mapped[int] = mapped_column(default=0)
    created: Mapped[datetime] = mapped_column(default=now, index=True)
    started: Mapped[datetime | None]
    finished: Mapped[datetime | None]
    status: Mapped[str | None] = mapped_column(String(30))
    passed: Mapped[int | None]
    tests: Mapped[int | None]


class Report(Base):
    """A submission's one final report: the primary key makes a second one impossible."""

    __tablename__ = "reports"

    submission_id: Mapped[str] = mapped_column(
        ForeignKey("submissions.id", ondelete="CASCADE"), primary_key=True
    )
    document: Mapped[dict[str, Any]]
    created: Mapped[datetime] = mapped_column(default=now)


class Event(Base):
    """Something that happened to a submission, in order; what a page that reconnects asks for again."""

    __tablename__ = "events"
    __table_args__ = (UniqueConstraint("submission_id", "number"),)

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    submission_id: Mapped[str] = mapped_column(ForeignKey("submissions.id", ondelete="CASCADE"))
    number: Mapped[int]
    kind: Mapped[str] = mapped_column(String(30))
    data: Mapped[dict[str, Any]]
    created: Mapped[datetime] = mapped_column(default=now)


class Duplicate(Base):
    """The last submission of some content by a user for a lab, so that a double click is one submission."""

    __tablename__ = "duplicates"

    user_id: Mapped[str] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), primary_key=True)
    lab: Mapped[str] = mapped_column(String(40), primary_key=True)
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    submission_id: Mapped[str] = mapped_column(ForeignKey("submissions.id", ondelete="CASCADE"))
    created: Mapped[datetime]


class Worker(Base):
    """A program that grades, on some machine."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(String(200), primary_key=True)
    host: Mapped[str] = mapped_column(String(200))
    queues: Mapped[list[str]] = mapped_column(JSON)
    machine: Mapped[dict[str, Any]]
    started: Mapped[datetime] = mapped_column(default=now)
    seen: Mapped[datetime] = mapped_column(default=now, index=True)
    draining: Mapped[bool] = mapped_column(default=False)
    graded: Mapped[int] = mapped_column(default=0)

    def is_alive(self, lost_after_s: float) -> bool:
        """Whether it was heard of in the last `lost_after_s` seconds."""
        return (now() - self.seen).total_seconds() < lost_after_s

    def takes_from(self, queue: str, lost_after_s: float) -> bool:
        """Whether it is alive and will take work from `queue`."""
        return queue in self.queues and not self.draining and self.is_alive(lost_after_s)


class BrowserSession(Base):
    """A browser that is signed in. Only the SHA-256 of what its cookie holds is kept."""

    __tablename__ = "browser_sessions"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    user_id: Mapped[str] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), index=True)
    # None: the owner of this machine, who came by the link that `topeka serve` printed.
    token_id: Mapped[str | None] = mapped_column(ForeignKey("tokens.id", ondelete="CASCADE"), index=True)
    digest: Mapped[str] = mapped_column(String(64))
    created: Mapped[datetime] = mapped_column(default=now)
    ends: Mapped[datetime]
