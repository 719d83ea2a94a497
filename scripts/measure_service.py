"""How much the service can do: latency of one grading, throughput of one and two workers, latency under load.

    .venv/bin/python scripts/measure_service.py [--rounds 3] [--seconds 20] [--latency-runs 20] [--lab ch01/lab01]

Everything is started by the script and real: the embedded server on SQLite for latency, a server, one or two workers
and a PostgreSQL of its own for throughput. That is measured with everything (database, server, worker and what they
start) held to one core, and again with two workers on two cores; and, for whoever sizes a host, one worker on both.
The three take turns, so that a change of the machine's speed meets them all. Run it on an idle machine: the load
average is printed with the figures.
"""

import argparse
import base64
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
from grader.catalog import Catalog, Lab, load
from grader.service import accounts, submissions
from grader.service.database import Database
from grader.service.models import Role, State, Submission
from grader.service.serve import open_database
from grader.service.settings import Settings
from grader.submission import read_code
from own_postgresql import OwnPostgresql
from sqlalchemy import select

from grader import machine

ROOT = Path(__file__).resolve().parents[1]
BARS = {"latency": "<= 1.5 x the tests' own time + 0.3 s", "scaling": ">= 1.8 from one core to two"}
# Workers and cores.
SETUPS = ((1, 1), (1, 2), (2, 2))


def main() -> None:
    """Measure and print Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lab", default="ch01/lab01")
    parser.add_argument("--latency-runs", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3, help="of each setup in turn")
    parser.add_argument("--seconds", type=float, default=20, help="of each turn")
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--sandbox", choices=["local", "docker"], default="local")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    catalog = load(ROOT)
    [lab] = catalog.select([arguments.lab])
    figures = {"load average before": round(os.getloadavg()[0], 2)}
    with tempfile.TemporaryDirectory(prefix="topeka-measure-", dir="/tmp") as folder:
        figures |= latency(catalog, lab, Path(folder), arguments)
        figures |= throughput(catalog, lab, Path(folder), arguments)
    figures["load average after"] = round(os.getloadavg()[0], 2)
    described = machine.describe()
    print(f"\n{lab.id}, {arguments.sandbox} sandbox; {described.cpu_model}, {described.cores} cores\n")
    print("| figure | value |\n|---|---|")
    for name, value in figures.items():
        print(f"| {name} | {value} |")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


class Unique:
    """The lab's solution, each time with another comment: never a duplicate, always the same work."""

    def __init__(self, lab: Lab) -> None:
        self._lab, self._code = lab, read_code(lab, lab.path / "solutions")
        self._number, self._lock = 0, threading.Lock()

    def body(self) -> dict[str, Any]:
        """Return the next submission."""
        with self._lock:
            self._number += 1
            mark = f"\n# {self._number}\n".encode()
        files = {name: base64.b64encode(text + mark).decode() for name, text in self._code.items()}
        return {"lab": self._lab.id, "files": files}


@contextlib.contextmanager
def program(command: list[str], log: Path, **environment: str) -> Iterator[str]:
    """Run `topeka ...` and yield the first line it prints."""
    with log.open("ab") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "grader.cli", *command],
            cwd=ROOT,
            env=os.environ
            | {"TOPEKA_SUBMISSIONS_PER_MINUTE": "1000000", "TOPEKA_DRAIN_S": "30"}
            | environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"topeka {' '.join(command)} did not start: {log.read_text()[-2000:]}")
        yield line
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def prepared(url: str) -> str:
    """Return a learner's token in a new database."""
    database = open_database(Settings(database_url=url))
    with database.session() as session:
        token = accounts.create_token(session, "measure", Role.LEARNER)
    database.close()
    return token


def client(port: str, token: str) -> httpx.Client:
    """Return a client of the server."""
    headers = {"Authorization": f"Bearer {token}"}
    return httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1", headers=headers, timeout=120)


def until_graded(http: httpx.Client, submission_id: str) -> None:
    """Wait by the stream of events, as the dashboard does."""
    with http.stream("GET", f"/submissions/{submission_id}/events") as stream:
        for line in stream.iter_lines():
            if line == "event: graded":
                return
    raise SystemExit(f"{submission_id} was not graded")


def port_of(line: str) -> str:
    """Return the port that the server said it listens on."""
    return line.split("http://127.0.0.1:")[1].split(";")[0].split("/")[0]


def latency(catalog: Catalog, lab: Lab, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """From POST to the final report, embedded and warm, one client; beside it the tests' own time."""
    url = f"sqlite:///{folder}/latency.sqlite3"
    token, unique = prepared(url), Unique(lab)
    whole, own = [], []
    serve = ["serve", "--port", "0", "--sandbox", arguments.sandbox]
    with (
        program(serve, folder / "serve.log", TOPEKA_DATABASE_URL=url) as line,
        client(port_of(line), token) as http,
    ):
        for run in range(arguments.latency_runs + 2):
            started = time.perf_counter()
            found = http.post("/submissions", json=unique.body()).raise_for_status().json()["id"]
            until_graded(http, found)
            report = http.get(f"/submissions/{found}/report").raise_for_status().json()
            if run >= 2:  # the first ones warm the sandbox
                whole.append(time.perf_counter() - started)
                own.append(report["labs"][0]["seconds"])
            if report["labs"][0]["status"] != "verified":
                raise SystemExit(
                    f"the solution is {report['labs'][0]['status']}: {report['labs'][0]['reason']}"
                )
    bars = [w - (1.5 * o + 0.3) for w, o in zip(whole, own, strict=True)]
    return {
        "tests' own time, median s": round(statistics.median(own), 3),
        "POST to final report, embedded and warm, median s": round(statistics.median(whole), 3),
        "POST to final report, embedded and warm, 95 % s": round(sorted(whole)[int(0.95 * len(whole))], 3),
        f"bar {BARS['latency']}, median": round(1.5 * statistics.median(own) + 0.3, 3),
        "runs within their bar": f"{sum(b <= 0 for b in bars)} of {len(bars)}",
    }


@contextlib.contextmanager
def held_to(cores: int) -> Iterator[None]:
    """Let this process, and whatever it starts in the meantime, run on the first `cores` cores only."""
    before = os.sched_getaffinity(0)
    if len(before) < cores:
        raise SystemExit(f"{cores} cores are needed; this process may use {len(before)}")
    os.sched_setaffinity(0, sorted(before)[:cores])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def throughput(catalog: Catalog, lab: Lab, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Submissions a minute by workers and cores, and latency with as many clients as were asked for."""
    rates: dict[tuple[int, int], list[float]] = {setup: [] for setup in SETUPS}
    waits: list[float] = []
    for _ in range(arguments.rounds):
        for setup in SETUPS:
            with held_to(setup[1]), service(setup[0], folder, arguments) as (url, port, token):
                unique = Unique(lab)
                rates[setup].append(rate(port, token, unique, url, arguments))
                if setup == SETUPS[-1]:
                    waits += waits_with(port, token, unique, arguments)
    pairs = [two / one for one, two in zip(rates[1, 1], rates[2, 2], strict=True)]
    shown = {
        f"submissions a minute, {workers} worker{'s' * (workers > 1)} on {cores} core{'s' * (cores > 1)}, each round": [
            round(r) for r in rates[workers, cores]
        ]
        for workers, cores in SETUPS
    }
    clients = f"{arguments.clients} clients at once, 2 workers"
    return shown | {
        f"two workers on two cores over one on one, median of the rounds; bar {BARS['scaling']}": round(
            statistics.median(pairs), 2
        ),
        f"{clients}: POST to report, median s": round(statistics.median(waits), 2),
        f"{clients}: 95 % s": round(sorted(waits)[int(0.95 * len(waits))], 2),
    }


@contextlib.contextmanager
def service(workers: int, folder: Path, arguments: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    """Start a database, a server and workers; yields the database's URL, the server's port and a token."""
    database = OwnPostgresql()
    # One thread each: two workers on two cores must not compete for both.
    settings = {"TOPEKA_DATABASE_URL": database.url, "OMP_NUM_THREADS": "1"}
    try:
        token = prepared(database.url)
        with contextlib.ExitStack() as started:
            line = started.enter_context(program(["serve", "--port", "0"], folder / "serve.log", **settings))
            for slot in range(workers):
                command = ["worker", "--sandbox", arguments.sandbox, "--slot", str(slot)]
                started.enter_context(program(command, folder / "worker.log", **settings))
            yield database.url, port_of(line), token
    finally:
        database.remove()


def rate(port: str, token: str, unique: Unique, url: str, arguments: argparse.Namespace) -> float:
    """Return reports a minute while the queue is full and nobody watches, by the database's own times."""
    database = Database(url)
    with client(port, token) as http:
        ids = [
            http.post("/submissions", json=unique.body()).raise_for_status().json()["id"]
            for _ in range(int(20 + 6 * arguments.seconds))
        ]

    def finished() -> list[datetime]:
        with database.session() as session:
            found = session.scalars(
                select(Submission.finished).where(Submission.id.in_(ids), Submission.state == State.GRADED)
            )
            return sorted(moment for moment in found if moment)

    while len(finished()) < 6:  # every worker is warm
        time.sleep(0.5)
    before = finished()[-1]
    time.sleep(arguments.seconds)
    counted = [moment for moment in finished() if moment > before]
    with database.session() as session:  # the rest must not be in the next one's way
        for submission_id in ids:
            submissions.cancel(session, submission_id)
    database.close()
    return len(counted) / (counted[-1] - before).total_seconds() * 60


def waits_with(port: str, token: str, unique: Unique, arguments: argparse.Namespace) -> list[float]:
    """Let every client submit and wait in turn; returns each one's seconds from POST to report."""
    counted: list[float] = []
    lock, over = threading.Lock(), threading.Event()

    def run() -> None:
        with client(port, token) as http:
            while not over.is_set():
                started = time.perf_counter()
                found = http.post("/submissions", json=unique.body()).raise_for_status().json()["id"]
                until_graded(http, found)
                with lock:
                    counted.append(time.perf_counter() - started)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(arguments.clients)]
    for thread in threads:
        thread.start()
    time.sleep(arguments.seconds)
    over.set()
    for thread in threads:  # each ends with the report it waits for, so that slow ones count too
        thread.join(120)
    return counted


if __name__ == "__main__":
    main()
