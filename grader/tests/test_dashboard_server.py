"""The dashboard in the background: the real one, started by processes that end, as a command does."""

import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from grader.background import ServerFailed
from grader.dashboard_server import FIRST_PORT, start, stop

TOPEKA = [sys.executable, "-m", "grader.cli"]


@pytest.fixture
def root(course, monkeypatch) -> Iterator[Path]:
    """A course whose dashboard is ended afterwards."""
    monkeypatch.setenv("TOPEKA_SANDBOX", "local")
    monkeypatch.chdir(course.root)
    yield course.root
    stop(course.root / ".topeka")


def process_of(root: Path) -> psutil.Process:
    return psutil.Process(json.loads((root / ".topeka/dashboard/server.json").read_text())["pid"])


def signs_in(link: str) -> bool:
    return httpx.get(link, headers={"Sec-Fetch-Site": "none"}).headers.get("location") == "/"


def test_it_is_started_once_found_again_and_ended_with_all_it_started(root: Path):
    state = root / ".topeka"
    with ThreadPoolExecutor(2) as both:
        links = list(both.map(lambda _: start(root, state), range(2)))
    assert links[0] == links[1]
    process = process_of(root)
    family = [process, *process.children(recursive=True)]
    assert len(family) > 1, "its sandbox has a runner"
    for file in ("server.json", "link", "server.log"):
        assert stat.S_IMODE((state / "dashboard" / file).stat().st_mode) == 0o600
    assert signs_in(links[0])
    assert not signs_in(links[0]), "a link is good once"
    again = start(root, state)
    assert again != links[0]
    assert again.rpartition("=")[0] == links[0].rpartition("=")[0]
    assert process_of(root) == process
    assert signs_in(again)
    assert stop(state)
    assert not any(each.is_running() for each in family)
    assert not stop(state)


def test_after_a_kill_and_with_its_port_taken_it_comes_back_elsewhere(root: Path):
    state = root / ".topeka"
    first = start(root, state)
    process = process_of(root)
    port = int(first.split(":")[2].split("/")[0])
    assert port >= FIRST_PORT
    process.kill()
    process.wait(10)
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", port))
        taken.listen()
        second = start(root, state)
    assert f":{port}/" not in second
    assert signs_in(second)


def test_a_dashboard_that_cannot_start_says_why_and_leaves_nothing(root: Path):
    state = root / ".topeka"
    state.mkdir(exist_ok=True)
    (state / "grader.sqlite3").write_text("this is no database, and long enough to be seen as none" * 100)
    with pytest.raises(ServerFailed, match=r"the dashboard ended at once \(exit status 3\)[\s\S]*database"):
        start(root, state)
    assert not (state / "dashboard" / "server.json").exists()
    # The chapter begins all the same.
    done = subprocess.run([*TOPEKA, "lab", "ch01"], capture_output=True, text=True, env=os.environ)
    subprocess.run([*TOPEKA, "stop"], check=True)
    assert done.returncode == 0, done.stderr
    assert "JupyterLab: http://127.0.0.1:" in done.stdout
    assert "Dashboard:" not in done.stdout
    assert "topeka: the dashboard ended at once" in done.stderr


def test_the_command_starts_both_and_stops_both(root: Path):
    done = subprocess.run([*TOPEKA, "lab", "ch01"], capture_output=True, text=True, check=True)
    assert "JupyterLab: http://127.0.0.1:" in done.stdout
    [link] = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("Dashboard:")]
    assert signs_in(link)
    done = subprocess.run([*TOPEKA, "stop"], capture_output=True, text=True, check=True)
    assert done.stdout == "JupyterLab is stopped.\nThe dashboard is stopped.\n"
    done = subprocess.run([*TOPEKA, "stop"], capture_output=True, text=True, check=True)
    assert "The dashboard of this checkout is not running." in done.stdout
