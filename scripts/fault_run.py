"""Kill everything at random and see whether a submission gets lost, or graded twice.

    .venv/bin/python scripts/fault_run.py                                  300 submissions, local sandbox
    .venv/bin/python scripts/fault_run.py --sandbox docker -n 60           the same in containers, engine killed too
    .venv/bin/python scripts/fault_run.py -n 12 --clients 4 --kills 2      the short form that CI runs

It starts a PostgreSQL, a server and workers of its own (each worker stands for a host), with --sandbox docker a Docker
Engine too, and lets clients submit to a course of two labs. Meanwhile it sends SIGKILL to one of the programs after the
other, and starts it again a moment later. Then one worker is killed for good while it grades. At the end the database
must show exactly one report and one event `graded` for each submission that a client was told is accepted, each with
the right verdict. Exit 1 if not. The same seed gives the same victims in the same order, not the same moments.
"""

import argparse
import base64
import contextlib
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import psutil
from grader.service import accounts
from grader.service.models import Event, Report, Role, Submission
from grader.service.serve import open_database
from grader.service.settings import Settings
from own_postgresql import NoPostgresql, OwnPostgresql
from sqlalchemy import func, select

ROOT = Path(__file__).resolve().parents[1]
IMAGE = "topeka-sandbox:cpu"
# What each kind of code must come out as: whatever is killed, the verdict is the code's own.
KINDS = {"right": "verified", "wrong": "failed"}
CODE = '''
def double(x: float) -> float:
    """Return twice x."""
    {before}return x * {factor}


def is_even(n: int) -> bool:
    """Return whether n is even."""
    return n % 2 == 0
'''


def code(number: int, kind: str, seconds: float = 0) -> dict[str, Any]:
    """Return a submission's body; each number is other content, so that a repeated one is a duplicate."""
    before = f"__import__('time').sleep({seconds})\n    " if seconds else ""
    text = CODE.format(factor=2 if kind == "right" else 3, before=before) + f"# {number}\n"
    return {"lab": "ch01/lab01", "files": {"numbers_lab.py": base64.b64encode(text.encode()).decode()}}


# --- programs -----------------------------------------------------------------------------------------


@dataclass
class Program:
    """A program that is started again when it ends, as a service manager would."""

    name: str
    command: list[str]
    environment: dict[str, str]
    log: Path
    folder: Path
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0
    pause_until: float = 0.0
    for_good: bool = False

    def look(self) -> None:
        """Start it unless it runs, or shall not."""
        if self.for_good or time.monotonic() < self.pause_until:
            return
        if self.process is None or self.process.poll() is not None:
            if self.process is not None and self.process.returncode != -signal.SIGKILL:
                self.pause_until = time.monotonic() + 0.5  # it ended by itself: the database is away, say
            with self.log.open("ab") as log:
                self.process = subprocess.Popen(
                    self.command,
                    env=os.environ | self.environment,
                    cwd=self.folder,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            self.starts += 1

    def kill(self, pause_s: float) -> None:
        """SIGKILL; started again after the pause."""
        self.pause_until = time.monotonic() + pause_s
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def end(self) -> None:
        """End it in peace, or in the end not."""
        self.for_good = True
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


class OwnEngine:
    """A Docker Engine of this run's own, in a network of its own, which may be killed. Needs root."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="topeka-engine-", dir="/tmp"))
        self.host = f"unix://{self.folder}/docker.sock"
        self.process: subprocess.Popen[bytes] | None = None
        self.start()
        print(f"copying {IMAGE} into an engine of this run's own", flush=True)
        with subprocess.Popen(["docker", "save", IMAGE], stdout=subprocess.PIPE) as save:
            self.docker("load", stdin=save.stdout)

    def docker(self, *arguments: str, stdin: Any = None) -> None:
        """Run a command of the Docker client with this engine."""
        command = ["docker", "--host", self.host, *arguments]
        subprocess.run(command, stdin=stdin, check=True, stdout=subprocess.DEVNULL)

    def start(self) -> None:
        """Start it, at first or after `kill`, and wait until it answers."""
        options = {
            "data-root": self.folder / "data",
            "exec-root": self.folder / "exec",
            "pidfile": self.folder / "pid",
            "host": self.host,
            "bridge": "none",
            "iptables": "false",
            "ip6tables": "false",
        }
        command = ["unshare", "--net", "dockerd", *(f"--{name}={value}" for name, value in options.items())]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 60
        while subprocess.run(["docker", "--host", self.host, "info"], capture_output=True).returncode != 0:
            if time.monotonic() > deadline:
                raise SystemExit(f"dockerd did not start:\n{(self.folder / 'log').read_text()[-2000:]}")
            time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL to dockerd."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def remove(self) -> None:
        """End it and what it runs, and delete everything."""
        assert self.process is not None
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        for process in psutil.process_iter(["cmdline"]):
            if str(self.folder) in " ".join(process.info["cmdline"] or []):
                with contextlib.suppress(psutil.Error):
                    process.kill()
        self.process.wait(20)
        for line in Path("/proc/mounts").read_text().splitlines():
            if str(self.folder) in (mount := line.split()[1]):
                subprocess.run(["umount", "--lazy", mount], check=False)
        shutil.rmtree(self.folder, ignore_errors=True)


# --- clients ------------------------------------------------------------------------------------------


@dataclass
class Told:
    """What clients were told, by submission."""

    accepted: dict[str, tuple[int, str]] = field(default_factory=dict)  # id: number and kind
    refused: Counter[str] = field(default_factory=Counter)
    seen: dict[str, list[tuple[int, str]]] = field(default_factory=dict)  # id: events of those watched live
    lock: threading.Lock = field(default_factory=threading.Lock)


def client(
    base: str, token: str, numbers: list[int], told: Told, rng: random.Random, ended: threading.Event
) -> None:
    """Submit each number until it is accepted, and watch the last one live."""
    headers = {"Authorization": f"Bearer {token}"}
    last = ""
    with httpx.Client(base_url=base, headers=headers, timeout=20) as http:
        for number in numbers:
            kind = rng.choice(list(KINDS))
            last = submit(http, number, kind, told)
            time.sleep(rng.uniform(0, 0.5))
    while not ended.is_set() and not watch(base, headers, last, told):
        time.sleep(0.2)


def submit(http: httpx.Client, number: int, kind: str, told: Told, seconds: float = 0) -> str:
    """Return the id once the server has said that it is accepted."""
    while True:
        try:
            answer = http.post("/submissions", json=code(number, kind, seconds))
        except httpx.HTTPError as error:
            reason = type(error).__name__
        else:
            if answer.status_code in (200, 201):
                submission_id = str(answer.json()["id"])
                with told.lock:
                    told.accepted[submission_id] = (number, kind)
                return submission_id
            reason = str(answer.status_code)
        with told.lock:
            told.refused[reason] += 1
        time.sleep(0.3)


def watch(base: str, headers: dict[str, str], submission_id: str, told: Told) -> bool:
    """Read a submission's events, behind those seen already; True after the last."""
    seen = told.seen.setdefault(submission_id, [])
    resume = {"Last-Event-ID": str(seen[-1][0])} if seen else {}
    number, kind = 0, ""
    try:
        with httpx.stream(
            "GET", f"{base}/submissions/{submission_id}/events", headers=headers | resume, timeout=20
        ) as stream:
            for line in stream.iter_lines():
                name, _, value = line.partition(": ")
                if name == "id":
                    number = int(value)
                elif name == "event":
                    kind = value
                elif name == "data":
                    seen.append((number, kind))
    except httpx.HTTPError:
        return False
    return any(kind == "graded" for _, kind in seen)


# --- the run ------------------------------------------------------------------------------------------


def main() -> None:
    """Run, check, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", "--submissions", type=int, default=300)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kills", type=int, default=40, help="SIGKILLs in all")
    parser.add_argument(
        "--patience", type=float, default=15, help="seconds until the next kill, if nothing moves"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sandbox", choices=["local", "docker"], default="local")
    parser.add_argument("--within", type=float, default=900, help="seconds for everything")
    parser.add_argument(
        "--lost-after", type=float, default=25, help="seconds of silence until a worker is lost"
    )
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--keep", action="store_true", help="keep the logs")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="topeka-fault-run-", dir="/tmp"))
    try:
        database = OwnPostgresql()
    except NoPostgresql as error:
        print(f"fault_run: {error}", file=sys.stderr)
        sys.exit(3)
    engine: OwnEngine | None = None
    programs: dict[str, Program] = {}
    try:
        if arguments.sandbox == "docker":
            engine = OwnEngine()
        figures, problems = run(arguments, folder, database, engine, programs)
    finally:
        for program in programs.values():
            program.end()
        database.remove()
        if engine is not None:
            engine.remove()
    print(table(figures))
    for problem in problems:
        print(f"WRONG: {problem}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures | {"problems": problems}, indent=2) + "\n")
    if problems or arguments.keep:
        print(f"logs are in {folder}")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(1 if problems else 0)


def run(
    arguments: argparse.Namespace,
    folder: Path,
    postgresql: OwnPostgresql,
    engine: OwnEngine | None,
    programs: dict[str, Program],
) -> tuple[dict[str, Any], list[str]]:
    """Do everything but the cleaning up; returns figures, and what is wrong."""
    rng = random.Random(arguments.seed)
    course = _tests_conftest().write_course(_made(folder / "course"))
    settings = Settings(database_url=postgresql.url)
    tables = open_database(settings)
    with tables.session() as session:
        tokens = [
            accounts.create_token(session, f"client {n}", Role.LEARNER) for n in range(arguments.clients)
        ]
    tables.close()

    port = _free_port()
    environment = {
        "TOPEKA_DATABASE_URL": postgresql.url,
        "TOPEKA_SUBMISSIONS_PER_MINUTE": "100000",
        # A client whose answer was lost asks again: however long that takes, it is the same submission.
        "TOPEKA_DUPLICATE_WINDOW_S": "3600",
        "TOPEKA_LOST_AFTER_S": str(arguments.lost_after),
        "TOPEKA_HEARTBEAT_S": str(arguments.lost_after / 5),
        "TOPEKA_SANDBOX": arguments.sandbox,
        "TMPDIR": str(_made(folder / "tmp")),
    } | ({"DOCKER_HOST": engine.host} if engine else {})
    topeka = [sys.executable, "-m", "grader.cli"]

    def program(name: str, command: list[str], **more: str) -> None:
        programs[name] = Program(name, command, environment | more, folder / f"{name}.log", course)

    program("server", [*topeka, "serve", "--port", str(port)])
    # A host of its own: a network of its own, from which the database is reached by its Unix socket alone.
    apart = ["unshare", "--net", "--uts", "--"] if os.geteuid() == 0 and shutil.which("unshare") else []
    for n in range(arguments.workers):
        command = [*apart, *topeka, "worker", "--stacks", "cpu"]
        program(f"worker {n}", command, TOPEKA_WORKER_HOST=f"host-{n}")
    ended = threading.Event()
    supervisor = threading.Thread(target=_supervise, args=(programs, ended), daemon=True)
    supervisor.start()

    base, told, started = f"http://127.0.0.1:{port}/api/v1", Told(), time.monotonic()
    numbers = list(range(arguments.submissions))
    threads = [
        threading.Thread(
            target=client,
            args=(
                base,
                token,
                numbers[n :: arguments.clients],
                told,
                random.Random(f"{arguments.seed} {n}"),
                ended,
            ),
            daemon=True,
        )
        for n, token in enumerate(tokens)
    ]
    for thread in threads:
        thread.start()
    deadline = started + arguments.within

    def finished() -> int:
        with tables.session() as session:
            return session.scalar(select(func.count()).select_from(Report)) or 0

    kills: Counter[str] = Counter()
    victims = [*programs, "database", *(["engine"] if engine else [])]
    _until(lambda: len(told.accepted) > 0, deadline)
    order: list[str] = []
    # Spread over the run, so that most of them meet a program at work and not one that is just starting.
    moments = sorted(rng.uniform(0, 0.95) * arguments.submissions for _ in range(arguments.kills))
    for moment in moments:
        patience = time.monotonic() + arguments.patience
        while _patiently(finished) < moment and time.monotonic() < min(patience, deadline):
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 0.5))
        if not order:  # everybody's turn comes, in an order that the seed gives
            order = rng.sample(victims, len(victims))
        victim, pause = order.pop(), rng.uniform(0.1, 3.0)
        kills[victim] += 1
        print(f"{time.monotonic() - started:6.1f} s  SIGKILL {victim}, back in {pause:.1f} s", flush=True)
        if victim == "database":
            postgresql.kill()
            time.sleep(pause)
            postgresql.start()
        elif victim == "engine":
            assert engine is not None
            engine.kill()
            time.sleep(pause)
            engine.start()
        else:
            programs[victim].kill(pause)
    while _patiently(finished) < arguments.submissions and time.monotonic() < deadline:
        time.sleep(0.2)
    seconds = time.monotonic() - started
    for thread in threads:
        thread.join(max(0.1, min(60, deadline - time.monotonic())))
    watched = {k: list(v) for k, v in told.seen.items()}

    moved, moved_in = _lose_a_host(base, tokens[0], programs, tables, told, arguments, deadline)
    ended.set()
    supervisor.join(5)
    figures, problems = _judge(tables, told, watched, arguments, moved, moved_in)
    tables.close()
    logs = "".join(p.log.read_text(errors="replace") for p in programs.values())
    figures |= {
        "sandbox": arguments.sandbox,
        "clients": arguments.clients,
        "workers": arguments.workers,
        "each worker in": "a network namespace of its own" if apart else "this network",
        "seed": arguments.seed,
        "kills": dict(sorted(kills.items())),
        "seconds": round(seconds, 1),
        "requests refused or lost, then repeated": dict(told.refused),
        "graded in vain, and not shown": logs.count('"message": "graded in vain'),
        "sandbox failures, tried again": logs.count("the sandbox failed"),
        "tracebacks in logs": logs.count("Traceback (most recent call last)"),
        "load average": os.getloadavg()[1],
    }
    return figures, problems


def _lose_a_host(
    base: str,
    token: str,
    programs: dict[str, Program],
    tables: Any,
    told: Told,
    arguments: argparse.Namespace,
    deadline: float,
) -> tuple[list[str], float]:
    """Kill the last worker for good while it grades; returns what it had begun, and after how long that was graded."""
    lost = f"worker {arguments.workers - 1}"
    host = f"host-{arguments.workers - 1}/0"
    with httpx.Client(base_url=base, headers={"Authorization": f"Bearer {token}"}, timeout=20) as http:
        for n in range(2 * arguments.workers):
            submit(http, arguments.submissions + n, "right", told, seconds=1)

    def begun() -> list[str]:
        with tables.session() as session:
            mine = select(Submission.id).where(Submission.state == "running", Submission.worker_id == host)
            return list(session.scalars(mine))

    _until(lambda: bool(begun()), deadline)
    had = begun()
    programs[lost].for_good = True
    programs[lost].kill(0)
    killed = time.monotonic()
    print(f"{lost} is killed for good; it had begun {len(had)}", flush=True)

    def all_graded() -> bool:
        with tables.session() as session:
            states = session.scalars(select(Submission.state).where(Submission.id.in_(list(told.accepted))))
            return all(state == "graded" for state in states)

    _until(all_graded, deadline)
    return had, time.monotonic() - killed


def _judge(
    tables: Any,
    told: Told,
    watched: dict[str, list[tuple[int, str]]],
    arguments: argparse.Namespace,
    moved: list[str],
    moved_in: float,
) -> tuple[dict[str, Any], list[str]]:
    problems: list[str] = []
    with tables.session() as session:
        rows = {s.id: s for s in session.scalars(select(Submission))}
        reports = Counter(session.scalars(select(Report.submission_id)))
        events: dict[str, list[tuple[int, str]]] = {}
        for e in session.scalars(select(Event).order_by(Event.submission_id, Event.number)):
            events.setdefault(e.submission_id, []).append((e.number, e.kind))
    for submission_id, (number, kind) in told.accepted.items():
        row, name = rows.get(submission_id), f"submission {number} ({submission_id})"
        if row is None:
            problems.append(f"{name} was accepted and is not there")
            continue
        found = events.get(submission_id, [])
        if (row.state, row.status) != ("graded", KINDS[kind]):
            problems.append(f"{name} is {row.state} as {row.status}, and its code is {kind}")
        if reports[submission_id] != 1:
            problems.append(f"{name} has {reports[submission_id]} reports")
        if [k for _, k in found].count("graded") != 1 or (found and found[-1][1] != "graded"):
            problems.append(f"{name}: its events are {[k for _, k in found]}")
        if [n for n, _ in found] != list(range(1, len(found) + 1)):
            problems.append(f"{name}: its events are numbered {[n for n, _ in found]}")
    for submission_id, seen in watched.items():
        if seen != events.get(submission_id):
            problems.append(
                f"a watcher of {submission_id} saw {seen}, and there is {events.get(submission_id)}"
            )
    if strangers := rows.keys() - told.accepted.keys():
        problems.append(
            f"{len(strangers)} submissions are there that no client knows: repeated requests counted twice"
        )
    expected = arguments.submissions + 2 * arguments.workers
    if len(told.accepted) != expected:
        problems.append(f"{len(told.accepted)} submissions were accepted within the time, of {expected}")
    if moved_in > 60:
        problems.append(f"the work of a host killed for good ended after {moved_in:.0f} s")
    again = sum(row.attempts > 1 for row in rows.values())
    waits = sorted(
        (row.finished - row.created).total_seconds() for row in rows.values() if row.finished is not None
    )
    figures = {
        "accepted": len(told.accepted),
        "final reports": sum(reports.values()),
        "events `graded`": sum(k == "graded" for found in events.values() for _, k in found),
        "begun more than once": again,
        "most attempts": max((row.attempts for row in rows.values()), default=0),
        "watched live, every event seen once": len(watched),
        "seconds from POST to report, median and longest": (
            [round(waits[len(waits) // 2], 1), round(waits[-1], 1)] if waits else []
        ),
        "begun on the host killed for good": len(moved),
        "all graded elsewhere after seconds": round(moved_in, 1),
    }
    return figures, problems


def table(figures: dict[str, Any]) -> str:
    """Return the figures as a Markdown table."""
    rows = [f"| {name} | {value} |" for name, value in figures.items()]
    return "\n".join(["", "| figure | value |", "|---|---|", *rows])


def _supervise(programs: dict[str, Program], ended: threading.Event) -> None:
    while not ended.wait(0.05):
        for program in list(programs.values()):
            program.look()


def _until(condition: Callable[[], bool], deadline: float) -> None:
    while not _patiently(condition) and time.monotonic() < deadline:
        time.sleep(0.1)


def _patiently(ask: Callable[[], Any]) -> Any:
    """Ask again until the database answers."""
    from sqlalchemy.exc import OperationalError

    while True:
        try:
            return ask()
        except OperationalError:
            time.sleep(0.2)


def _tests_conftest() -> ModuleType:
    """The miniature course is the tests' own."""
    spec = importlib.util.spec_from_file_location("topeka_tests", ROOT / "grader" / "tests" / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
