"""Runs jobs on this machine: own processes and limits, but the user's own rights. Not isolated."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import IO, Self

from grader.machine import Machine, describe
from grader.runner.protocol import GRACE_S, Event, Job, overdue, send_job
from grader.sandbox import Isolation, SandboxFailed


class LocalSandbox:
    """A warm parent on this machine, started at the first job and kept until `close`.

    Args:
        threads: how many threads torch may use in each job; None leaves the choice to torch.
        preload: modules that the parent imports at its start.
    """

    isolation = Isolation(
        sandbox="local",
        isolated=False,
        note="not isolated: the code ran as your own user on this machine, with limits on time and memory",
    )

    def __init__(self, threads: int | None = None, preload: Sequence[str] = ("torch", "numpy")) -> None:
        self._threads = threads
        self._preload = preload
        self._process: subprocess.Popen[bytes] | None = None
        self._events: IO[bytes] | None = None

    @property
    def machine(self) -> Machine:
        """This machine."""
        return describe()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the warm parent without waiting for it, so that it imports while others work."""
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        read, write = os.pipe()
        # With one hash seed a set has one order, and a failure's message the fingerprint that a diagnosis knows.
        environment = {**os.environ, "PYTHONHASHSEED": "0"}
        if self._threads is not None:
            environment["OMP_NUM_THREADS"] = str(self._threads)
        # -P: a file in the current folder that is called like a library is the learner's, not the runner's.
        command = [sys.executable, "-P", "-m", "grader.runner", "--events-fd", str(write)]
        command += ["--preload", ",".join(self._preload)]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=[write],
                env=environment,
            )
        except OSError as error:
            os.close(read)
            raise SandboxFailed(f"the runner could not be started: {error}") from error
        finally:
            os.close(write)
        self._events = os.fdopen(read, "rb")

    def run(self, job: Job, tar: bytes) -> Iterator[Event]:
        """Run a job; yields its events, the last of them `finished`.

        Raises:
            SandboxFailed: the runner could not start or ended in the middle. The next job
                starts a new one.
        """
        self.start()
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._events is not None
        finished = False
        # A job can stop its parent (SIGSTOP), which then enforces no limit any more.
        started, killed = time.monotonic(), threading.Event()
        timer = threading.Timer(job.limits.timeout_s + GRACE_S, _kill, [self._process, killed])
        timer.daemon = True
        timer.start()
        try:
            with contextlib.suppress(BrokenPipeError):  # the read below says why
                send_job(self._process.stdin, job, tar)
            for line in self._events:
                event: Event = json.loads(line)
                if event["event"] == "ready":
                    continue
                finished = event["event"] == "finished"
                yield event
                if finished:
                    return
            if killed.is_set():
                yield overdue(job, time.monotonic() - started)
                return
            raise SandboxFailed(f"the runner ended in the middle of a job: {self._last_words()}")
        finally:
            timer.cancel()
            if not finished:
                # Stopped half-way (Ctrl-C, or the caller lost interest): this parent is still at the
                # old job. Closing its input makes it end the job and itself.
                self.close()

    def close(self) -> None:
        """End the warm parent and with it everything it started."""
        if self._process is None:
            return
        process, self._process = self._process, None
        for stream in (process.stdin, self._events):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stderr is not None:
            process.stderr.close()

    def _last_words(self) -> str:
        assert self._process is not None
        assert self._process.stderr is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        text = self._process.stderr.read().decode(errors="replace").strip()
        code = self._process.returncode
        how = f"killed by signal {-code}" if code is not None and code < 0 else f"exit status {code}"
        return f"{how}. {text.splitlines()[-1]}" if text else how


def _kill(process: subprocess.Popen[bytes], killed: threading.Event) -> None:
    killed.set()
    process.kill()
