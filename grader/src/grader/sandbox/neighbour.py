"""Runs jobs in the grader's container beside this one, over a Unix socket that both share.

A workspace has no Docker Engine within reach, and should not. Compose starts the sandbox's image beside
it, without network and with limits; it lives as long as the workspace, so jobs share it one after another.
"""

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from grader.errors import TopekaError
from grader.machine import Machine
from grader.runner.protocol import GRACE_S, Event, Job, send_job
from grader.sandbox import Isolation, SandboxFailed

_READY_WITHIN_S = 30.0
SOCKET_VARIABLE = "TOPEKA_GRADER_SOCKET"


class NeighbourUnusable(TopekaError):
    """The grader's container does not answer; the message says what to do."""


def socket_path() -> Path | None:
    """Return where the neighbour listens, if this is a workspace that has one."""
    named = os.environ.get(SOCKET_VARIABLE)
    return Path(named) if named and Path(named).is_socket() else None


class NeighbourSandbox:
    """A warm parent in the grader's container.

    Args:
        path: of its socket.

    Raises:
        NeighbourUnusable: nobody listens there.
    """

    isolation = Isolation(
        sandbox="docker",
        isolated=True,
        note="isolated: the code ran in the grader's container, without network and with limits; "
        "that container is shared by all gradings of this workspace",
        flags=(
            "no network",
            "read-only root",
            "no capabilities",
            "no new privileges",
            "non-root user",
            "limits on memory, CPU, processes, files and time",
        ),
    )

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connect()

    def _connect(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(_READY_WITHIN_S)
        try:
            self._socket.connect(str(self._path))
            self._stream = self._socket.makefile("rwb")
            ready = json.loads(self._stream.readline() or b"{}")
            if ready.get("event") == "busy":
                self._socket.close()
                raise NeighbourUnusable(
                    f"the grader's container has its {ready['clients']} gradings at a time: "
                    "try again when one of them has ended, or use --sandbox local"
                )
            self._machine = Machine.model_validate(ready["machine"])
        except (OSError, KeyError, ValueError) as error:
            self._socket.close()
            raise NeighbourUnusable(
                f"the grader's container does not answer at {self._path} ({error}): look at `make logs`, "
                "or use --sandbox local"
            ) from error

    @property
    def machine(self) -> Machine:
        """The machine as the grader's container sees it."""
        return self._machine

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, job: Job, tar: bytes) -> Iterator[Event]:
        """Run a job; yields its events, the last of them `finished`.

        Raises:
            SandboxFailed: the container ended in the middle. The next job finds it restarted.
        """
        if self._stream.closed:
            try:
                self._connect()
            except NeighbourUnusable as error:
                raise SandboxFailed(str(error)) from error
        finished = False
        # A job can stop its runner (SIGSTOP), which then enforces no limit and says nothing any more.
        self._socket.settimeout(job.limits.timeout_s + GRACE_S)
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionError):  # the read below says why
                send_job(self._stream, job, tar)
            for line in self._stream:
                event: Event = json.loads(line)
                finished = event["event"] == "finished"
                yield event
                if finished:
                    return
            raise SandboxFailed(
                "the grader's container ended in the middle of a job; `make logs` may say why"
            )
        except OSError as error:
            raise SandboxFailed(
                f"the grader's container went away in the middle of a job: {error}"
            ) from error
        finally:
            if not finished:
                self.close()  # it cancels what still runs there

    def close(self) -> None:
        """Leave the container, which cancels a job that still runs."""
        with contextlib.suppress(OSError):
            self._stream.close()
        self._socket.close()
