"""Servers in the background: one of a kind for a checkout, found again by later calls.

What is known of a server lies in a folder of its own below `.topeka/`, for the user's eyes only.
"""

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from grader.errors import TopekaError


class ServerFailed(TopekaError):
    """A server could not be started or ended; the message has the end of its log."""


@contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Make the server's folder, and let one process at a time look, start or stop.

    Args:
        folder: of the server.
        what: name of the server, for messages.

    Raises:
        ServerFailed: another process has been at it for too long.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        with FileLock(folder / "lock", timeout=90):
            yield
    except Timeout as error:
        raise ServerFailed(
            f"another command has been starting or stopping {what} for 90 s ({folder / 'lock'} is held); "
            "end it and try again"
        ) from error


def launch(command: list[str], root: Path, log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a server that outlives this terminal; what it prints goes to `log`."""
    write_private(log, "")
    with log.open("a") as stream:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            cwd=root,
            env=environment,
            start_new_session=True,
        )


def until_ready(
    process: subprocess.Popen[bytes], is_ready: Callable[[], bool], log: Path, what: str, timeout_s: float
) -> None:
    """Wait until a server is ready; a server that is not in time is ended.

    Raises:
        ServerFailed: it ended, or was not ready in time.
    """
    deadline = time.monotonic() + timeout_s
    try:
        while time.monotonic() < deadline:
            if (code := process.poll()) is not None:
                raise ServerFailed(f"{what} ended at once (exit status {code}). {end_of(log)}")
            if is_ready():
                process.returncode = 0  # Popen would warn that it still runs, which is what we want
                return
            time.sleep(0.05)
        raise ServerFailed(f"{what} did not answer within {timeout_s:.0f} s. {end_of(log)}")
    except BaseException:  # Ctrl-C too
        end(process.pid, what)
        process.wait()
        raise


def environment(*without: str) -> dict[str, str]:
    """Return this environment but for some variables, where terminals know the command `topeka`."""
    found = {name: value for name, value in os.environ.items() if name not in without}
    programs = str(Path(sys.executable).parent)
    found["PATH"] = os.pathsep.join([programs, found.get("PATH", os.defpath)])
    if sys.prefix != sys.base_prefix:
        found["VIRTUAL_ENV"] = sys.prefix
    return found


def end(pid: int, what: str) -> None:
    """End a process and everything below it: politely, and after 10 s not.

    Raises:
        ServerFailed: it cannot be ended.
    """
    try:
        server = psutil.Process(pid)
        family = [server, *server.children(recursive=True)]
        server.terminate()  # shuts down what it has started
    except psutil.NoSuchProcess:
        return
    psutil.wait_procs([server], timeout=10)
    _, alive = psutil.wait_procs(family, timeout=1)
    for process in alive:
        process.kill()  # psutil makes sure that the number still belongs to it
    _, alive = psutil.wait_procs(alive, timeout=5)
    if alive:
        raise ServerFailed(f"process {alive[0].pid} of {what} cannot be ended")


def write_private(file: Path, text: str) -> None:
    """Write a file that only the user may read, whole or not at all."""
    draft = file.with_name(f"{file.name}.{secrets.token_hex(4)}.new")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        stream.write(text)
    draft.replace(file)


def end_of(log: Path) -> str:
    """Return the last lines of a log, and where it is."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
    return "\n".join([f"The end of {log}:", *lines])
