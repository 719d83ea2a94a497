"""What is said between a sandbox and its runner.

To the runner, on its standard input: for each job one line of JSON (`Job`, and the number of
bytes that follow), then a tar. The tar is a small checkout: `pyproject.toml`, `conftest.py`,
`labs/<chapter>/chapter.toml`, the lab's `tests/`, and the code under test as its `src/`.

From the runner, on a descriptor of its own: JSON lines, each an object with the key `event`:

| event | keys | from |
|---|---|---|
| `ready` | `pid`, `machine` | runner, once |
| `started` | `job`, `trust`, `gaps` | runner |
| `collected` | `tests`: [{`name`, `slow`}] | child |
| `collect_error` | `file`, `message`, `code_under_test` | child |
| `test_started` | `test` | child |
| `test` | `test`, `outcome`, `seconds`, `message`, `output`, `not_written`, `milestones` | child |
| `session_finished` | `exit_status` | child |
| `tampering` | `what` | child, and runner |
| `busy` | `clients` | listener, instead of all others |
| `finished` | `job`, `end`, `code`, `seconds`, `peak_memory_bytes`, `output`, `output_cut`, `dropped` | runner |

`gaps` says of a strict job what separates the code under test less than it could: no user of its own, no Landlock.

`end` is `exited`, `signalled`, `timeout`, `processes` (too many of them), `flood` (too many events) or
`cancelled`. Standard output and error of the child never mix with events: they come back as `output`,
the tail of them, inside `finished`.

The code under test shares the child's process, so it can write to the child's descriptor. The child seals what it
says (`grader.runner.seal`); the runner forwards what has the seal and the shape of a child's event and drops the
rest. A dropped line that has the shape of an event is `tampering`.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import IO, Annotated, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

Event = dict[str, Any]

GRACE_S = 20.0
"""What a job may take beyond its own limit before the client gives its runner up."""

# A header is some hundred bytes; a tar holds source files.
_MAX_HEADER_BYTES, _MAX_TAR_BYTES = 1 << 20, 300 << 20


class ProtocolError(Exception):
    """The other side said something this protocol does not know."""


@dataclass(frozen=True)
class Limits:
    """What one job may use.

    Attributes:
        timeout_s: wall-clock seconds.
        memory_bytes: address space beyond what the warm parent has mapped already; None for no
            limit (CUDA reserves far more address space than it uses).
        processes: how many processes the job may have at a time.
        file_bytes: size of one file.
        output_bytes: how much of the end of the output is kept.
    """

    timeout_s: float = 300.0
    memory_bytes: int | None = 4 << 30
    processes: int = 64
    file_bytes: int = 128 << 20
    output_bytes: int = 64 << 10


@dataclass(frozen=True)
class Job:
    """One run of one lab's tests.

    Attributes:
        id: names the job in events and, where it is `sole`, its container.
        folder: the lab's folder below `labs/`, such as `ch01_attention/lab01_dot_product`.
        mode: `grade` runs the tests, `collect` only lists them.
        preload: modules to import before forking.
        slow: whether tests marked slow run too.
        seed: shifts the random inputs of every test.
        trust: `strict` runs the code under test in a process of its own.
        tests: names of the only tests to run, below the lab's folder; empty for all.
        sole: whether whatever else runs under this id is a left-over, to be ended first.
        limits: what the job may use.
    """

    id: str
    folder: str
    mode: Literal["grade", "collect"] = "grade"
    preload: tuple[str, ...] = ("torch",)
    slow: bool = False
    seed: int = 0
    trust: Literal["same_process", "strict"] = "same_process"
    tests: tuple[str, ...] = ()
    sole: bool = False
    limits: Limits = field(default_factory=Limits)


class _ChildEvent(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Collected(_ChildEvent):
    class Test(_ChildEvent):
        name: str
        slow: bool

    event: Literal["collected"]
    tests: list[Test]


class _CollectError(_ChildEvent):
    event: Literal["collect_error"]
    file: str
    message: str
    code_under_test: bool


class _TestStarted(_ChildEvent):
    event: Literal["test_started"]
    test: str


class _Test(_ChildEvent):
    class Milestone(_ChildEvent):
        name: str
        value: float
        target: float
        unit: str
        better: Literal["higher", "lower"]

    event: Literal["test"]
    test: str
    outcome: Literal["passed", "failed", "error", "not_verified_here"]
    seconds: float
    message: str
    output: str
    not_written: bool
    milestones: list[Milestone]


class _SessionFinished(_ChildEvent):
    event: Literal["session_finished"]
    exit_status: int


class _Tampering(_ChildEvent):
    event: Literal["tampering"]
    what: str


_CHILD_EVENT: TypeAdapter[Any] = TypeAdapter(
    Annotated[
        _Collected | _CollectError | _TestStarted | _Test | _SessionFinished | _Tampering,
        Field(discriminator="event"),
    ]
)


def is_child_event(line: bytes) -> bool:
    """Whether `line` is an event that a child may send, with every key it needs and no other."""
    try:
        _CHILD_EVENT.validate_json(line)
    except ValidationError:
        return False
    return True


def overdue(job: Job, seconds: float) -> Event:
    """Return the `finished` event of a job whose runner had to be killed, since it did not stop the job."""
    return {
        "event": "finished",
        "job": job.id,
        "end": "timeout",
        "code": None,
        "seconds": round(seconds, 6),
        "peak_memory_bytes": None,
        "output": "",
        "output_cut": False,
        "dropped": 0,
        "processes_left": False,
    }


class Sink(Protocol):
    """Where a job can be written to: a pipe, or a stream to a container."""

    def write(self, data: bytes, /) -> object:
        """Write all of `data`."""

    def flush(self) -> object:
        """Send what is buffered."""


def send_job(stream: Sink, job: Job, tar: bytes) -> None:
    """Write a job and its tar."""
    header = {"job": dataclasses.asdict(job), "tar_bytes": len(tar)}
    stream.write(json.dumps(header).encode() + b"\n")
    stream.write(tar)
    stream.flush()


class _Header(BaseModel):
    job: Job
    tar_bytes: int = Field(ge=0, le=_MAX_TAR_BYTES)


def receive_job(stream: IO[bytes]) -> tuple[Job, bytes] | None:
    """Read the next job and its tar; None at the end of the stream.

    Raises:
        ProtocolError: the header is no job, or the stream ends inside the tar.
    """
    line = stream.readline(_MAX_HEADER_BYTES)
    if not line:
        return None
    try:
        header = _Header.model_validate_json(line)
    except ValidationError as error:
        raise ProtocolError(f"not a job header: {line[:200]!r}") from error
    tar = stream.read(header.tar_bytes)
    if len(tar) != header.tar_bytes:
        raise ProtocolError(f"the tar ends after {len(tar)} of {header.tar_bytes} bytes")
    return header.job, tar
