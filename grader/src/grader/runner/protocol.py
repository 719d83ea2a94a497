"""What is said between a sandbox and its runner.

To the runner, on its standard input: for each job one line of JSON (`Job`, and the number of
bytes that follow), then a tar. The tar is a small checkout: `pyproject.toml`, `conftest.py`,
`labs/<chapter>/chapter.toml`, the lab's `tests/`, and the code under test as its `src/`.

From the runner, on a descriptor of its own: JSON lines, each an object with the key `event`:

| event | keys | from |
|---|---|---|
| `ready` | `pid`, `machine` | runner, once |
| `started` | `job` | runner |
| `collected` | `tests`: [{`name`, `slow`}] | child |
| `collect_error` | `file`, `message`, `code_under_test` | child |
| `test_started` | `test` | child |
| `test` | `test`, `outcome`, `seconds`, `message`, `output`, `not_written`, `milestones` | child |
| `session_finished` | `exit_status` | child |
| `finished` | `job`, `end`, `code`, `seconds`, `peak_memory_bytes`, `output`, `output_cut`, `dropped` | runner |

`end` is `exited`, `signalled`, `timeout`, `processes` (too many of them) or `cancelled`. Standard
output and error of the child never mix with events: they come back as `output`, the tail of them,
inside `finished`.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import IO, Any, Literal, Protocol

Event = dict[str, Any]

CHILD_EVENTS = frozenset({"collected", "collect_error", "test_started", "test", "session_finished"})


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
        id: chosen by the sandbox, unique among its jobs.
        folder: the lab's folder below `labs/`, such as `ch01_attention/lab01_dot_product`.
        mode: `grade` runs the tests, `collect` only lists them.
        preload: modules to import before forking.
        slow: whether tests marked slow run too.
        seed: shifts the random inputs of every test.
        tests: names of the only tests to run, below the lab's folder; empty for all.
        limits: what the job may use.
    """

    id: str
    folder: str
    mode: Literal["grade", "collect"] = "grade"
    preload: tuple[str, ...] = ("torch",)
    slow: bool = False
    seed: int = 0
    tests: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)


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


def receive_job(stream: IO[bytes]) -> tuple[Job, bytes] | None:
    """Read the next job and its tar; None at the end of the stream.

    Raises:
        ProtocolError: the header is no job, or the stream ends inside the tar.
    """
    line = stream.readline()
    if not line:
        return None
    try:
        header = json.loads(line)
        values = header["job"]
        values["preload"], values["tests"] = tuple(values["preload"]), tuple(values["tests"])
        values["limits"] = Limits(**values["limits"])
        job, size = Job(**values), int(header["tar_bytes"])
    except (ValueError, KeyError, TypeError) as error:
        raise ProtocolError(f"not a job header: {line[:200]!r}") from error
    tar = stream.read(size)
    if len(tar) != size:
        raise ProtocolError(f"the tar ends after {len(tar)} of {size} bytes")
    return job, tar
