"""In the forked child: run pytest on one lab and tell the parent what happens, as it happens."""

import json
import os
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from grader.runner.protocol import Job

MESSAGE_CHARS = 4_000


class EventsPlugin:
    """Writes one JSON line for everything the report needs."""

    def __init__(self, descriptor: int, prefix: str) -> None:
        self._descriptor = descriptor
        self._prefix = prefix
        self._result: dict[str, Any] = {}

    def _send(self, **event: Any) -> None:
        data = json.dumps(event).encode() + b"\n"
        while data:
            data = data[os.write(self._descriptor, data) :]

    def _name(self, node_id: str) -> str:
        return node_id.removeprefix(self._prefix)

    def pytest_configure(self, config: pytest.Config) -> None:
        """Keep pytest from drawing tracebacks, which takes longer than the tests; nobody sees them."""
        config.option.tbstyle = "line"

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

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        """Report that pytest came to its end by itself."""
        self._send(event="session_finished", exit_status=int(exitstatus))


def run(job: Job, work: Path, descriptor: int) -> int:
    """Run the job's tests in `work` and return pytest's exit status."""
    _limit(job)
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
        *(["--collect-only"] if job.mode == "collect" else []),
    ]
    return int(pytest.main(arguments, plugins=[EventsPlugin(descriptor, lab)]))


def _limit(job: Job) -> None:
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
