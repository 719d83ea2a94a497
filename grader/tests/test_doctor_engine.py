"""The Docker Engine as it answers and as it does not: real sockets, a real server, the real command `docker`."""

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pytest
from grader.doctor.answer import Answer
from grader.doctor.engine import (
    Engine,
    ask_engine,
    disk_findings,
    engine_finding,
    image_findings,
    read_engine,
    stack_findings,
    toolkit_finding,
)
from grader.doctor.finding import GB

NEEDS_DOCKER = pytest.mark.skipif(shutil.which("docker") is None, reason="no docker command")
INFO = {"ServerVersion": "28.2.2", "Runtimes": {"runc": {}}, "CgroupDriver": "cgroupfs", "DockerRootDir": "/"}


def _read(info: dict[str, Any], images: str = "", place: str = "unix:///var/run/docker.sock") -> Engine:
    return read_engine(Answer(json.dumps(info)), Answer(images), Answer(place))


# --- real engines ----------------------------------------------------------------------------------


class _Endpoints(BaseHTTPRequestHandler):
    """What `docker info` and `docker image ls` ask of an engine."""

    info: ClassVar[dict[str, Any]] = {}
    images: ClassVar[list[dict[str, Any]]] = []
    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(path)
        if path.endswith("/info"):
            self._answer(json.dumps(self.info).encode())
        elif path.endswith("/images/json"):
            self._answer(json.dumps(self.images).encode())
        else:
            self._answer(b"OK")

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Api-Version", "1.45")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


Serve = Callable[..., None]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Start a server on loopback that DOCKER_HOST names."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Endpoints)
    thread = Thread(target=server.serve_forever)

    def start(info: dict[str, Any], images: list[str]) -> None:
        _Endpoints.info, _Endpoints.asked = info, []
        _Endpoints.images = [{"Id": f"sha256:{i:064x}", "RepoTags": [n]} for i, n in enumerate(images)]
        monkeypatch.setenv("DOCKER_HOST", f"tcp://127.0.0.1:{server.server_port}")
        thread.start()

    yield start
    if thread.is_alive():
        server.shutdown()
        thread.join()
    server.server_close()


@NEEDS_DOCKER
def test_an_engine_with_everything(serve: Serve) -> None:
    serve(INFO | {"Runtimes": {"runc": {"path": "runc"}, "nvidia": {"path": "nvidia-container-runtime"}}},
          ["topeka-sandbox:cuda", "topeka-workspace:cuda"])  # fmt: skip
    engine = ask_engine()
    assert {path.rpartition("/")[2] for path in _Endpoints.asked} >= {"info", "json"}
    assert engine.version == "28.2.2"
    assert engine.images == {"topeka-sandbox:cuda", "topeka-workspace:cuda"}
    assert engine.is_remote
    assert engine.free_disk is None, "another machine's disk cannot be seen"
    assert all(f.state == "ok" for f in stack_findings(engine, "cuda", in_container=False))


@NEEDS_DOCKER
def test_an_engine_with_nothing(serve: Serve) -> None:
    serve(INFO, [])
    lacks = [f for f in stack_findings(ask_engine(), "cuda", in_container=False) if f.state == "missing"]
    assert [f.name for f in lacks] == ["NVIDIA Container Toolkit", "image topeka-sandbox:cuda"]


@NEEDS_DOCKER
def test_a_closed_port(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as used:
        used.bind(("127.0.0.1", 0))
        place = f"tcp://127.0.0.1:{used.getsockname()[1]}"  # taken, so nobody else gets it; not listening
        monkeypatch.setenv("DOCKER_HOST", place)
        engine = ask_engine()
    assert (engine.version, engine.endpoint) == ("", place)
    found = engine_finding(engine, in_container=False)
    assert found.state == "missing"
    assert "DOCKER_HOST" in found.remedy
    assert stack_findings(engine, "cuda", in_container=False) == [found], "the rest cannot be known"


@NEEDS_DOCKER
def test_a_dead_socket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as engine_that_ends:
        engine_that_ends.bind("docker.sock")
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path / 'docker.sock'}")
    engine = ask_engine()
    found = engine_finding(engine, in_container=False)
    assert "Cannot connect to the Docker daemon" in found.detail
    assert "systemctl start docker" in found.remedy
    inside = engine_finding(engine, in_container=True)
    assert "itself a container" in inside.detail
    assert "not isolated" in inside.remedy


def _asked_as_nobody() -> Engine:
    """Ask as a user whom permissions stop, which root is not.

    A fork, because that user may not be able to start Python anew from where it is installed.
    """
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            os.write(send, ask_engine().model_dump_json().encode())
        finally:
            os._exit(0)
    os.close(send)
    with os.fdopen(receive) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return Engine.model_validate_json(text)


@NEEDS_DOCKER
def test_a_socket_without_permission(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place = tmp_path / "docker.sock"
    for folder in (tmp_path, tmp_path.parent):
        folder.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DOCKER_HOST", f"unix://{place}")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("docker.sock")  # the whole path may be longer than a socket's name can be
        listening.listen()
        place.chmod(0)
        engine = _asked_as_nobody() if os.geteuid() == 0 else ask_engine()
    found = engine_finding(engine, in_container=False)
    if "permission denied" not in found.detail:
        assert any(not f.stat().st_mode & 0o001 for f in tmp_path.parents)
        pytest.skip("the folder of temporary files is closed to other users")
    assert found.detail == f"permission denied at unix://{place}"
    assert "usermod -aG docker" in found.remedy


@NEEDS_DOCKER
def test_the_engine_of_this_machine() -> None:
    engine = ask_engine()
    if not engine.version:
        pytest.skip(f"no engine answers: {engine.trouble}")
    root = subprocess.run(
        ["docker", "info", "--format", "{{.DockerRootDir}}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert engine.cgroup_driver in {"systemd", "cgroupfs"}
    if not engine.is_remote and Path(root).is_dir():
        assert engine.free_disk == pytest.approx(shutil.disk_usage(root).free, rel=0.2)


# --- judgement -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "has"),
    [
        ({}, False),
        ({"Runtimes": {"nvidia": {}, "runc": {}}}, True),
        ({"Runtimes": None, "DiscoveredDevices": [{"Source": "cdi", "ID": "nvidia.com/gpu=0"}]}, True),
        ({"DiscoveredDevices": [{"Source": "cdi", "ID": "example.com/nic=nvidia"}]}, False),
        ({"DiscoveredDevices": None}, False),
    ],
)
def test_gpu_support_is_read_from_runtimes_and_devices(more: dict[str, Any], has: bool) -> None:
    assert _read(INFO | more).has_nvidia == has


def test_a_toolkit_that_was_not_configured() -> None:
    installed = toolkit_finding(Engine(version="28", has_toolkit=True))
    assert installed.remedy.startswith("sudo nvidia-ctk runtime configure")
    absent = toolkit_finding(Engine(version="28"))
    assert absent.state == "missing"
    assert absent.remedy.startswith("install it")


def test_a_member_of_the_group_logs_in_again() -> None:
    engine = Engine(trouble="permission denied while trying to connect", in_docker_group=True)
    assert "log out and in again" in engine_finding(engine, in_container=False).remedy


def test_no_docker_command() -> None:
    engine = read_engine(Answer("", "the program docker is not installed"), Answer(""), Answer(""))
    assert "docs.docker.com/engine/install" in engine_finding(engine, in_container=False).remedy
    assert "itself a container" in engine_finding(engine, in_container=True).detail


def test_a_socket_that_is_forbidden_inside_a_container_is_no_missing_engine() -> None:
    engine = Engine(trouble="permission denied while trying to connect")
    assert "permission denied" in engine_finding(engine, in_container=True).detail


def test_images() -> None:
    sandbox, workspace = image_findings(_read(INFO, "topeka-sandbox:cpu"), "cuda")
    assert (sandbox.state, sandbox.remedy) == ("missing", "make images STACK=cuda")
    assert (workspace.state, workspace.remedy) == ("warning", "make images STACK=cuda")


def test_disk() -> None:
    built = frozenset({"topeka-sandbox:cuda"})
    assert disk_findings(Engine(version="28"), "cuda") == []
    (short,) = disk_findings(Engine(version="28", free_disk=20 * GB), "cuda")
    assert short.state == "missing"
    assert "20.0 GB free" in short.detail
    assert "40.0 GB" in short.detail
    assert disk_findings(Engine(version="28", free_disk=20 * GB), "cpu")[0].state == "ok"
    assert disk_findings(Engine(version="28", free_disk=20 * GB, images=built), "cuda")[0].state == "ok"
    assert disk_findings(Engine(version="28", free_disk=GB, images=built), "cuda")[0].state == "warning"


def test_the_free_disk_is_the_engines() -> None:
    assert _read(INFO).free_disk == pytest.approx(shutil.disk_usage("/").free, rel=0.2)
    assert _read(INFO | {"DockerRootDir": "/nowhere/docker"}).free_disk is None
    assert _read(INFO | {"DockerRootDir": ""}).free_disk is None
    assert _read(INFO, place="ssh://me@box").free_disk is None


def test_systemd_may_take_gpus_away() -> None:
    engine = _read(INFO | {"Runtimes": {"nvidia": {}}, "CgroupDriver": "systemd"})
    (found,) = [f for f in stack_findings(engine, "cuda", in_container=False) if f.name == "cgroup driver"]
    assert found.state == "warning"
    assert "daemon-reload" in found.detail
    assert not any(f.name == "cgroup driver" for f in stack_findings(engine, "cpu", in_container=False))
