"""The warm parent: imports torch once, then forks one child per job.

It never runs a torch operation and never touches CUDA: a thread pool or a CUDA context would
not survive the fork. It does not even ask which GPUs there are: NVIDIA's management library starts
a thread and keeps pipes to it, which every job would inherit and could write to.
"""

import contextlib
import gc
import importlib
import io
import itertools
import json
import os
import secrets
import select
import signal
import socket
import stat
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, NoReturn

import psutil

from grader import machine
from grader.runner import apart, child, reaper
from grader.runner.integrity import Snapshot
from grader.runner.protocol import Event, Job, ProtocolError, is_child_event, receive_job
from grader.runner.seal import SECRET_BYTES, Seal, new_secret

# A job's tar is made by `grader.submission.pack` from source files; anything larger is none of ours.
_MAX_FILES, _MAX_BYTES = 5_000, 256 << 20
# A child's event line longer than this is no event of ours.
_MAX_EVENT_BYTES = 1 << 20
# A job's events in all. The client keeps them in memory, so a job may not send without end.
_MAX_EVENTS, _MAX_EVENTS_BYTES = 100_000, 64 << 20
_WORK_PREFIX = "topeka-job-"


class WarmParent:
    """Takes jobs from `jobs` and writes events to the descriptor `events`."""

    def __init__(self, jobs: IO[bytes], events: int) -> None:
        self._jobs = jobs
        self._events = events
        self._snapshot = Snapshot()
        self._snapshot_of = 0

    def serve(self, preload: Sequence[str]) -> None:
        """Import `preload`, say `ready`, and run jobs until `jobs` ends."""
        reaper.adopt_orphans()
        reaper.hide()
        _sweep_left_overs()
        here = _described_apart()
        import_all(("shared.plugin", "_pytest.pytester", *preload))  # what the course's conftest.py loads
        self._send(event="ready", pid=os.getpid(), machine=here)
        while (received := receive_job(self._jobs)) is not None:
            job, tar = received
            tars = [tar]  # only here: a process that must not have it takes it out
            del received, tar
            import_all(job.preload)
            if "torch" in sys.modules:
                import_all(("shared.forbid", "torch.testing", "numpy.testing"))
            strict = job.trust == "strict"
            if strict:
                import_all(("shared.apart.client", "shared.apart.server"))
            gaps = apart.gaps() if strict else []
            self._send(event="started", job=job.id, trust=job.trust, gaps=gaps)
            self._run(job, tars)

    def _send(self, **event: object) -> None:
        data = json.dumps(event).encode() + b"\n"
        while data:
            data = data[os.write(self._events, data) :]

    def _run(self, job: Job, tars: list[bytes]) -> None:
        prefix = f"{_WORK_PREFIX}{os.getpid()}-"
        strict = job.trust == "strict"
        work = Path(tempfile.mkdtemp(prefix=prefix))
        code_work = Path(tempfile.mkdtemp(prefix=prefix, dir=apart.base())) if strict else None
        connection: socket.socket | None = None
        try:
            try:
                if code_work is not None:
                    _extract(tars[0], code_work, lambda path: apart.belongs_to_code(path, job))
                _extract(tars[0], work, lambda path: not strict or apart.belongs_to_tests(path, job))
            except (tarfile.TarError, ValueError, OSError) as error:
                raise ProtocolError(f"not the tar of a job: {error}") from error
            event_read, event_write = os.pipe()
            secret_read, secret_write = os.pipe()
            output_read, output_write = os.pipe()
            if len(sys.modules) != self._snapshot_of:
                self._snapshot.take()  # here and not in the child: once for all jobs
                self._snapshot_of = len(sys.modules)
            gc.freeze()
            started = time.monotonic()
            if code_work is not None:
                connection = apart.start(job, code_work, tars, output_write, self._snapshot)
            pid = os.fork()
            if pid == 0:
                os.close(event_read)
                os.close(output_read)
                os.close(secret_write)
                self._become_child(job, work, event_write, output_write, secret_read, connection)
            os.close(event_write)
            os.close(output_write)
            os.close(secret_read)
            if connection is not None:
                connection.close()
            secret = (
                new_secret()
            )  # drawn after the fork: the child must not find it in its copy of this frame
            with contextlib.suppress(BrokenPipeError):  # the child has ended already; that is seen below
                os.write(secret_write, secret)
            os.close(secret_write)
            with os.fdopen(event_read, "rb", 0) as e, os.fdopen(output_read, "rb", 0) as o:
                watched = _Watched(job, pid, started, e, o, self._events, self._jobs, Seal(secret))
                finished = watched.until_end()
        finally:
            _remove(work)
            if code_work is not None:
                _remove(code_work)
        self._send(**finished)

    def _become_child(
        self,
        job: Job,
        work: Path,
        events: int,
        output: int,
        secret: int,
        connection: socket.socket | None,
    ) -> NoReturn:
        code = 70  # EX_SOFTWARE: something of ours failed before or around pytest
        try:
            os.setsid()
            reaper.die_with_parent()
            reaper.be_first_to_go()
            if connection is not None:
                reaper.hide()  # from the code under test, which has a process of its own
            null = os.open(os.devnull, os.O_RDONLY)
            os.dup2(null, 0)
            os.close(null)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.close(output)
            os.close(self._events)
            sys.stdin = os.fdopen(0, closefd=False)
            sys.stdout = os.fdopen(1, "w", closefd=False, errors="backslashreplace")
            sys.stderr = os.fdopen(2, "w", closefd=False, errors="backslashreplace")
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            with os.fdopen(secret, "rb") as stream:
                code_socket = None if connection is None else connection.detach()
                code = child.run(job, work, events, stream.read(SECRET_BYTES), self._snapshot, code_socket)
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)


class _Watched:
    """One running child: forwards its events, keeps the end of its output, enforces the limits."""

    def __init__(
        self,
        job: Job,
        pid: int,
        started: float,
        events: IO[bytes],
        output: IO[bytes],
        forward_to: int,
        jobs: IO[bytes],
        seal: Seal,
    ) -> None:
        self._job = job
        self._pid = pid
        self._started = started
        self._sources = {events.fileno(): events, output.fileno(): output}
        self._event_fd = events.fileno()
        self._forward_to = forward_to
        self._jobs_fd = jobs.fileno()
        self._seal = seal
        self._forged = False
        self._partial = b""
        self._dropped = 0
        self._events = 0
        self._events_bytes = 0
        self._output = bytearray()
        self._output_cut = False

    def until_end(self) -> Event:
        """Watch until the child has ended, end everything it started, and say how it went."""
        deadline = self._started + self._job.limits.timeout_s
        next_count = self._started
        end: str | None = None
        usage = None
        while end is None:
            self._read(0.02)
            pid, status, usage = os.wait4(self._pid, os.WNOHANG)
            now = time.monotonic()
            if pid:
                end = "signalled" if os.WIFSIGNALED(status) else "exited"
            elif now > deadline:
                end = "timeout"
            elif self._flooded():
                end = "flood"
            elif self._client_is_gone():
                end = "cancelled"
            elif now >= next_count:
                next_count = now + 0.1
                if reaper.count_descendants() > self._job.limits.processes:
                    end = "processes"
        code: int | None = None
        if end in ("exited", "signalled"):
            code = os.WTERMSIG(status) if end == "signalled" else os.WEXITSTATUS(status)
            peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) if usage else None
        else:
            peak = _peak_memory(self._pid)
        clean = reaper.kill_descendants(self._pid)
        self._drain()
        return {
            "event": "finished",
            "job": self._job.id,
            "end": end,
            "code": code,
            "seconds": round(time.monotonic() - self._started, 6),
            "peak_memory_bytes": peak,
            "output": self._output.decode(errors="replace"),
            "output_cut": self._output_cut,
            "dropped": self._dropped,
            "processes_left": not clean,
        }

    def _flooded(self) -> bool:
        return self._events > _MAX_EVENTS or self._events_bytes > _MAX_EVENTS_BYTES

    def _client_is_gone(self) -> bool:
        # Between jobs nothing is written to us; readable here means the end of the stream.
        poller = select.poll()
        poller.register(self._jobs_fd, select.POLLHUP)
        return any(mask & select.POLLHUP for _, mask in poller.poll(0))

    def _read(self, timeout: float) -> bool:
        if not self._sources:
            time.sleep(min(timeout, 0.005))
            return False
        readable, _, _ = select.select(list(self._sources), [], [], timeout)
        for descriptor in readable:
            data = os.read(descriptor, 1 << 16)
            if not data:
                del self._sources[descriptor]
            elif descriptor == self._event_fd:
                self._take_events(data)
            else:
                self._take_output(data)
        return bool(readable)

    def _drain(self) -> None:
        # What was written before the end is still in the pipes.
        deadline = time.monotonic() + 2.0
        while self._sources and time.monotonic() < deadline and self._read(0):
            pass

    def _take_events(self, data: bytes) -> None:
        *lines, self._partial = (self._partial + data).split(b"\n")
        if len(self._partial) > _MAX_EVENT_BYTES:
            self._partial, self._dropped = b"", self._dropped + 1
        for sealed in lines:
            if self._flooded():
                self._dropped += 1
                continue
            self._events += 1
            self._events_bytes += len(sealed)
            line = self._seal.open(sealed)
            if line is None or not is_child_event(line):
                self._dropped += 1
                if not self._forged and is_child_event(sealed[max(sealed.find(b"{"), 0) :]):
                    self._forged = True
                    self._forward(b'{"event": "tampering", "what": "wrote results to the grader\'s channel"}')
                continue
            self._forward(line)

    def _forward(self, line: bytes) -> None:
        line += b"\n"
        while line:
            line = line[os.write(self._forward_to, line) :]

    def _take_output(self, data: bytes) -> None:
        self._output += data
        keep = self._job.limits.output_bytes
        if len(self._output) > keep:
            self._output_cut = True
            del self._output[:-keep]


def _extract(tar: bytes, folder: Path, wanted: Callable[[PurePosixPath], bool] = lambda path: True) -> None:
    """Write the regular files of `tar` that are `wanted` below `folder`; nothing else may be in it.

    By hand, since tarfile's own filters came with Python 3.11.4 and Debian 12 has 3.11.2.
    """
    total = 0
    with tarfile.open(fileobj=io.BytesIO(tar), mode="r:") as archive:  # never compressed
        for count, member in enumerate(archive):
            total += abs(member.size)  # a header can say less than nothing
            if count >= _MAX_FILES or total > _MAX_BYTES:
                raise ProtocolError(
                    f"the tar holds more than {_MAX_FILES:,} files or {_MAX_BYTES >> 20} MiB: no job of ours"
                )
            path = PurePosixPath(member.name)
            content = archive.extractfile(member) if member.isreg() else None
            if content is None or path.is_absolute() or ".." in path.parts:
                raise ProtocolError(f"the tar holds {member.name!r}, which is no file below its root")
            if not wanted(path):
                continue
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content.read())


def import_all(modules: Sequence[str]) -> None:
    """Import `modules`; one that this machine lacks is left to the tests."""
    for name in modules:
        # A module this machine lacks is the tests' business; they name it in their own error.
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def _described_apart() -> Any:
    """Return `machine.describe()` as JSON has it, asked by another process."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(read)
            with os.fdopen(write, "wb") as stream:
                stream.write(machine.describe().model_dump_json().encode())
        except BaseException:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as stream:
        answer = stream.read()
    os.waitpid(pid, 0)
    if not answer:
        raise RuntimeError("this machine could not be described; the error is above")
    return json.loads(answer)


def _peak_memory(pid: int) -> int | None:
    with contextlib.suppress(psutil.Error, AttributeError):
        return int(psutil.Process(pid).memory_info().rss)
    return None


def _remove(folder: Path) -> None:
    """Remove a work folder, however deep it is and whatever rights its sub-folders have.

    What lies deeper than the second level is moved up first: a job can make a tree that is deeper than
    recursion goes or a path can be long.
    """
    with contextlib.suppress(OSError):  # the next warm parent tries again
        moved = f"{secrets.token_hex(8)}-"  # a name that the job cannot have taken
        numbers = itertools.count()
        folder.chmod(stat.S_IRWXU)
        while entries := list(folder.iterdir()):
            for entry in entries:
                if entry.is_symlink() or not entry.is_dir():
                    entry.unlink()
                    continue
                entry.chmod(stat.S_IRWXU)
                for inner in list(entry.iterdir()):
                    if inner.is_symlink() or not inner.is_dir():
                        inner.unlink()
                    else:
                        inner.chmod(stat.S_IRWXU)
                        inner.rename(folder / f"{moved}{next(numbers)}")
                entry.rmdir()
        folder.rmdir()


def _sweep_left_overs() -> None:
    """Remove work folders of warm parents that were killed."""
    places = {Path(tempfile.gettempdir()), apart.base()}
    for folder in (folder for place in places for folder in place.glob(f"{_WORK_PREFIX}*")):
        owner = folder.name.removeprefix(_WORK_PREFIX).split("-")[0]
        with contextlib.suppress(OSError):
            if owner.isdigit() and not psutil.pid_exists(int(owner)) and folder.stat().st_uid == os.getuid():
                _remove(folder)
