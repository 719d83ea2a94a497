"""In the forked child: run pytest on one lab and tell the parent what happens, as it happens."""

import json
import os
import resource
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from grader.runner import audit, controls, integrity
from grader.runner.integrity import Snapshot
from grader.runner.protocol import Job
from grader.runner.seal import Seal

MESSAGE_CHARS = 4_000
# A run that tampers says so a few times; more would only fill the report.
MAX_FINDINGS = 20
# Looking at everything may take one part in so many of a run's time.
LOOK_SHARE = 30


class Reporter:
    """Writes sealed events, for this process only and never on behalf of code under test.

    Args:
        descriptor: where to.
        secret: of this job.
        owner: knows code under test.
        tests: the folder of the tests; nothing in it reports either.
    """

    def __init__(self, descriptor: int, secret: bytes, owner: audit.Owner, tests: Path) -> None:
        seal, pid, prefix = Seal(secret), os.getpid(), f"{tests}/"
        lock = threading.RLock()
        said: set[str] = set()
        dumps, write, getframe, getpid = json.dumps, os.write, sys._getframe, os.getpid

        def put(event: dict[str, Any]) -> None:
            with lock:
                data = seal.close(dumps(event).encode()) + b"\n"
                while data:
                    data = data[write(descriptor, data) :]

        def found(what: str) -> None:
            if getpid() == pid and what not in said and len(said) < MAX_FINDINGS:
                said.add(what)
                put({"event": "tampering", "what": what})

        def send(**event: Any) -> None:
            if getpid() != pid:
                return
            if event["event"] not in ("test", "session_finished"):  # no other speaks for the code
                put(event)
                return
            frame = getframe(1)
            while frame is not None:
                if owner.owns(frame) or frame.f_code.co_filename.startswith(prefix):
                    found("called the grader's reporter")
                    return
                frame = frame.f_back  # type: ignore[assignment]
            put(event)

        self.found, self.send = found, send


class EventsPlugin:
    """Sends an event for everything the report needs, and looks after each test whether all is as it was."""

    def __init__(self, reporter: Reporter, prefix: str, tests: Path, snapshot: Snapshot) -> None:
        self._send = reporter.send
        self._prefix = prefix
        self._result: dict[str, Any] = {}
        self._found = found = reporter.found
        source_files = [file.read_text(encoding="utf-8", errors="replace") for file in tests.rglob("*.py")]
        source = "".join(source_files)
        hooks: dict[str, Any] = {}
        functions: list[Any] = []
        hooked = integrity.hooked
        configs: list[pytest.Config] = []
        modes, hooks_of, passed_wrongly = integrity.modes_left_on, integrity.hooks, controls.passed_wrongly

        def begin(session: pytest.Session) -> None:
            """Begin to watch, before any test file is imported."""
            configs.append(session.config)
            integrity.import_libraries(source_files)
            snapshot.take()
            # Libraries keep what is no module there, None even: only the name is sure to be one.
            for name, module in list(sys.modules.items()):
                if name == "conftest" or name.endswith(".conftest"):
                    snapshot.add(module)
            hooks.update(hooks_of(session.config))
            functions.extend(hooked(session.config))

        def collected(session: pytest.Session) -> None:
            for item in session.items:
                if isinstance(module := getattr(item, "module", None), ModuleType):
                    snapshot.add(module)
                snapshot.add_object(
                    vars(item), item.nodeid, [n for n in ("_obj", "own_markers") if n in vars(item)]
                )
            items = list(session.items)
            snapshot.add_object(vars(self), "the grader's plugin", [n for n in vars(self) if n != "_result"])
            look(everything=True)
            controls_fail(items[0] if items else None)

        clock = time.perf_counter
        last = [0.0, 0.0]  # when all was looked at, and how long that took

        def look(*, everything: bool = False) -> None:
            begun = clock()
            everything = everything or begun - last[0] > LOOK_SHARE * last[1]
            for name in snapshot.changes(everything=everything):
                found(f"changed {name}")
            if hooked(configs[0]) != functions:
                now = hooks_of(configs[0])
                for name in now.keys() | hooks.keys():
                    if now.get(name) != hooks.get(name):
                        found(f"changed what pytest calls at {name}")
            for name in modes():
                found(f"left {name} switched on")
            if everything:
                last[:] = clock(), clock() - begun

        def controls_fail(item: pytest.Item | None) -> None:
            for name in passed_wrongly(item, source):
                found(f"made a comparison that must fail succeed: {name}")

        self._begin, self._collected, self._look, self._controls_fail = begin, collected, look, controls_fail
        self.is_protected = snapshot.is_protected

    def _name(self, node_id: str) -> str:
        return node_id.removeprefix(self._prefix)

    def pytest_configure(self, config: pytest.Config) -> None:
        """Keep pytest from drawing tracebacks, which takes longer than the tests; nobody sees them."""
        config.option.tbstyle = "line"

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self, session: pytest.Session) -> None:
        """Begin to watch, before any test file is imported."""
        self._begin(session)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Report a test file that could not be imported."""
        if report.failed:
            self._send(
                event="collect_error",
                file=self._name(report.nodeid),
                message=_cut(str(report.longrepr)),
                code_under_test=getattr(report, "code_under_test_failed", False),
            )

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Report the names of all tests."""
        tests = [
            {"name": self._name(item.nodeid), "slow": item.get_closest_marker("slow") is not None}
            for item in session.items
        ]
        self._collected(session)
        self._send(event="collected", tests=tests)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Report which test runs now, so that a time-out can name it."""
        self._result = {}
        self._send(event="test_started", test=self._name(nodeid))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Fold set-up, call and teardown of a test into one event."""
        result = self._result
        result["seconds"] = result.get("seconds", 0.0) + report.duration
        if report.failed and result.get("outcome", "passed") == "passed":
            result["outcome"] = "failed" if report.when == "call" else "error"
            result["message"] = _cut(getattr(report, "brief", None) or str(report.longrepr))
            result["not_written"] = getattr(report, "not_written", False)
        elif report.skipped:
            from shared.plugin import skip_reason

            result["outcome"], result["message"] = "not_verified_here", _cut(skip_reason(report))
        elif report.when == "call":
            result.setdefault("outcome", "passed")
        if report.when == "teardown":
            self._look()
            self._send(
                event="test",
                test=self._name(report.nodeid),
                outcome=result.get("outcome", "error"),
                seconds=round(result["seconds"], 6),
                message=result.get("message", ""),
                output=_cut((report.capstdout + report.capstderr)[-MESSAGE_CHARS:]),
                not_written=result.get("not_written", False),
                milestones=[value for name, value in report.user_properties if name == "milestone"],
            )

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Report that pytest came to its end by itself."""
        self._look(everything=True)
        self._controls_fail(session.items[0] if getattr(session, "items", None) else None)
        self._send(event="session_finished", exit_status=int(exitstatus))


def run(
    job: Job,
    work: Path,
    descriptor: int,
    secret: bytes,
    snapshot: Snapshot,
    code_socket: int | None = None,
) -> int:
    """Run the job's tests in `work` and return pytest's exit status.

    Args:
        job: what to run.
        work: the folder that the job's tar was written to; absolute.
        descriptor: where events go.
        secret: seals them.
        snapshot: of everything before.
        code_socket: to the process of the code under test; None if it runs in this one.
    """
    limit(job)
    os.chdir(work)
    temporary = work / "tmp"
    temporary.mkdir(exist_ok=True)
    os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
    if (work / "data").is_dir():
        os.environ["TOPEKA_DATA"] = str(work / "data")
    # Looking for installed plugins takes longer than running a lab's tests; none of them is needed.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    os.environ["MPLBACKEND"] = "Agg"  # no lab may need a screen
    # Options of the caller's own are not the lab's, and on a CI machine pytest words its messages
    # differently: the fingerprints of a diagnosis would not match.
    for name in ("PYTEST_ADDOPTS", "CI", "BUILD_NUMBER"):
        os.environ.pop(name, None)
    sys.dont_write_bytecode = True
    sys.argv = ["pytest"]
    lab = f"labs/{job.folder}/"
    arguments = [
        *(f"{lab}{name}" for name in job.tests or ("tests",)),
        "--code=src",
        f"--rootdir={work}",
        f"--basetemp={temporary / 'pytest'}",
        f"--seed={job.seed}",
        *("-c", "pyproject.toml"),
        *("-p", "no:cacheprovider"),
        *("-p", "no:terminal"),  # events are the only report
        "--continue-on-collection-errors",
        *(["--slow"] if job.slow else []),
        *([f"--code-socket={code_socket}"] if code_socket is not None else []),
        *(["--collect-only"] if job.mode == "collect" else []),
    ]
    folder = work / "labs" / job.folder
    owner = audit.Owner(folder / "src", temporary)
    reporter = Reporter(descriptor, secret, owner, folder / "tests")
    if code_socket is not None:
        from shared.apart import client

        client.on_tampering.append(reporter.found)
    plugin = EventsPlugin(reporter, lab, folder / "tests", snapshot)
    audit.watch(owner, folder / "tests", plugin.is_protected, reporter.found)
    del secret, reporter
    return int(pytest.main(arguments, plugins=[plugin]))


def limit(job: Job) -> None:
    """Set the job's limits for this process."""
    limits = job.limits
    wanted = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: limits.file_bytes,
        resource.RLIMIT_CPU: int(limits.timeout_s * (os.cpu_count() or 1)) + 5,
        # Counted over all processes of this user, so the job's share comes on top; root is exempt,
        # and the parent counts the job's processes for that reason too.
        resource.RLIMIT_NPROC: _processes_of_user() + limits.processes,
    }
    if limits.memory_bytes is not None and sys.platform == "linux":
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        wanted[resource.RLIMIT_AS] = mapped + limits.memory_bytes
    for kind, value in wanted.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def _processes_of_user() -> int:
    import psutil

    uid = os.getuid()
    # Threads count as processes here.
    return sum(
        p.info["num_threads"] or 1
        for p in psutil.process_iter(["uids", "num_threads"])
        if p.info["uids"] and p.info["uids"].real == uid
    )


def _cut(text: str) -> str:
    text = text.encode(errors="replace").decode()  # half a surrogate pair is no text that JSON could carry
    return text if len(text) <= MESSAGE_CHARS else text[: MESSAGE_CHARS - 40] + "\n... (message cut)"
