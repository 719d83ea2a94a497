"""JupyterLab in the background: one server for a checkout, found again by later calls.

What is known of it lies in `.topeka/jupyter/`: `server.json` (address, token, process), `server.log`, and the
configuration it was started with. All three are for the user's eyes only.
"""

import http.client
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from grader.errors import TopekaError

FIRST_PORT = 8888


class NotebookServerFailed(TopekaError):
    """JupyterLab could not be started or ended; the message has the end of its log."""


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
        NotebookServerFailed: it ended or did not answer in time.
    """
    with _locked(state_dir) as files:
        running = _running(files)
        if running is not None:
            if _answers_within(5, running):
                return running
            _end(running.pid)
        return _launch(root.resolve(), files, timeout_s)


def stop(state_dir: Path) -> bool:
    """End the checkout's JupyterLab with its kernels and terminals; return whether one was running."""
    if not _Files(state_dir / "jupyter").server.exists():
        return False
    with _locked(state_dir) as files:
        running = _running(files)
        if running is not None:
            _end(running.pid)
        for file in (files.server, files.config):
            file.unlink(missing_ok=True)
    return running is not None


@contextmanager
def _locked(state_dir: Path) -> Iterator[_Files]:
    """Let one process at a time look, start or stop."""
    files = _Files(state_dir.resolve() / "jupyter")
    files.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        with FileLock(files.folder / "lock", timeout=90):
            yield files
    except Timeout as error:
        raise NotebookServerFailed(
            f"another command has been starting or stopping JupyterLab for 90 s ({files.folder / 'lock'} is held); "
            "end it and try again"
        ) from error


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
    _write_private(files.config, json.dumps(config, indent=1))
    _write_private(files.log, "")
    with files.log.open("a") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", _config_option(files)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=root,
            env=_environment(),
            start_new_session=True,  # it outlives this terminal
        )
    # The server writes this file when it listens; only it knows which port was free.
    info = Path(jupyter_runtime_dir()) / f"jpserver-{process.pid}.json"
    deadline = time.monotonic() + timeout_s
    try:
        while time.monotonic() < deadline:
            if (code := process.poll()) is not None:
                raise NotebookServerFailed(
                    f"JupyterLab ended at once (exit status {code}). {_end_of(files.log)}"
                )
            if (port := _port(info)) is not None:
                url = f"http://127.0.0.1:{port}/lab?token={token}"
                server = Server(url=url, port=port, token=token, pid=process.pid, log=files.log)
                if _answers(server):
                    _write_private(files.server, server.model_dump_json(indent=1))
                    process.returncode = 0  # Popen would warn that it still runs, which is what we want
                    return server
            time.sleep(0.05)
        raise NotebookServerFailed(
            f"JupyterLab did not answer within {timeout_s:.0f} s. {_end_of(files.log)}"
        )
    except BaseException:  # Ctrl-C too
        _end(process.pid)
        process.wait()
        raise


def _port(info: Path) -> int | None:
    try:
        return int(json.loads(info.read_text(encoding="utf-8"))["port"])
    except (OSError, ValueError):  # not there, or not whole yet
        return None


def _environment() -> dict[str, str]:
    """Return the environment for the server, whose terminals know the command `topeka`."""
    environment = {k: v for k, v in os.environ.items() if k not in ("JUPYTER_TOKEN", "JUPYTER_PORT")}
    programs = str(Path(sys.executable).parent)
    environment["PATH"] = os.pathsep.join([programs, environment.get("PATH", os.defpath)])
    if sys.prefix != sys.base_prefix:
        environment["VIRTUAL_ENV"] = sys.prefix
    return environment


def _end(pid: int) -> None:
    """End a process and everything below it: politely, and after 10 s not."""
    try:
        server = psutil.Process(pid)
        family = [server, *server.children(recursive=True)]
        server.terminate()  # shuts down its kernels and terminals
    except psutil.NoSuchProcess:
        return
    psutil.wait_procs([server], timeout=10)
    _, alive = psutil.wait_procs(family, timeout=1)
    for process in alive:
        process.kill()  # psutil makes sure that the number still belongs to it
    _, alive = psutil.wait_procs(alive, timeout=5)
    if alive:
        raise NotebookServerFailed(f"process {alive[0].pid} of JupyterLab cannot be ended")


def _write_private(file: Path, text: str) -> None:
    """Write a file that only the user may read, whole or not at all."""
    draft = file.with_suffix(".new")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        stream.write(text)
    draft.replace(file)


def _end_of(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
    return "\n".join([f"The end of {log}:", *lines])
