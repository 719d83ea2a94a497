"""JupyterLab in the background: one server for a checkout, found again by later calls.

What is known of it lies in `.topeka/jupyter/`: `server.json` (address, token, process), `server.log`, and the
configuration it was started with. All three are for the user's eyes only.
"""

import http.client
import json
import os
import secrets
import sys
import time
from pathlib import Path
from typing import NamedTuple

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

from grader import background

FIRST_PORT = 8888
WHAT = "JupyterLab"


class Server(BaseModel):
    """A running JupyterLab.

    Attributes:
        url: for the browser, with the token.
        port: on 127.0.0.1.
        token: what every request must carry.
        pid: of the server's process.
        log: what it prints.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str
    port: int
    token: str
    pid: int
    log: Path


class _Files(NamedTuple):
    folder: Path

    @property
    def server(self) -> Path:
        return self.folder / "server.json"

    @property
    def config(self) -> Path:
        return self.folder / "config.json"

    @property
    def log(self) -> Path:
        return self.folder / "server.log"


def start(root: Path, state_dir: Path, timeout_s: float = 60) -> Server:
    """Return the checkout's JupyterLab, starting it if none runs.

    Args:
        root: the checkout, which JupyterLab shows.
        state_dir: the folder `.topeka`.
        timeout_s: how long JupyterLab may take to answer.

    Raises:
        ServerFailed: it ended or did not answer in time.
    """
    files = _files(state_dir)
    with background.locked(files.folder, WHAT):
        running = _running(files)
        if running is not None:
            if _answers_within(5, running):
                return running
            background.end(running.pid, WHAT)
        return _launch(root.resolve(), files, timeout_s)


def stop(state_dir: Path) -> bool:
    """End the checkout's JupyterLab with its kernels and terminals; return whether one was running."""
    if not _files(state_dir).server.exists():
        return False
    files = _files(state_dir)
    with background.locked(files.folder, WHAT):
        running = _running(files)
        if running is not None:
            background.end(running.pid, WHAT)
        for file in (files.server, files.config):
            file.unlink(missing_ok=True)
    return running is not None


def _files(state_dir: Path) -> _Files:
    return _Files(state_dir.resolve() / "jupyter")


# --- is one running? -------------------------------------------------------------------------


def _running(files: _Files) -> Server | None:
    """Return the server that was started last if its process still lives."""
    try:
        server = Server.model_validate_json(files.server.read_bytes())
        # The number may belong to another process by now; none has this command line but ours.
        if _config_option(files) in psutil.Process(server.pid).cmdline():
            return server
    except (FileNotFoundError, ValidationError, psutil.Error):
        pass
    return None


def _config_option(files: _Files) -> str:
    return f"--config={files.config}"


def _answers(server: Server) -> bool:
    """Return whether the server answers and accepts the token."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=2)  # takes no proxy
    try:
        connection.request("GET", "/api/status", headers={"Authorization": f"token {server.token}"})
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _answers_within(seconds: float, server: Server) -> bool:
    deadline = time.monotonic() + seconds
    while not _answers(server):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


# --- start and end ---------------------------------------------------------------------------


def _launch(root: Path, files: _Files, timeout_s: float) -> Server:
    from jupyter_core.paths import jupyter_runtime_dir

    token = secrets.token_urlsafe(24)
    # A file, because anybody on the machine can read a command line. It takes precedence over the
    # user's own Jupyter configuration, whose other settings (theme, shortcuts) still hold.
    config = {
        "ServerApp": {
            "ip": "127.0.0.1",
            "port": FIRST_PORT,
            "port_retries": 100,
            "base_url": "/",
            "open_browser": False,
            "root_dir": str(root),
            "allow_root": os.geteuid() == 0,
            "allow_remote_access": False,
        },
        "IdentityProvider": {"token": token},
        "PasswordIdentityProvider": {"hashed_password": "", "password_required": False},
        "LabApp": {"check_for_updates_class": "jupyterlab.NeverCheckForUpdate", "news_url": None},
    }
    background.write_private(files.config, json.dumps(config, indent=1))
    process = background.launch(
        [sys.executable, "-m", "jupyterlab", _config_option(files)],
        root,
        files.log,
        background.environment("JUPYTER_TOKEN", "JUPYTER_PORT"),
    )
    # The server writes this file when it listens; only it knows which port was free.
    info = Path(jupyter_runtime_dir()) / f"jpserver-{process.pid}.json"

    def server() -> Server:
        port = _port(info) or 0
        url = f"http://127.0.0.1:{port}/lab?token={token}"
        return Server(url=url, port=port, token=token, pid=process.pid, log=files.log)

    background.until_ready(
        process, lambda: _port(info) is not None and _answers(server()), files.log, WHAT, timeout_s
    )
    background.write_private(files.server, server().model_dump_json(indent=1))
    return server()


def _port(info: Path) -> int | None:
    try:
        return int(json.loads(info.read_text(encoding="utf-8"))["port"])
    except (OSError, ValueError):  # not there, or not whole yet
        return None
