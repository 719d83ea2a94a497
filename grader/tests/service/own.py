"""What the tests of operations run: a PostgreSQL of their own, workers, and code that waits for a sign."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from grader.catalog import Catalog

from .conftest import RIGHT

ROOT = Path(__file__).resolve().parents[3]
# Losses are noticed within two seconds rather than half a minute.
QUICK = {"TOPEKA_HEARTBEAT_S": "0.3", "TOPEKA_LOST_AFTER_S": "2"}


def script(name: str) -> ModuleType:
    """Return scripts/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


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
