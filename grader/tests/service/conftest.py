"""A service on the miniature course: a real database, queue, worker and HTTP server, in one process of their own."""

import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
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

from .cluster import postgresql, url  # noqa: F401 (fixtures for all files of this folder)

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
    database: Database = field(init=False)
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        where = self.environment.get("TOPEKA_DATABASE_URL", url_of(self.catalog))
        self.database = open_database(Settings(database_url=where))

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

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.end()
            self.process.kill()
        self.database.close()


class Person(httpx.Client):
    """A user and their connection to the service."""

    def __init__(self, running: Running, name: str, role: Role) -> None:
        self.user = name
        with running.database.session() as session:
            self.token = accounts.create_token(session, name, role)
        headers = {"Authorization": f"Bearer {self.token}"}
        super().__init__(base_url=f"http://127.0.0.1:{running.port}/api/v1", headers=headers, timeout=30)


@dataclass
class School:
    """A service that the tests of a file share. Everybody in it is new, so that no test meets another's people."""

    running: Running
    _people: list[Person] = field(default_factory=list)

    def learner(self, name: str = "ada") -> Person:
        return self._enter(name, Role.LEARNER)

    def instructor(self) -> Person:
        return self._enter("ina", Role.INSTRUCTOR)

    def _enter(self, name: str, role: Role) -> Person:
        self._people.append(Person(self.running, f"{name} {uuid.uuid4().hex[:8]}", role))
        return self._people[-1]

    def close(self) -> None:
        for person in self._people:
            person.close()


@pytest.fixture
def database(course: Catalog) -> Iterator[Database]:
    """An empty database with the service's tables."""
    opened = open_database(Settings(database_url=url_of(course)))
    yield opened
    opened.close()


@pytest.fixture
def tokens(database: Database) -> dict[str, str]:
    """Tokens of two learners, ada and ben, and an instructor, ina, of the test's own service."""
    with database.session() as session:
        made = {name: accounts.create_token(session, name, Role.LEARNER) for name in ("ada", "ben")}
        return made | {"ina": accounts.create_token(session, "ina", Role.INSTRUCTOR)}


@pytest.fixture
def server(course: Catalog) -> Iterator[Running]:
    """A service of the test's own, which it may kill."""
    running = Running(course)
    running.start()
    yield running
    running.close()


@pytest.fixture(scope="module")
def school(
    tmp_path_factory: pytest.TempPathFactory, make_course: Callable[[Path], Catalog]
) -> Iterator[School]:
    """A service that the tests of a file share."""
    root = tmp_path_factory.mktemp("school") / "a course"
    root.mkdir()
    running = Running(make_course(root))
    running.start()
    shared = School(running)
    yield shared
    shared.close()
    running.close()


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
