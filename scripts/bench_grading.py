"""How long grading takes: bare pytest, the sandboxes cold and warm, and the whole of `make check`.

    .venv/bin/python scripts/bench_grading.py [--runs 10] [--lab ch01/lab01] [--skip-check]

The ways of grading take turns, so that a change of the machine's speed meets all of them;
medians are reported, and ratios pair by pair. Every run grades the lab's own solution and must
verify it.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from grader.catalog import load
from grader.grading import grade_lab
from grader.report import Status
from grader.sandbox.docker import DockerSandbox, is_available
from grader.sandbox.local import LocalSandbox
from grader.submission import read_code

from grader import machine

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Run the benchmark and print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--lab", default="ch01/lab01")
    parser.add_argument("--skip-check", action="store_true")
    arguments = parser.parse_args()

    catalog = load(ROOT)
    lab = catalog.select([arguments.lab])[0]
    code = read_code(lab, lab.path / "solutions")
    cache = ROOT / ".topeka" / "cache"
    warm = LocalSandbox()

    def bare_pytest() -> None:
        command = [sys.executable, "-m", "pytest", "-q", str(lab.path / "tests"), "--code", "solutions"]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)

    def sandbox_warm() -> None:
        report = grade_lab(catalog, lab, warm, code, cache=cache)
        assert report.status is Status.VERIFIED, report.reason

    def sandbox_cold() -> None:
        with LocalSandbox() as sandbox:
            report = grade_lab(catalog, lab, sandbox, code, cache=cache)
        assert report.status is Status.VERIFIED, report.reason

    ways: dict[str, Callable[[], None]] = {
        "bare pytest": bare_pytest,
        "local sandbox, cold": sandbox_cold,
        "local sandbox, warm": sandbox_warm,
    }
    contained: DockerSandbox | None = None
    if is_available("cpu"):
        contained = DockerSandbox("cpu", preload=lab.preload)

        def docker_warm(sandbox: DockerSandbox = contained) -> None:
            report = grade_lab(catalog, lab, sandbox, code, cache=cache)
            assert report.status is Status.VERIFIED, report.reason

        def docker_cold() -> None:
            with DockerSandbox("cpu", preload=lab.preload) as sandbox:
                report = grade_lab(catalog, lab, sandbox, code, cache=cache)
            assert report.status is Status.VERIFIED, report.reason

        ways |= {"docker sandbox, cold": docker_cold, "docker sandbox, pool warm": docker_warm}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for run in range(arguments.runs + 1):
        for name, way in ways.items():
            if contained is not None:
                contained.wait_until_warm()  # so that no container starts while another way is timed
            started = time.perf_counter()
            way()
            if run:  # the first round warms file caches
                seconds[name].append(time.perf_counter() - started)
    warm.close()
    if contained is not None:
        contained.close()

    described = machine.describe()
    print(
        f"{lab.id}, {arguments.runs} interleaved runs; {described.cpu_model}, {described.cores} cores, "
        f"Python {platform.python_version()}, torch {version('torch')}, pytest {version('pytest')}\n"
    )
    print("| way of grading | median s | min s | max s | median ratio to bare pytest |")
    print("|---|---|---|---|---|")
    for name, times in seconds.items():
        ratio = statistics.median(t / b for t, b in zip(times, seconds["bare pytest"], strict=True))
        print(
            f"| {name} | {statistics.median(times):.2f} | {min(times):.2f} | {max(times):.2f} | {ratio:.2f} |"
        )
    if not arguments.skip_check:
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "grader.cli", "check", "all"], cwd=ROOT, capture_output=True
        )
        listed = json.loads(
            subprocess.run(
                [sys.executable, "-m", "grader.cli", "list", "--json"],
                cwd=ROOT,
                capture_output=True,
                check=True,
            ).stdout
        )
        written = sum(not row["planned"] for row in listed)
        print(
            f"\n`topeka check all`, {written} labs, once: {time.perf_counter() - started:.0f} s, "
            f"exit status {done.returncode}"
        )


if __name__ == "__main__":
    main()
