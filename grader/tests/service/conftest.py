"""A service on the miniature course: a real database, queue, worker and HTTP server, in one process of their own."""

import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from grader.catalog import Catalog
from grader.service import accounts
from grader.service.database import Database
from grader.service.models import Role
from grader.service.serve import open_database
from grader.service.settings import Settings

from .cluster import postgresql, url

RIGHT = '''
def double(x: float) -> float:
    """Return twice x."""
    return x * 2


def is_even(n: int) -> bool:
    """Return whether n is even."""
    return n % 2 == 0
'''
WRONG = RIGHT.replace("x * 2", "x * 3")


def url_of(catalog: Catalog) -> str:
    return f"sqlite:///{catalog.root / 'grader.sqlite3'}"


@dataclass
class Running:
    """A `topeka serve`, started as its user would."""

    catalog: Catalog
    port: int = 0
    process: subprocess.Popen[str] | None = None
    environment: dict[str, str] = field(default_factory=dict)

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "grader.cli", "serve", "--port", str(self.port), "--sandbox", "local"],
            cwd=self.catalog.root,
            env=os.environ | {"TOPEKA_DATABASE_URL": url_of(self.catalog)} | self.environment,
            stdout=subprocess.PIPE,
            stderr=(self.catalog.root / "serve.log").open("a"),
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert "listens on http://127.0.0.1:" in line, (self.catalog.root / "serve.log").read_text()
        self.port = int(line.split(":")[2].split(";")[0])

    def end(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(timeout=60)

    def client(self, token: str | None = None) -> httpx.Client:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}/api/v1", headers=headers, timeout=30)


@pytest.fixture
def database(course: Catalog) -> Iterator[Database]:
    opened = open_database(Settings(database_url=url_of(course)))
    yield opened
    opened.close()


@pytest.fixture
def tokens(database: Database) -> dict[str, str]:
    with database.session() as session:
        made = {name: accounts.create_token(session, name, Role.LEARNER) for name in ("ada", "ben")}
        return made | {"ina": accounts.create_token(session, "ina", Role.INSTRUCTOR)}


@pytest.fixture
def server(course: Catalog, tokens: dict[str, str]) -> Iterator[Running]:
    running = Running(course)
    running.start()
    yield running
    if running.process is not None and running.process.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.end()
        running.process.kill()


def body(source: str = RIGHT, lab: str = "ch01/lab01", name: str = "numbers_lab.py") -> dict[str, Any]:
    return {"lab": lab, "files": {name: base64.b64encode(source.encode()).decode()}}


def graded(client: httpx.Client, submission_id: str, timeout_s: float = 90) -> dict[str, Any]:
    """Wait until the submission is final, and return it."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        found: dict[str, Any] = client.get(f"/submissions/{submission_id}").raise_for_status().json()
        if found["state"] in ("graded", "cancelled"):
            return found
        time.sleep(0.1)
    raise AssertionError(f"not graded within {timeout_s} s: {found}")


def events_of(response: httpx.Response) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Read server-sent events: number, kind, data."""
    number, kind = 0, ""
    for line in response.iter_lines():
        name, _, value = line.partition(": ")
        if name == "id":
            number = int(value)
        elif name == "event":
            kind = value
        elif name == "data":
            yield number, kind, json.loads(value)


__all__ = [
    "RIGHT",
    "WRONG",
    "Path",
    "Running",
    "body",
    "events_of",
    "graded",
    "postgresql",
    "url",
    "url_of",
]
