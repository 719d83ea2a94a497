"""The dashboard in the background: one `topeka serve` for a checkout, found again by later calls.

What is known of it lies in `.topeka/dashboard/`: `server.json` (port, process), `link` (which signs the next browser
in) and `server.log`. All three are for the user's eyes only.
"""

import http.client
import os
import socket
import sys
from pathlib import Path
from typing import NamedTuple

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

from grader import background

FIRST_PORT, PORTS = 8300, 100
WHAT = "the dashboard"


class _Running(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    port: int
    pid: int


class _Files(NamedTuple):
    folder: Path

    @property
    def server(self) -> Path:
        return self.folder / "server.json"

    @property
    def link(self) -> Path:
        return self.folder / "link"

    @property
    def log(self) -> Path:
        return self.folder / "server.log"


def start(root: Path, state_dir: Path, timeout_s: float = 60) -> str:
    """Return the link that signs a browser in to the checkout's dashboard, starting that if none runs.

    Args:
        root: the checkout.
        state_dir: the folder `.topeka`.
        timeout_s: how long the dashboard may take to answer.

    Raises:
        ServerFailed: it ended or did not answer in time.
    """
    files = _files(state_dir)
    with background.locked(files.folder, WHAT):
        running = _running(files)
        if running is not None and _answers(running.port):
            return files.link.read_text(encoding="utf-8").strip()
        if running is not None:
            background.end(running.pid, WHAT)
        files.link.unlink(missing_ok=True)
        port = _free_port()
        process = background.launch(
            [sys.executable, "-m", "grader.cli", "serve", f"--port={port}", _link_option(files)],
            root.resolve(),
            files.log,
            background.environment("TOPEKA_DATABASE_URL", "TOPEKA_PUBLIC_URL", *_not_loopback()),
        )
        background.until_ready(
            process, lambda: files.link.exists() and _answers(port), files.log, WHAT, timeout_s
        )
        background.write_private(files.server, _Running(port=port, pid=process.pid).model_dump_json())
        return files.link.read_text(encoding="utf-8").strip()


def stop(state_dir: Path) -> bool:
    """End the checkout's dashboard; return whether one was running.

    What is being graded has ten seconds to end; then it waits for the next start.
    """
    files = _files(state_dir)
    if not files.server.exists():
        return False
    with background.locked(files.folder, WHAT):
        running = _running(files)
        if running is not None:
            background.end(running.pid, WHAT)
        for file in (files.server, files.link):
            file.unlink(missing_ok=True)
    return running is not None


def _files(state_dir: Path) -> _Files:
    return _Files(state_dir.resolve() / "dashboard")


def _link_option(files: _Files) -> str:
    return f"--link-file={files.link}"


def _not_loopback() -> list[str]:
    """Return what would keep the dashboard from being its owner's; a container says that it may be so all the same."""
    return [] if os.environ.get("TOPEKA_LOCAL_OWNER") else ["TOPEKA_HOST"]


def _running(files: _Files) -> _Running | None:
    """Return the server that was started last if its process still lives."""
    try:
        running = _Running.model_validate_json(files.server.read_bytes())
        # The number may belong to another process by now; none has this command line but ours.
        if _link_option(files) in psutil.Process(running.pid).cmdline():
            return running
    except (FileNotFoundError, ValidationError, psutil.Error):
        pass
    return None


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)  # takes no proxy
    try:
        connection.request("GET", "/api/v1/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _free_port() -> int:
    """Return the first port that nobody listens on."""
    for port in range(FIRST_PORT, FIRST_PORT + PORTS):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise background.ServerFailed(
        f"none of the ports {FIRST_PORT} to {FIRST_PORT + PORTS - 1} is free for {WHAT}"
    )
