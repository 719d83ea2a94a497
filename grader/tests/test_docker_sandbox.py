"""Grading in containers, on a real engine with the real image."""

import contextlib
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from docker.errors import DockerException
from grader.catalog import load
from grader.expected import expected_tests
from grader.grading import grade, grade_lab
from grader.machine import describe
from grader.report import Status, Trust
from grader.runner.protocol import Job, Limits
from grader.sandbox import SandboxFailed
from grader.sandbox.docker import ContainerLimits, DockerSandbox, EngineUnusable, connect, is_available, sweep
from grader.submission import pack, read_code
from shared.plugin import NOT_VERIFIED_HERE

from grader import diagnosis

RIGHT = "def double(x):\n    return x * 2\n\n\ndef is_even(n):\n    return n % 2 == 0\n"
# Tells where it runs by way of the test's message.
TELLS_ITS_HOST = (
    "import os\n\n\ndef double(x):\n    return os.uname().nodename\n\n\ndef is_even(n):\n    return n\n"
)
HANGS = RIGHT.replace("return x * 2", "__import__('time').sleep(1e6)")
SMALL = ContainerLimits(memory_bytes=1 << 30, scratch_bytes=64 << 20, shared_memory_bytes=16 << 20)


def code(source: str) -> dict[str, bytes]:
    return {"numbers_lab.py": source.encode()}


def hanging_job(course) -> tuple[Job, bytes]:
    """A job that needs no torch, so that its container is there in a second."""
    job = Job(id="x", folder="ch01_numbers/lab01_double", preload=(), limits=Limits(timeout_s=600))
    return job, pack(course, course.labs[0], code(HANGS))


def until(condition, within_s: float = 30.0) -> bool:
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture(scope="module")
def docked(image) -> Iterator[DockerSandbox]:
    """A sandbox with a container waiting at any time."""
    with DockerSandbox(image=image, threads=1, limits=SMALL) as sandbox:
        sandbox.start()
        yield sandbox


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("expected")


# --- verdicts -----------------------------------------------------------------------------------------


def test_the_solutions_are_verified_and_the_report_says_where(course, docked, engine, image, cache):
    report = grade(course, course.labs, docked, code="solutions", cache=cache)
    assert [lab.status for lab in report.labs] == [Status.VERIFIED] * 2
    (milestone,) = report.labs[1].milestones
    assert (milestone.name, milestone.reached, milestone.better) == ("largest error", True, "lower")
    isolation = report.isolation
    assert (isolation.sandbox, isolation.isolated) == ("docker", True)
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", isolation.image_digest)
    assert isolation.image_digest == engine.images.get(image).id
    assert {"no network", "read-only root", "no capabilities", "no new privileges"} <= set(isolation.flags)


def test_the_report_describes_the_container_and_not_this_machine(docked, engine, image):
    machine = docked.machine
    inside = engine.images.get(image).labels["topeka.versions"]
    assert f'"torch": "{machine.libraries["torch"]}"' in inside
    assert f'"triton": "{machine.libraries["triton"]}"' in inside
    assert machine.memory_bytes == SMALL.memory_bytes < describe().memory_bytes


def test_the_skeleton_is_not_attempted(course, docked, cache):
    skeleton = (course.labs[0].path / "src" / "numbers_lab.py").read_text()
    report = grade_lab(course, course.labs[0], docked, code(skeleton), cache=cache)
    assert report.status is Status.NOT_ATTEMPTED
    assert report.tests[0].message == "not written yet: twice a number"


def test_wrong_code_fails_and_a_signature_made_outside_names_the_misconception(
    course, docked, sandbox, cache
):
    """The messages are the same in a container and here, or no diagnosis would be found there."""
    lab = course.labs[0]
    wrong = code(RIGHT.replace("x * 2", "x * 2 + 1"))
    here = grade_lab(course, lab, sandbox, wrong)
    diagnosis.write_signatures(lab, {"wrong_factor": diagnosis.signature(here.tests)})
    report = grade_lab(course, lab, docked, wrong, cache=cache)
    assert report.status is Status.FAILED
    assert report.reason == "4 of 5 tests failed"
    assert report.diagnosis is not None
    assert report.diagnosis.hint == "You are off by one somewhere."
    assert report.diagnosis.likeness == 1.0


# --- the pool -----------------------------------------------------------------------------------------


def test_a_job_gets_a_container_that_waited_for_it_and_that_is_then_destroyed(
    course, docked, containers_of, is_gone, cache
):
    expected_tests(course, course.labs[0], lambda: docked, cache)  # takes a container unless known
    docked.start()
    waiting = {future.result().container.id for future in docked._waiting}
    assert waiting
    assert waiting <= {c.id for c in containers_of(os.getpid()) if c.status == "running"}
    used = set()
    for _ in range(2):
        report = grade_lab(course, course.labs[0], docked, code(TELLS_ITS_HOST), cache=cache)
        assert report.status is Status.FAILED
        used.add(re.match(r"got ([0-9a-f]{12}):", report.tests[0].message).group(1))
    assert len(used) == 2, "each job gets a container of its own"
    assert {c[:12] for c in waiting} & used
    assert all(is_gone(container) for container in used)
    # Destroyed or waiting, nothing else.
    assert until(lambda: len(containers_of(os.getpid())) <= 2)


def test_modules_are_imported_before_the_job_comes(course, image, cache):
    """Those of the sandbox while the container waits, those of a job it was not made for just before."""
    needs = "import sys\n\nassert {'colorsys', 'wave'} <= sys.modules.keys()\n" + RIGHT
    lab = course.labs[0].model_copy(update={"preload": ("wave",)})
    with DockerSandbox(image=image, preload=("torch", "numpy", "colorsys")) as sandbox:
        sandbox.start()
        assert grade_lab(course, lab, sandbox, code(needs), cache=cache).status is Status.VERIFIED


@pytest.mark.parametrize(
    ("limits", "job", "container"),
    [(None, 4, 6), (None, 12, 14), (ContainerLimits(memory_bytes=5 << 30), 12, 5)],
)
def test_a_container_has_the_memory_that_its_job_may_use(
    course, image, containers_of, limits, job, container
):
    lab = course.labs[0]
    job = Job(
        id="x",
        folder="ch01_numbers/lab01_double",
        preload=(),
        limits=Limits(memory_bytes=job << 30, timeout_s=60),
    )
    with DockerSandbox(image=image, preload=("numpy",), pool=0, limits=limits) as sandbox:
        before = {c.id for c in containers_of(os.getpid())}
        events = sandbox.run(job, pack(course, lab, read_code(lab, lab.path / "solutions")))
        assert next(events)["event"] == "started"
        (mine,) = (c for c in containers_of(os.getpid()) if c.id not in before)
        mine.reload()
        config = mine.attrs["HostConfig"]
        assert (config["Memory"], config["MemorySwap"]) == (container << 30, container << 30)
        assert [e["end"] for e in events if e["event"] == "finished"] == ["exited"]


def test_two_sandboxes_at_once_do_not_disturb_each_other(course, image, cache):
    def run(source: str) -> Status:
        with DockerSandbox(image=image, threads=1) as sandbox:
            return grade_lab(course, course.labs[0], sandbox, code(source), cache=cache).status

    with ThreadPoolExecutor(2) as pool:
        right, wrong = pool.map(run, (RIGHT, RIGHT.replace("x * 2", "x * 3")))
    assert right is Status.VERIFIED
    assert wrong is Status.FAILED


def test_a_container_that_died_while_it_waited_is_replaced(course, docked, engine, cache):
    docked.start()
    for future in docked._waiting:
        engine.containers.get(future.result().container.id).kill()
    assert grade_lab(course, course.labs[0], docked, code(RIGHT), cache=cache).status is Status.VERIFIED


# --- strict trust ---------------------------------------------------------------------------------------

WHO_AM_I = """
import os

def double(x):
    with open("/proc/self/status") as file:
        capabilities = [line.split()[1] for line in file if line.startswith("CapEff")]
    raise ValueError(f"uid {os.getuid()} gid {os.getgid()} groups {os.getgroups()} caps {int(capabilities[0], 16)}")

def is_even(n):
    return n % 2 == 0
"""


def test_strict_code_has_a_user_of_its_own_and_no_capabilities(course, image, cache):
    manifest = course.labs[0].path.parent / "chapter.toml"
    manifest.write_text(manifest.read_text().replace("[[lab]]", "[[lab]]\nstrict = true", 1))
    lab = load(course.root).labs[0]
    users = {}
    with DockerSandbox(image=image, preload=("torch",), threads=1, limits=SMALL) as sandbox:
        for trust in (Trust.STRICT, Trust.SAME_PROCESS, Trust.STRICT):
            report = grade_lab(course, lab, sandbox, code(WHO_AM_I), trust=trust, cache=cache)
            assert report.status is Status.FAILED
            assert report.trust_gaps == ()
            found = re.search(r"uid (\d+) gid (\d+) groups \[(\d*)\] caps 0\b", report.tests[0].message)
            assert found, report.tests[0].message
            users[trust] = int(found[1])
            strict = trust is Trust.STRICT
            assert ("non-root user" in sandbox.isolation.flags) is not strict
            assert any("of its own for the code under test" in f for f in sandbox.isolation.flags) is strict
            if strict:
                assert found[3] == ""
                right = grade_lab(course, lab, sandbox, code(RIGHT), trust=trust, cache=cache)
                assert right.status is Status.VERIFIED, right.reason
    assert 64_000 <= users[Trust.STRICT] < 65_000
    assert 20_000 <= users[Trust.SAME_PROCESS] < 60_000


# --- jobs that may run only once ------------------------------------------------------------------------


def test_a_sole_jobs_container_has_its_name_and_ends_the_earlier_attempt(course, image, engine, cache):
    """As when a worker was cut off, its container works on, and the submission is graded again elsewhere."""
    name = f"topeka-sole-{os.getpid()}"
    job, tar = hanging_job(course)
    with DockerSandbox(image=image, preload=("numpy",), limits=SMALL) as first:
        events = first.run(replace(job, id=name.removeprefix("topeka-"), sole=True), tar)
        assert next(events)["event"] == "started"
        earlier = engine.containers.get(name)
        assert earlier.status == "running"
        report = grade_lab(
            course, course.labs[0], first, code(RIGHT), cache=cache, job_id=name.removeprefix("topeka-")
        )
        assert report.status is Status.VERIFIED
        with pytest.raises(SandboxFailed, match="ended in the middle"):
            list(events)


def test_a_container_that_is_not_ours_keeps_its_name(course, image, engine, cache):
    stranger = engine.containers.create(image, name=f"topeka-stranger-{os.getpid()}")
    try:
        with DockerSandbox(image=image, preload=("numpy",), limits=SMALL) as sandbox:
            report = grade_lab(
                course,
                course.labs[0],
                sandbox,
                code(RIGHT),
                cache=cache,
                job_id=f"stranger-{os.getpid()}",
            )
        assert report.status is Status.ERROR
        assert report.reason == (
            f"a container that is not ours has the name topeka-stranger-{os.getpid()}: rename or remove it"
        )
        stranger.reload()  # it is still there
    finally:
        stranger.remove(force=True)


# --- clients that leave -------------------------------------------------------------------------------


def test_leaving_a_run_half_way_destroys_its_container(course, image, containers_of):
    job, tar = hanging_job(course)
    with DockerSandbox(image=image, preload=("numpy",), limits=SMALL) as sandbox:
        events = sandbox.run(job, tar)
        assert next(events)["event"] == "started"
        before = {c.id for c in containers_of(os.getpid())}
        events.close()
        assert until(lambda: len(before - {c.id for c in containers_of(os.getpid())}) == 1)


CLIENT = """
import sys
from pathlib import Path
from grader.runner.protocol import Job, Limits
from grader.sandbox.docker import DockerSandbox

with DockerSandbox(image=sys.argv[1], preload=("numpy",), pool=2) as sandbox:
    job = Job(id="x", folder="ch01_numbers/lab01_double", preload=(), limits=Limits(timeout_s=600))
    for event in sandbox.run(job, Path(sys.argv[2]).read_bytes()):
        print(event["event"], flush=True)
"""


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "SIGKILL"])
def test_a_client_that_ends_mid_job_leaves_no_container(course, image, containers_of, tmp_path, end):
    tar = tmp_path / "job.tar"
    tar.write_bytes(hanging_job(course)[1])
    command = [sys.executable, "-c", CLIENT, image, str(tar)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as client:
        try:
            assert any(line == b"test_started\n" for line in client.stdout), client.stderr.read().decode()
            assert until(lambda: len(containers_of(client.pid)) == 3)  # one works, two wait
            client.send_signal(end)
            client.wait(30)
            assert until(lambda: not containers_of(client.pid))
        finally:
            client.kill()
    if end is signal.SIGINT:
        assert client.returncode not in (0, -signal.SIGKILL)


def test_sweep_removes_what_dead_clients_of_this_host_left_and_nothing_else(engine, image, is_gone):
    dead = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    alive = psutil.Process()
    born = psutil.Process(dead.pid).create_time()
    dead.communicate()
    host = socket.gethostname()
    made = {
        "dead": f"{host} {dead.pid} {born:.2f}",
        "number given anew": f"{host} {alive.pid} {born - 1000:.2f}",
        "alive": f"{host} {alive.pid} {alive.create_time():.2f}",
        "of another host": f"elsewhere {dead.pid} {born:.2f}",
        "unreadable": "nonsense",
    }
    containers = {
        name: engine.containers.create(image, labels={"topeka.sandbox": "cpu", "topeka.client": label}).id
        for name, label in made.items()
    }
    stranger = engine.containers.create(image).id
    try:
        sweep(engine)
        left = {c.id for c in engine.containers.list(all=True)}
        assert {name for name, container in containers.items() if container in left} == {
            "alive",
            "of another host",
            "unreadable",
        }
        assert stranger in left
    finally:
        for container in (*containers.values(), stranger):
            with contextlib.suppress(DockerException):
                engine.containers.get(container).remove(force=True)


# --- engines ------------------------------------------------------------------------------------------


def test_a_missing_image_is_named_with_the_command_that_builds_it(engine):
    with pytest.raises(
        EngineUnusable,
        match="no image topeka-sandbox:never-built: build it with `make images STACK=cpu`, or use --sandbox local",
    ):
        DockerSandbox(image="topeka-sandbox:never-built")


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("host", ["unix:///nonexistent/docker.sock", "tcp://127.0.0.1:{port}"])
def test_no_engine_is_said_with_the_next_step(monkeypatch, host):
    host = host.format(port=closed_port())
    monkeypatch.setenv("DOCKER_HOST", host)
    assert not is_available("cpu")
    with pytest.raises(EngineUnusable, match=f"no Docker Engine answers at {host} .*or use --sandbox local"):
        connect()
    command = [str(Path(sys.executable).with_name("topeka")), "grade", "ch01/lab01", "--sandbox", "docker"]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=60)
    assert done.returncode == 3
    assert "no Docker Engine answers" in " ".join((done.stdout + done.stderr).split())
    assert "Traceback" not in done.stderr


class Forwarder:
    """A TCP port of this machine that leads to a Unix socket, as a remote engine would look."""

    def __init__(self, target: str) -> None:
        self._target = target
        self.port = 0
        self.open()

    def open(self) -> None:
        """Accept connections, at the same port as before."""
        self._server = socket.create_server(("127.0.0.1", self.port))
        self.port = self._server.getsockname()[1]
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._server.accept()
                far = socket.socket(socket.AF_UNIX)
                far.connect(self._target)
                self._open += [near, far]
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=(one, other), daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        """End every connection and accept no more."""
        for each in (self._server, *self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


@pytest.fixture
def far_engine(engine, monkeypatch) -> Iterator[Forwarder]:
    """The engine behind a TCP port, named by DOCKER_HOST."""
    where = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    if not where.startswith("unix://"):
        pytest.skip(f"{NOT_VERIFIED_HERE}: the engine at {where} has no socket on this machine")
    forwarder = Forwarder(where.removeprefix("unix://"))
    monkeypatch.setenv("DOCKER_HOST", f"tcp://127.0.0.1:{forwarder.port}")
    yield forwarder
    forwarder.cut()


def test_an_engine_over_tcp_grades_as_well(course, image, far_engine, containers_of, cache):
    with DockerSandbox(image=image, threads=1, limits=SMALL) as sandbox:
        report = grade_lab(course, course.labs[0], sandbox, code(RIGHT), cache=cache)
    assert report.status is Status.VERIFIED


def test_losing_the_way_to_the_engine_mid_job_is_an_error_and_leaves_no_container(
    course, image, far_engine, containers_of
):
    before = {c.id for c in containers_of(os.getpid())}
    job, tar = hanging_job(course)
    with DockerSandbox(image=image, preload=("numpy",), limits=SMALL) as sandbox:
        events = sandbox.run(job, tar)
        assert next(events)["event"] == "started"
        # Not before the next container has begun to wait, for a container that was not started yet
        # knows no end of its input: it stays until the engine can be told to remove it.
        assert until(lambda: sandbox._waiting[0].done())
        far_engine.cut()
        with pytest.raises(SandboxFailed, match="Docker Engine went away in the middle of a job"):
            list(events)
        assert until(lambda: {c.id for c in containers_of(os.getpid())} <= before)

        far_engine.open()
        events = sandbox.run(job, tar)  # the same sandbox works on
        assert next(events)["event"] == "started"
        events.close()
    assert until(lambda: {c.id for c in containers_of(os.getpid())} <= before)


def test_a_container_that_could_not_be_removed_is_removed_when_the_engine_is_back(
    course, image, engine, far_engine, is_gone
):
    with DockerSandbox(image=image, preload=("numpy",), limits=SMALL) as sandbox:
        sandbox.start()
        warm = sandbox._waiting.pop().result()
        created = sandbox._client.containers.create(image)  # as if lost before its start
        far_engine.cut()
        sandbox._destroy(warm)
        sandbox._discard(created)
        assert engine.containers.get(created.id).status == "created"
        far_engine.open()
        sandbox.start()
        assert is_gone(created.id)
        assert is_gone(warm.container.id)


# --- an engine that dies ------------------------------------------------------------------------------

# Says what a runner says, then ignores whatever comes, the end of its input too.
TINY_RUNNER = """#!/bin/sh
echo '{{"event": "ready", "pid": 1, "machine": {machine}}}'
read -r job
echo '{{"event": "started", "job": "x"}}'
exec /bin/sleep {marker}
"""
MARKER = "61061"


def tiny_image() -> bytes:
    """The root of a container: a shell, `sleep`, their libraries and a runner made of both."""
    buffer = io.BytesIO()
    files: dict[str, Path] = {}
    for name in ("sh", "sleep"):
        program = Path(shutil.which(name))
        files[f"bin/{name}"] = program.resolve()
        needed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
        for library in re.findall(r"(/\S+)", needed):
            files[library.lstrip("/")] = Path(library).resolve()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, file in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = file.stat().st_size, 0o755
            with file.open("rb") as stream:
                tar.addfile(entry, stream)
        script = TINY_RUNNER.format(machine=describe().model_dump_json(), marker=MARKER).encode()
        entry = tarfile.TarInfo("opt/topeka/bin/start")
        entry.size, entry.mode = len(script), 0o755
        tar.addfile(entry, io.BytesIO(script))
    return buffer.getvalue()


class PrivateEngine:
    """A Docker Engine of the test's own, which it may kill."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.host = f"unix://{folder}/docker.sock"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        options = {
            "data-root": self.folder / "data",
            "exec-root": self.folder / "exec",
            "pidfile": self.folder / "pid",
            "host": self.host,
            "bridge": "none",
            "iptables": "false",
            "ip6tables": "false",
            "storage-driver": "vfs",
        }
        with (self.folder / "log").open("ab") as log:
            # In a network of its own: with --bridge=none an engine deletes the machine's docker0, which may
            # belong to another engine.
            command = [
                "unshare",
                "--net",
                "dockerd",
                *(f"--{name}={value}" for name, value in options.items()),
            ]
            self._process = subprocess.Popen(command, stdout=log, stderr=log)

    def answers(self) -> bool:
        try:
            connect().close()
        except EngineUnusable:
            return False
        return True

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def processes(self) -> list[psutil.Process]:
        """What runs for it: containerd, shims, and what the containers hold."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            line = " ".join(process.info["cmdline"] or [])
            if str(self.folder) in line or line == f"/bin/sleep {MARKER}":
                found.append(process)
        return found

    def stop(self) -> None:
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        self._process.wait(20)
        for line in Path("/proc/mounts").read_text().splitlines():
            if str(self.folder) in (mount := line.split()[1]):
                subprocess.run(["umount", "--lazy", mount], check=False)
        shutil.rmtree(self.folder)


@pytest.fixture
def private_engine(engine, monkeypatch) -> Iterator[PrivateEngine]:
    """A second engine on this machine; where none can be had, the test is not verified here."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("dockerd", "ldd", "unshare"))):
        pytest.skip(f"{NOT_VERIFIED_HERE}: a second Docker Engine needs root, dockerd, unshare and ldd")
    private = PrivateEngine(Path(tempfile.mkdtemp(prefix="topeka-engine-", dir="/tmp")))  # a short path
    monkeypatch.setenv("DOCKER_HOST", private.host)
    private.start()
    try:
        if not until(private.answers):
            pytest.skip(
                f"{NOT_VERIFIED_HERE}: no second engine: {(private.folder / 'log').read_text()[-500:]}"
            )
        yield private
    finally:
        private.stop()


def test_an_engine_that_dies_mid_job_is_an_error_and_leaves_nothing_after_its_restart(course, private_engine):
    client = connect()
    client.api.import_image_from_data(tiny_image(), repository="topeka-sandbox", tag="cpu")
    job, tar = hanging_job(course)
    with DockerSandbox() as sandbox:
        events = sandbox.run(job, tar)
        assert next(events)["event"] == "started"
        private_engine.kill()
        with pytest.raises(SandboxFailed, match="Docker Engine went away in the middle of a job"):
            list(events)
        report = grade_lab(course, course.labs[0], sandbox, code(RIGHT))
        assert report.status is Status.ERROR
        assert "no container of topeka-sandbox:cpu could be started" in report.reason

        private_engine.start()
        assert until(private_engine.answers)
        assert until(lambda: client.containers.list(all=True) == [])
        assert [p for p in private_engine.processes() if "sleep" in p.name()] == []

        events = sandbox.run(job, tar)  # the same sandbox works on
        assert next(events)["event"] == "started"
        events.close()
    assert until(lambda: client.containers.list(all=True) == [])
    client.close()
