"""JupyterLab in the background: the real one, started by processes that end, as a command does."""

import http.client
import json
import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from grader.background import ServerFailed
from grader.notebook_server import FIRST_PORT, Server, start, stop

from .conftest import lives

# What a user's own configuration might say, and must not have its way.
CARELESS = """
c.ServerApp.ip = "0.0.0.0"
c.ServerApp.base_url = "/elsewhere/"
c.ServerApp.root_dir = "/"
c.IdentityProvider.token = ""
c.PasswordIdentityProvider.hashed_password = ""
"""
START = """
import sys
from pathlib import Path
from grader import notebook_server
print(notebook_server.start(Path(sys.argv[1]), Path(sys.argv[1]) / ".topeka").model_dump_json())
"""


class Running:
    """A course with its server."""

    def __init__(self, root: Path, environment: dict[str, str]) -> None:
        self.root, self.environment = root, environment
        self.state_dir = root / ".topeka"
        self.servers: list[Server] = []

    def begin(self) -> subprocess.Popen[str]:
        """Start the server from a process of its own; it prints it."""
        command = [sys.executable, "-W", "error", "-c", START, str(self.root)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=self.environment, **pipes)  # type: ignore[call-overload, no-any-return]

    def end(self, process: subprocess.Popen[str]) -> Server:
        out, error = process.communicate(timeout=120)
        assert (process.returncode, error) == (0, "")
        return Server.model_validate_json(out)


def request(server: Server, path: str, token: str | None = None, method: str = "GET") -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    headers = {"Authorization": f"token {token}"} if token else {}
    connection.request(method, path, headers=headers)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, json.loads(
        body
    ) if response.headers.get_content_type() == "application/json" else body


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that two processes started at once, with port 8888 taken and a careless configuration."""
    folder = tmp_path_factory.mktemp("notebooks")
    (folder / "a course").mkdir()
    (folder / "a course" / "lab.txt").write_text("text")
    (folder / "config").mkdir()
    for name in ("jupyter_server_config.py", "jupyter_lab_config.py"):
        (folder / "config" / name).write_text(CARELESS)
    environment = {
        **os.environ,
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "JUPYTER_TOKEN": "known-to-everyone",
        "IPYTHONDIR": str(folder / "ipython"),
    }
    running = Running(folder / "a course", environment)
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(("127.0.0.1", FIRST_PORT))
            taken.listen()
        except OSError:
            pass  # taken by somebody else, which is as good
        processes = [running.begin() for _ in range(2)]
        running.servers = [running.end(process) for process in processes]
    yield running
    stop(running.state_dir)


def test_two_starts_at_once_give_one_server(running: Running) -> None:
    first, second = running.servers
    assert first == second
    assert first.port != FIRST_PORT
    assert first.url == f"http://127.0.0.1:{first.port}/lab?token={first.token}"


def test_only_the_token_opens_it(running: Running) -> None:
    server = running.servers[0]
    assert request(server, "/api/status", server.token)[0] == 200
    assert request(server, f"/lab?token={server.token}")[0] == 200
    assert request(server, "/api/status")[0] == 403
    assert request(server, "/api/status", "known-to-everyone")[0] == 403
    assert len(server.token) >= 32


def test_it_listens_on_this_machine_only(running: Running) -> None:
    listening = [c for c in psutil.Process(running.servers[0].pid).net_connections() if c.status == "LISTEN"]
    assert {c.laddr.ip for c in listening} == {"127.0.0.1"}


def test_it_shows_the_checkout(running: Running) -> None:
    server = running.servers[0]
    _, contents = request(server, "/api/contents/", server.token)
    assert [entry["name"] for entry in contents["content"]] == ["lab.txt"]


def test_nobody_else_can_read_the_token(running: Running) -> None:
    server = running.servers[0]
    folder = running.state_dir / "jupyter"
    holding = [f for f in folder.iterdir() if server.token in f.read_text(errors="replace")]
    assert {f.name for f in holding} >= {"server.json", "config.json"}
    assert {stat.S_IMODE(f.stat().st_mode) for f in [*holding, server.log]} == {0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not any(server.token in part for part in psutil.Process(server.pid).cmdline())


def test_a_later_start_reuses_it(running: Running) -> None:
    started = time.monotonic()
    assert start(running.root, running.state_dir) == running.servers[0]
    assert time.monotonic() - started < 3


def test_stop_ends_kernels_and_a_start_after_a_crash_is_a_new_server(running: Running) -> None:
    old = running.servers[0]
    psutil.Process(old.pid).kill()  # a crash
    psutil.wait_procs([psutil.Process(old.pid)] if psutil.pid_exists(old.pid) else [], timeout=10)
    server = running.end(running.begin())
    assert (server.pid, server.token) != (old.pid, old.token)

    status, kernel = request(server, "/api/kernels", server.token, "POST")
    assert status == 201, kernel
    family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    assert len(family) > 1, "no kernel runs"
    assert stop(running.state_dir) is True
    assert [p for p in family if lives(p)] == []
    assert stop(running.state_dir) is False
    assert not (running.state_dir / "jupyter" / "server.json").exists()


# --- what can go wrong -------------------------------------------------------------------------


def test_nothing_runs(tmp_path: Path) -> None:
    assert stop(tmp_path / ".topeka") is False
    assert not (tmp_path / ".topeka").exists()


def test_a_number_that_another_process_has_by_now_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / ".topeka" / "jupyter"
    folder.mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        stale = Server(url="http://127.0.0.1:1/", port=1, token="t", pid=other.pid, log=folder / "server.log")
        (folder / "server.json").write_text(stale.model_dump_json())
        assert stop(tmp_path / ".topeka") is False
        assert other.poll() is None
        other.communicate(b"\n")
    (folder / "server.json").write_text("{half a")
    assert stop(tmp_path / ".topeka") is False


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a JupyterLab that stands in for the real one."""
    package = tmp_path / "path" / "jupyterlab"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    return package / "__main__.py"


def test_a_server_that_ends_at_once(tmp_path: Path, broken: Path) -> None:
    broken.write_text("print('line one'); raise SystemExit('the reason is this')")
    with pytest.raises(ServerFailed, match=r"ended at once \(exit status 1\)(.|\n)*the reason is this"):
        start(tmp_path, tmp_path / ".topeka")
    assert stop(tmp_path / ".topeka") is False


def test_a_server_that_never_answers_is_ended(tmp_path: Path, broken: Path) -> None:
    broken.write_text(
        "import subprocess, sys, time; from pathlib import Path\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        f"Path({str(tmp_path / 'pids')!r}).write_text(f'{{child.pid}}'); print('started', flush=True)\n"
        "time.sleep(60)"
    )
    with pytest.raises(ServerFailed, match=r"did not answer within 2 s(.|\n)*started"):
        start(tmp_path, tmp_path / ".topeka", timeout_s=2)
    assert not psutil.pid_exists(int((tmp_path / "pids").read_text()))
