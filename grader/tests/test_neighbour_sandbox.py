"""Grading over a Unix socket, with the listener that the grader's container runs; here it is a plain process."""

import contextlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from grader.grading import grade_lab
from grader.report import LabReport, Status
from grader.runner.listener import MAX_CLIENTS
from grader.runner.protocol import Job, Limits
from grader.sandbox import SandboxFailed
from grader.sandbox.neighbour import SOCKET_VARIABLE, NeighbourSandbox, NeighbourUnusable, socket_path
from grader.submission import pack

from .conftest import lives

RIGHT = "def double(x):\n    return x * 2\n\n\ndef is_even(n):\n    return n % 2 == 0\n"
HANGS = RIGHT.replace("return x * 2", "__import__('time').sleep(1e6)")


def until(condition: Callable[[], object], within_s: float = 20.0) -> bool:
    waiting = threading.Event()
    for _ in range(int(within_s / 0.02)):
        if condition():
            return True
        waiting.wait(0.02)
    return False


class Listener:
    """`python -m grader.runner --socket`, as docker/sandbox/start runs it."""

    def __init__(self, folder: Path, preload: str) -> None:
        self.folder = folder
        self.path = folder / "grader.sock"
        self._preload = preload

    def start(self) -> None:
        command = [sys.executable, "-P", "-m", "grader.runner", "--socket", str(self.path)]
        self._process = subprocess.Popen([*command, "--preload", self._preload], cwd=self.folder)
        assert until(self._answers, 60), "the listener does not come up"

    def _answers(self) -> bool:
        assert self._process.poll() is None
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.path)) == 0

    def jobs(self) -> list[psutil.Process]:
        """What runs below it: a process for each client, and its job."""
        children = psutil.Process(self._process.pid).children(recursive=True)
        return [child for child in children if lives(child)]

    def end(self, how: int = signal.SIGKILL) -> int:
        self._process.send_signal(how)
        return self._process.wait(20)


def listener(preload: str) -> Iterator[Listener]:
    folder = Path(tempfile.mkdtemp(prefix="topeka-", dir="/tmp"))  # a socket's path must be short
    listener = Listener(folder, preload)
    listener.start()
    yield listener
    listener.end()
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def neighbour() -> Iterator[Listener]:
    """A listener that all tests share; it has imported torch."""
    yield from listener("torch,numpy")


@pytest.fixture
def own() -> Iterator[Listener]:
    """A listener that a test may harm."""
    yield from listener("numpy")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("expected")


def grade(course, sandbox: NeighbourSandbox, code: str, cache: Path, **options: float) -> LabReport:
    return grade_lab(
        course, course.labs[0], sandbox, {"numbers_lab.py": code.encode()}, cache=cache, **options
    )


def hanging_job(course) -> tuple[Job, bytes]:
    job = Job(id="x", folder="ch01_numbers/lab01_double", preload=(), limits=Limits(timeout_s=600))
    return job, pack(course, course.labs[0], {"numbers_lab.py": HANGS.encode()})


def test_one_client_gets_right_verdicts_one_after_the_other(course, neighbour, cache):
    with NeighbourSandbox(neighbour.path) as sandbox:
        assert sandbox.machine.libraries["torch"]
        assert sandbox.isolation.sandbox == "docker"
        assert "shared by all gradings of this workspace" in sandbox.isolation.note
        assert grade(course, sandbox, RIGHT, cache).status is Status.VERIFIED
        report = grade(course, sandbox, RIGHT.replace("x * 2", "x * 3"), cache)
        assert (report.status, report.reason) == (Status.FAILED, "4 of 5 tests failed")
        assert grade(course, sandbox, HANGS, cache, timeout_s=1.0).status is Status.TIMEOUT
        assert grade(course, sandbox, RIGHT, cache).status is Status.VERIFIED
    assert until(lambda: not neighbour.jobs())


def test_several_clients_at_once(course, neighbour, cache):
    def run(code: str) -> Status:
        with NeighbourSandbox(neighbour.path) as sandbox:
            return grade(course, sandbox, code, cache).status

    codes = [RIGHT, RIGHT.replace("x * 2", "x * 3"), RIGHT, "import os\nos.kill(os.getpid(), 9)"]
    with ThreadPoolExecutor(len(codes)) as pool:
        assert list(pool.map(run, codes)) == [
            Status.VERIFIED,
            Status.FAILED,
            Status.VERIFIED,
            Status.ERROR,
        ]


def test_more_clients_than_there_are_places_are_told_so(neighbour):
    assert until(lambda: not neighbour.jobs())
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(NeighbourSandbox(neighbour.path)) for _ in range(MAX_CLIENTS)]
        with pytest.raises(NeighbourUnusable, match=f"{MAX_CLIENTS} gradings at a time: try again when"):
            NeighbourSandbox(neighbour.path)
        clients[0].close()
        assert until(lambda: len(neighbour.jobs()) < MAX_CLIENTS)
        stack.enter_context(NeighbourSandbox(neighbour.path))


def test_a_client_that_leaves_mid_job_ends_the_job(course, neighbour):
    assert until(lambda: not neighbour.jobs())
    sandbox = NeighbourSandbox(neighbour.path)
    events = sandbox.run(*hanging_job(course))
    assert any(event["event"] == "test_started" for event in events)
    assert len(neighbour.jobs()) == 2
    events.close()
    assert until(lambda: not neighbour.jobs())


def test_a_client_that_is_killed_mid_job_ends_the_job(course, neighbour, tmp_path):
    assert until(lambda: not neighbour.jobs())
    tar = tmp_path / "job.tar"
    tar.write_bytes(hanging_job(course)[1])
    program = (
        "import sys; from pathlib import Path; from grader.runner.protocol import Job, Limits\n"
        "from grader.sandbox.neighbour import NeighbourSandbox\n"
        "job = Job(id='x', folder='ch01_numbers/lab01_double', preload=(), limits=Limits(timeout_s=600))\n"
        "for event in NeighbourSandbox(Path(sys.argv[1])).run(job, Path(sys.argv[2]).read_bytes()):\n"
        "    print(event['event'], flush=True)\n"
    )
    command = [sys.executable, "-c", program, str(neighbour.path), str(tar)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as client:
        assert any(line == b"test_started\n" for line in client.stdout)
        assert len(neighbour.jobs()) == 2
        client.kill()
    assert until(lambda: not neighbour.jobs())


def test_a_client_that_talks_nonsense_harms_only_itself(course, neighbour, cache):
    with NeighbourSandbox(neighbour.path) as sandbox:
        with socket.socket(socket.AF_UNIX) as rude:
            rude.connect(str(neighbour.path))
            rude.sendall(b"GET / HTTP/1.1\r\n\r\n")
            rude.settimeout(20)
            while rude.recv(1 << 16):
                pass  # its ready line, then the end
        assert grade(course, sandbox, RIGHT, cache).status is Status.VERIFIED


def test_a_job_cannot_bring_modules_into_the_runners_of_others(course, neighbour, cache):
    """Jobs can write to the runner's current folder, and a lab may name modules to import before its job."""
    planted = neighbour.folder / "planted"
    body = f"""
with open({str(neighbour.folder / "colorsys.py")!r}, "w") as file:
    file.write("open({str(planted)!r}, 'w').close()")
"""
    lab = course.labs[0].model_copy(update={"preload": ("torch", "colorsys")})
    with NeighbourSandbox(neighbour.path) as sandbox:
        assert grade(course, sandbox, body + RIGHT, cache).status is Status.VERIFIED
        assert (neighbour.folder / "colorsys.py").exists()
        report = grade_lab(course, lab, sandbox, {"numbers_lab.py": RIGHT.encode()}, cache=cache)
    assert report.status is Status.VERIFIED
    assert not planted.exists()


def test_only_the_sockets_group_may_connect(neighbour):
    assert stat.S_IMODE(neighbour.path.stat().st_mode) & 0o007 == 0


def test_a_stopped_runner_is_given_up_and_the_next_job_has_another(course, neighbour, cache, monkeypatch):
    monkeypatch.setattr("grader.sandbox.neighbour.GRACE_S", 1.0)
    stops = "import os, signal, time\nos.kill(os.getppid(), signal.SIGSTOP)\ntime.sleep(1e6)\n"
    with NeighbourSandbox(neighbour.path) as sandbox:
        report = grade(course, sandbox, stops + RIGHT, cache, timeout_s=1.0)
        assert report.status is Status.ERROR
        assert "went away in the middle of a job: timed out" in report.reason
        assert grade(course, sandbox, RIGHT, cache).status is Status.VERIFIED
    for process in neighbour.jobs():  # it stays stopped until the container ends
        if process.status() == psutil.STATUS_STOPPED:
            process.kill()


def test_a_listener_killed_mid_job_is_an_error_and_works_again_after_its_restart(course, own):
    sandbox = NeighbourSandbox(own.path)
    events = sandbox.run(*hanging_job(course))
    assert any(event["event"] == "test_started" for event in events)
    below = own.jobs()
    assert len(below) == 2
    own.end(signal.SIGKILL)
    with pytest.raises(
        SandboxFailed, match="container ended in the middle of a job; `make logs` may say why"
    ):
        list(events)
    assert until(lambda: not any(process.is_running() for process in below))

    with pytest.raises(SandboxFailed, match="does not answer at"):  # still down
        list(sandbox.run(*hanging_job(course)))
    assert own.path.is_socket(), "the dead listener's socket is still there"
    own.start()
    events = sandbox.run(*hanging_job(course))
    assert any(event["event"] == "test_started" for event in events)
    events.close()


def test_a_listener_ends_at_once_when_it_is_told_to(course, own):
    sandbox = NeighbourSandbox(own.path)
    events = sandbox.run(*hanging_job(course))
    assert any(event["event"] == "test_started" for event in events)
    below = own.jobs()
    assert own.end(signal.SIGTERM) == 0
    assert until(lambda: not any(process.is_running() for process in below))
    events.close()


def test_nobody_listening_is_said_with_the_next_step(tmp_path):
    words = r"does not answer at .*: look at `make logs`, or use --sandbox local"
    with pytest.raises(NeighbourUnusable, match=words):
        NeighbourSandbox(tmp_path / "none.sock")
    folder = Path(tempfile.mkdtemp(prefix="topeka-", dir="/tmp"))
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(folder / "stale.sock"))
        with pytest.raises(NeighbourUnusable, match=words):
            NeighbourSandbox(folder / "stale.sock")
    finally:
        shutil.rmtree(folder)


def test_a_workspace_knows_its_neighbour_by_a_variable(neighbour, monkeypatch, tmp_path):
    monkeypatch.delenv(SOCKET_VARIABLE, raising=False)
    assert socket_path() is None
    monkeypatch.setenv(SOCKET_VARIABLE, str(tmp_path / "none.sock"))
    assert socket_path() is None
    monkeypatch.setenv(SOCKET_VARIABLE, os.fspath(neighbour.path))
    assert socket_path() == neighbour.path
