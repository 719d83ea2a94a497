"""A PostgreSQL of one's own, from the machine's own programs, for tests, fault runs and measurements.

It lives in a temporary folder, listens on a Unix socket there and nowhere else, and may be killed.
"""

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path


class NoPostgresql(Exception):
    """No PostgreSQL server can be started here; the message says why."""


def programs() -> Path:
    """Return the folder of `initdb` and `postgres`, the newest on this machine.

    Raises:
        NoPostgresql: there is none, or this is root and there is no user to run it as.
    """
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda p: float(p.parts[4]))
    found = debian[-1] if debian else shutil.which("postgres")
    if found is None:
        raise NoPostgresql("no PostgreSQL server is installed (Debian: apt-get install postgresql)")
    if os.geteuid() == 0:
        try:
            pwd.getpwnam("postgres")
        except KeyError as error:
            raise NoPostgresql("PostgreSQL does not run as root, and there is no user postgres") from error
    return Path(found).resolve().parent


class OwnPostgresql:
    """A cluster with a database `topeka`, started at once.

    Attributes:
        url: of the database, as TOPEKA_DATABASE_URL takes it.
    """

    def __init__(self, *, fsync: bool = True) -> None:
        """Make the cluster and start it.

        Args:
            fsync: whether commits reach the disk; they survive the end of any process without.

        Raises:
            NoPostgresql: it cannot be started here.
        """
        self._programs = programs()
        self._fsync = fsync
        self.folder = Path(tempfile.mkdtemp(prefix="topeka-pg-", dir="/tmp"))
        self._as = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
        if self._as:
            shutil.chown(self.folder, "postgres", "postgres")
        self._data = self.folder / "data"
        self._process: subprocess.Popen[bytes] | None = None
        try:
            made = self._run(
                "initdb", "-D", str(self._data), "-U", "topeka", "-A", "trust", "--no-sync", "-E", "UTF8"
            )
            if made.returncode != 0:
                raise NoPostgresql(f"initdb failed: {made.stderr.decode()}")
            self.start()
            self.create("topeka")
        except BaseException:
            self.remove()
            raise
        self.url = self.url_of("topeka")

    def url_of(self, name: str) -> str:
        """Return the URL of one of its databases."""
        return f"postgresql://topeka@/{name}?host={self.folder}"

    def create(self, name: str, template: str = "template1") -> str:
        """Make a database, empty or a copy of another that nobody uses, and return its URL."""
        done = self._run("createdb", "-h", str(self.folder), "-U", "topeka", "-T", template, name)
        if done.returncode != 0:
            raise NoPostgresql(f"createdb failed: {done.stderr.decode()}")
        return self.url_of(name)

    def start(self) -> None:
        """Start the server, as at first or after `kill`, and wait until it answers."""
        options = ["-D", str(self._data), "-k", str(self.folder), "-c", "listen_addresses="]
        options += [
            "-c",
            "max_connections=200",
            "-c",
            "restart_after_crash=on",
            "-c",
            f"fsync={'on' if self._fsync else 'off'}",
        ]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._programs / "postgres", *options],
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,
                **self._as,  # type: ignore[arg-type]
            )
        deadline = time.monotonic() + 60
        while self._run("pg_isready", "-q", "-h", str(self.folder)).returncode != 0:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise NoPostgresql(f"postgres did not start:\n{(self.folder / 'log').read_text()[-2000:]}")
            time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL to the server and all its processes, as at a power cut."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        # Its children have groups of their own; they end once they notice, and a new server waits for that.
        self._process.wait()

    def remove(self) -> None:
        """End the server and delete everything."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGQUIT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(20)
            if self._process.poll() is None:
                self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, program: str, *arguments: str) -> "subprocess.CompletedProcess[bytes]":
        return subprocess.run(
            [self._programs / program, *arguments],
            capture_output=True,
            check=False,
            cwd=self.folder,
            **self._as,  # type: ignore[arg-type]
        )
