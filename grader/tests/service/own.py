"""What the tests of operations run: workers, and code that waits for a sign."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from grader.catalog import Catalog, Lab
from grader.service import submissions
from grader.service.database import Database
from grader.service.hardware import queue_of
from grader.service.models import Role, User, now
from grader.service.work_queue import WorkQueue
from sqlalchemy import select

from .conftest import RIGHT

# Losses are noticed within two seconds rather than half a minute.
QUICK = {"TOPEKA_HEARTBEAT_S": "0.3", "TOPEKA_LOST_AFTER_S": "2"}


def submit(
    database: Database, lab: Lab, source: str = RIGHT, name: str = "ada", days_ago: float = 0, queue: str = ""
) -> str:
    """Put a submission into the database as the server does, and return its id."""
    work = WorkQueue(database)
    with database.session() as session:
        user = session.scalar(select(User).where(User.name == name)) or User(name=name, role=Role.LEARNER)
        session.add(user)
        session.flush()
        found, _ = submissions.submit(
            session,
            user.id,
            lab,
            queue or queue_of(lab),
            {"numbers_lab.py": source.encode()},
            slow=False,
            duplicate_window_s=60,
            enqueue=lambda submission_id, where: work.put(session, submission_id, where),
        )
        found.created = now() - timedelta(days=days_ago)
    work.close()
    return found.id


def gated(gate: Path, number: int = 0) -> str:
    """Right code that says it has begun by making GATE.N.begun, and waits until GATE is there."""
    waits = (
        f"import os, time; open({str(gate)!r} + '.{number}.begun', 'w').close()\n"
        f"    while not os.path.exists({str(gate)!r}): time.sleep(0.01)\n"
        "    return x * 2"
    )
    return RIGHT.replace("return x * 2", waits)


def until(condition: Callable[[], object], within_s: float = 60.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass in time"
        time.sleep(0.02)


@dataclass
class RunningWorker:
    """A `topeka worker`, started as its user would; `name` stands for its machine."""

    catalog: Catalog
    url: str
    name: str
    environment: dict[str, str] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    process: subprocess.Popen[str] | None = None

    @property
    def log(self) -> Path:
        return self.catalog.root / f"worker-{self.name}.log"

    def begin(self) -> "RunningWorker":
        command = [sys.executable, "-m", "grader.cli", "worker", "--sandbox", "local", *self.arguments]
        settings = QUICK | {"TOPEKA_DATABASE_URL": self.url, "TOPEKA_WORKER_HOST": self.name}
        self.process = subprocess.Popen(
            command,
            cwd=self.catalog.root,
            env=os.environ | settings | self.environment,
            stdout=subprocess.PIPE,
            stderr=self.log.open("a"),
            text=True,
        )
        return self

    def ready(self) -> "RunningWorker":
        assert self.process is not None
        assert self.process.stdout is not None
        assert "takes work from" in self.process.stdout.readline(), self.log.read_text()
        return self

    def end(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(timeout=60)

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.end(signal.SIGKILL)
