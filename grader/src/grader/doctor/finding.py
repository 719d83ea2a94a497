"""What an examination consists of: findings, each with its remedy."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

GB = 1_000_000_000

State = Literal["ok", "warning", "missing"]


class Frozen(BaseModel):
    """A value: it never changes, and a field it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Finding(Frozen):
    """One thing that was looked at.

    Attributes:
        name: what it is.
        state: `ok`; `warning`, works but may get in the way; `missing`, something needs it.
        detail: what was found.
        remedy: what to do; empty for `ok`.
    """

    name: str
    state: State
    detail: str
    remedy: str = ""


def ok(name: str, detail: str) -> Finding:
    """Return a finding that asks for nothing."""
    return Finding(name=name, state="ok", detail=detail)


def warning(name: str, detail: str, remedy: str) -> Finding:
    """Return a finding that may get in the way."""
    return Finding(name=name, state="warning", detail=detail, remedy=remedy)


def missing(name: str, detail: str, remedy: str) -> Finding:
    """Return a finding without which something does not work."""
    return Finding(name=name, state="missing", detail=detail, remedy=remedy)


def in_gb(size: int) -> str:
    """Return a number of bytes as a person reads it."""
    return f"{size / GB:.1f} GB" if size >= GB // 10 else f"{size / 1_000_000:.0f} MB"
