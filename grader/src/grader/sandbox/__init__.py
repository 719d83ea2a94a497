"""Where a grading runs. A sandbox takes a `Job` and a tar and gives back events."""

from collections.abc import Iterator
from typing import Protocol

from pydantic import BaseModel, ConfigDict

from grader.machine import Machine
from grader.runner.protocol import Event, Job

SANDBOX_IMAGE = "topeka-sandbox"
"""The repository of the sandbox images; the stack's name is the tag."""


class Isolation(BaseModel):
    """What a report says about the place where the tests ran.

    Attributes:
        sandbox: `local` or `docker`.
        isolated: whether the code under test was kept from the machine and from its oracle.
        note: in words.
        image_digest: of the container image, where there was one.
        flags: what kept the code in: `no network`, `read-only root` and so on; empty where nothing did.
    """

    model_config = ConfigDict(frozen=True)

    sandbox: str
    isolated: bool
    note: str
    image_digest: str | None = None
    flags: tuple[str, ...] = ()


class SandboxFailed(Exception):
    """The sandbox itself could not run the job; nothing is known about the code under test."""


class Sandbox(Protocol):
    """One place to run jobs, one at a time."""

    @property
    def isolation(self) -> Isolation:
        """What the report says about this sandbox."""

    @property
    def machine(self) -> Machine:
        """The machine as the code under test saw it, after the first job."""

    def run(self, job: Job, tar: bytes) -> Iterator[Event]:
        """Run a job; yields its events, the last of them `finished`.

        Raises:
            SandboxFailed: the runner could not start or ended in the middle.
        """

    def close(self) -> None:
        """End every process of this sandbox."""
