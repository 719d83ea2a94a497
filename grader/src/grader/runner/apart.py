"""Starts the process that runs the code under test when a job asks for `strict` trust.

It gets the submitted files and the solutions that the lab may import, and one socket: no tests, no expected values,
no descriptor for events, no report. Where the runner may, it gets a user of its own as well.
"""

import ctypes
import os
import secrets
import signal
import socket
import stat
import sys
import tempfile
from pathlib import Path, PurePosixPath
from typing import NoReturn

from grader.runner import audit, landlock, reaper
from grader.runner.integrity import Snapshot
from grader.runner.protocol import Job

# Of users that no system gives out. Which of them is left to chance: containers of one host share their numbers, and
# the kernel counts by number what a user has.
_FIRST_USER, _USERS = 64_000, 1_000
_KEPT = ("PATH", "LANG", "LC_ALL", "OMP_NUM_THREADS", "PYTHONHASHSEED", "CUDA_VISIBLE_DEVICES")
_SOCKET = 3


def belongs_to_code(path: PurePosixPath, job: Job) -> bool:
    """Whether a file of the job's tar is for the process of the code under test."""
    below = str(path)
    return (
        below.startswith(f"labs/{job.folder}/src/")
        or path.name == "chapter.toml"
        or path.parts[0] == "data"
        or "solutions" in path.parts
    )


def belongs_to_tests(path: PurePosixPath, job: Job) -> bool:
    """Whether a file of the job's tar is for the process of the tests: all but the submitted files."""
    return not str(path).startswith(f"labs/{job.folder}/src/")


def why_same_user() -> str | None:
    """Return why the process keeps the runner's user, or None if it gets one of its own."""
    if os.geteuid() != 0:
        return "the runner is not root"
    import torch

    import shared

    for file in (os.__file__, torch.__file__, shared.__file__, str(base())):
        for folder in Path(file).resolve().parents:
            if not folder.stat().st_mode & stat.S_IXOTH:
                return f"other users cannot enter {folder}, where the libraries are"
    return None


def gaps() -> list[str]:
    """Return what separates the two processes less than it could here, a sentence each."""
    found = []
    if reason := why_same_user():
        found.append(f"the code ran as the same user as the tests: {reason}")
    if not landlock.version():
        found.append("the code could read what its user may read: this kernel has no Landlock")
    return found


def base() -> Path:
    """Return the folder for work folders: the usual one if any user may enter it, else /tmp."""
    usual = Path(tempfile.gettempdir()).resolve()
    open_to_all = all(f.stat().st_mode & stat.S_IXOTH for f in (usual, *usual.parents))
    return usual if open_to_all else Path("/tmp")


def start(job: Job, work: Path, tars: list[bytes], output: int, snapshot: Snapshot) -> socket.socket:
    """Start the process and return the socket to it.

    Args:
        job: what to run.
        work: its folder, written already.
        tars: holds the job's tar, which the process must not keep: it has the tests.
        output: descriptor for what it prints.
        snapshot: of everything before.
    """
    ours, theirs = socket.socketpair()
    user = None if why_same_user() else _FIRST_USER + secrets.randbelow(_USERS)
    if user is not None:
        for path in (work, *work.rglob("*")):
            os.chown(path, user, user)
    if os.fork() == 0:
        tars.clear()
        ours.close()
        _become(job, work, user, theirs.detach(), output, snapshot)
    theirs.close()
    return ours


def _become(
    job: Job, work: Path, user: int | None, connection: int, output: int, snapshot: Snapshot
) -> NoReturn:
    try:
        os.setsid()
        reaper.die_with_parent()
        reaper.be_first_to_go()
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.dup2(null, 0)
        os.dup2(connection, _SOCKET)
        os.closerange(_SOCKET + 1, 1 << 16)
        sys.stdin = os.fdopen(0, closefd=False)
        sys.stdout = os.fdopen(1, "w", closefd=False, errors="backslashreplace")
        sys.stderr = os.fdopen(2, "w", closefd=False, errors="backslashreplace")
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        from grader.runner import child

        child.limit(job)
        _give_up_rights(user)
        reaper.die_with_parent()  # changing the user undoes it
        _settle(job, work)
        if landlock.version():
            landlock.restrict(_readable(), [work, Path("/dev/null"), Path("/dev/shm")])
        _serve(job, work, snapshot)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _readable() -> list[Path]:
    """What the libraries need: the interpreter and its packages, and what the system says about itself."""
    import grader
    import shared

    system = ["/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/etc/fonts", "/proc/self",
              "/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/filesystems", "/sys/devices/system",
              "/sys/fs/cgroup", "/dev/zero", "/dev/random", "/dev/urandom"]  # fmt: skip
    packages = [path for path in sys.path if path.endswith("site-packages")]
    own = [Path(module.__file__ or "").parent for module in (shared, grader)]
    return [Path(p) for p in (sys.prefix, sys.base_prefix, *packages, *system)] + own


def _settle(job: Job, work: Path) -> None:
    os.chdir(work)
    temporary = work / "tmp"
    temporary.mkdir(exist_ok=True)
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    os.environ.clear()
    os.environ.update({**kept, "HOME": str(work), "TMPDIR": str(temporary), "MPLBACKEND": "Agg"})
    tempfile.tempdir = str(temporary)
    if (work / "data").is_dir():
        os.environ["TOPEKA_DATA"] = str(work / "data")
    sys.dont_write_bytecode = True
    sys.argv = ["code"]


def _serve(job: Job, work: Path, snapshot: Snapshot) -> None:
    from shared.apart.server import Server
    from shared.apart.wire import Channel
    from shared.code_under_test import CodeUnderTest
    from shared.course import find_lab

    lab = find_lab(work / "labs" / job.folder / "src")
    if lab is None:
        raise RuntimeError(f"no chapter.toml lists {job.folder}")
    snapshot.take()
    said: set[str] = set()

    def look() -> list[str]:
        new = [f"changed {name}" for name in snapshot.changes(everything=False)]
        fresh = [what for what in new if what not in said]
        said.update(fresh)
        return fresh

    def found(what: str) -> None:
        if what not in said:
            said.add(what)
            server.found(what)

    server = Server(Channel(socket.socket(fileno=_SOCKET)), CodeUnderTest(lab, lab.path / "src"), look)
    owner = audit.Owner(lab.path / "src", work / "tmp")
    audit.watch(owner, lab.path / "tests", snapshot.is_protected, found)
    server.serve()


def _give_up_rights(user: int | None) -> None:
    """Become `user`, or without one lose what root may do beyond its own files (Linux)."""
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    if user is None and os.geteuid() == 0:
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
        if libc.capset(header, (ctypes.c_uint32 * 6)()) != 0:
            raise OSError(ctypes.get_errno(), "the capabilities cannot be given up")
