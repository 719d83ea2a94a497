"""Ends every process a job leaves behind, also one that made itself a session of its own."""

import contextlib
import ctypes
import os
import signal
import sys
import time
from pathlib import Path

import psutil

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Make this process the parent of orphaned descendants (Linux), so that none can hide."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies (Linux)."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def hide() -> None:
    """Keep other processes of this user out of this one's memory and descriptors (Linux).

    Without it a job could open /proc/PID/fd of its parent and write events of its own.
    """
    _prctl(_PR_SET_DUMPABLE, 0)


def be_first_to_go() -> None:
    """Undo `hide` in a forked child, and have the kernel choose the child when memory runs out (Linux)."""
    _prctl(_PR_SET_DUMPABLE, 1)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # /proc may be read-only; then the kernel chooses by size
            Path("/proc/self/oom_score_adj").write_text("1000")


def count_descendants() -> int:
    """Return how many processes descend from this one."""
    return len(psutil.Process().children(recursive=True))


def kill_descendants(group: int, within_s: float = 10.0) -> bool:
    """Kill the process group `group` and every other descendant; return whether all are gone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)  # the whole group at once: nothing in it can fork past this
    deadline = time.monotonic() + within_s
    while True:
        children = psutil.Process().children(recursive=True)
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        _reap()
        if not children:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)
