"""The report of a grading: one versioned document, the same for terminal, JSON, database and page.

It is built in one place (`grader.grading`); everything else renders it.
"""

from datetime import datetime
from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict, computed_field

from grader.machine import Machine
from grader.sandbox import Isolation

SCHEMA_VERSION: Literal[1] = 1


class Status(StrEnum):
    """How a lab came out."""

    VERIFIED = "verified"
    FAILED = "failed"
    NOT_ATTEMPTED = "not_attempted"
    NOT_VERIFIED_HERE = "not_verified_here"
    ERROR = "error"
    TIMEOUT = "timeout"


class Trust(StrEnum):
    """How far a report can be trusted against code that means to deceive.

    `same_process`: tests and code under test share a process. The runner looks for tampering and reports what it
    finds, but cannot find everything. `strict`: the code ran in a process of its own, with nothing of the tests in
    reach.
    """

    SAME_PROCESS = "same_process"
    STRICT = "strict"


class Outcome(StrEnum):
    """How one test came out."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_WRITTEN = "not_written"
    NOT_VERIFIED_HERE = "not_verified_here"
    ERROR = "error"
    NOT_RUN = "not_run"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class TestResult(_Frozen):
    """One expected test.

    Attributes:
        name: below the lab's folder, `tests/test_attention.py::test_softmax[axis0]`.
        outcome: how it came out.
        seconds: set-up, call and teardown together.
        message: why it failed or did not run; empty when it passed.
        output: what it printed, the end of it; empty when it passed.
    """

    __test__ = False  # not a pytest class

    name: str
    outcome: Outcome
    seconds: float = 0.0
    message: str = ""
    output: str = ""


class MilestoneResult(_Frozen):
    """A measured claim.

    Attributes:
        name: what was measured.
        value: the measurement.
        target: what the course promises.
        unit: of value and target.
        better: whether the value should be `lower` or `higher` than the target.
        reached: whether it is.
    """

    name: str
    value: float
    target: float
    unit: str
    better: Literal["higher", "lower"]
    reached: bool


class Diagnosis(_Frozen):
    """The known misconception that a set of failures looks like.

    Attributes:
        misconception: its name in `misconceptions.toml`.
        hint: what to tell the learner.
        likeness: from 0 to 1, how far failing tests and the wrong numbers agree.
    """

    misconception: str
    hint: str
    likeness: float


class LabReport(_Frozen):
    """One lab, graded once.

    Attributes:
        lab: such as `ch01/lab01`.
        title: the lab's title.
        status: how it came out.
        reason: one sentence for every status but `verified`.
        tests: every expected test, in the order of the course.
        milestones: what was measured.
        diagnosis: the misconception the failures look like, if any does.
        seconds: wall-clock time in the sandbox.
        peak_memory_bytes: of the largest process.
        output: the end of what the run printed outside of tests.
        output_cut: whether `output` is only the end.
        trust: how far `status` can be trusted.
        trust_gaps: with strict trust, what separated the code under test less than it could here, a sentence each.
        tampering: what the code under test did to the grading, a sentence each. With any of them no lab is
            verified.
        suspicious: what in its source is worth a look, a sentence each. A hint only: it decides nothing.
        slow_left_out: how many tests marked slow the lab has and this run did not ask for. They do not decide
            the status; a milestone may be among them.
    """

    lab: str
    title: str
    status: Status
    reason: str = ""
    tests: tuple[TestResult, ...] = ()
    milestones: tuple[MilestoneResult, ...] = ()
    diagnosis: Diagnosis | None = None
    seconds: float = 0.0
    peak_memory_bytes: int | None = None
    output: str = ""
    output_cut: bool = False
    trust: Trust = Trust.SAME_PROCESS
    trust_gaps: tuple[str, ...] = ()
    tampering: tuple[str, ...] = ()
    suspicious: tuple[str, ...] = ()
    slow_left_out: int = 0

    @computed_field  # type: ignore[prop-decorator]
    @property
    def passed(self) -> int:
        """How many tests passed."""
        return sum(t.outcome is Outcome.PASSED for t in self.tests)


class Report(_Frozen):
    """One grading of one or more labs.

    Attributes:
        schema_version: changes when a reader of older reports would misread this one.
        created: when the grading began, with time zone.
        code: the code under test: `src`, `solutions` or a folder.
        stack: the stack of the environment the tests ran in.
        isolation: the sandbox.
        machine: hardware and library versions.
        commit: the course's git commit, with `+changes` if tracked files differ from it.
        labs: one report each.
        seconds: wall-clock time of the whole grading.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    created: datetime
    code: str
    stack: str
    isolation: Isolation
    machine: Machine
    commit: str | None
    labs: tuple[LabReport, ...]
    seconds: float

    @property
    def exit_code(self) -> int:
        """0: all verified; 1: something failed or was not attempted; 3: something could not run here."""
        statuses = {lab.status for lab in self.labs}
        if statuses & {Status.FAILED, Status.NOT_ATTEMPTED, Status.TIMEOUT}:
            return 1
        return 0 if statuses <= {Status.VERIFIED} else 3
