"""Grades labs: catalogue → job → sandbox → events → report. The only place that makes a report."""

import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from shared.data import TINY_SHAKESPEARE_FILE, DataUnavailable, tiny_shakespeare

from grader import diagnosis, misconceptions
from grader.catalog import Catalog, Lab
from grader.expected import ExpectedTest, expected_tests
from grader.report import LabReport, MilestoneResult, Outcome, Report, Status, TestResult, Trust
from grader.runner.protocol import Event, Job, Limits
from grader.sandbox import Sandbox, SandboxFailed
from grader.submission import SubmissionError, code_folder, pack, read_code
from grader.suspicion import suspicious

# Called with the lab and each event while it runs, for live progress.
OnEvent = Callable[[Lab, Event], None]

_SIGNALS = {6: "abort", 9: "kill (out of memory?)", 11: "segmentation fault", 24: "CPU time limit"}


def grade(
    catalog: Catalog,
    labs: Sequence[Lab],
    sandbox: Sandbox,
    *,
    code: str = "src",
    stack: str = "cpu",
    slow: bool = False,
    trust: Trust = Trust.SAME_PROCESS,
    timeout_s: float | None = None,
    cache: Path | None = None,
    on_event: OnEvent | None = None,
    on_lab: Callable[[LabReport], None] | None = None,
) -> Report:
    """Grade `labs` one after the other.

    Args:
        catalog: the course.
        labs: what to grade.
        sandbox: where.
        code: `src`, `solutions` or a folder.
        stack: of the environment the sandbox runs in.
        slow: whether tests marked slow run too.
        trust: whether code and tests share a process.
        timeout_s: for each lab, instead of the lab's own.
        cache: folder for expected test sets.
        on_event: called with every event.
        on_lab: called with every finished lab.

    Raises:
        SubmissionError: the code folder does not exist or cannot be read.
    """
    created, started = datetime.now(UTC), time.monotonic()
    reports = []
    for lab in labs:
        report = grade_lab(
            catalog,
            lab,
            sandbox,
            read_code(lab, code_folder(lab, code)),
            slow=slow,
            trust=trust,
            timeout_s=timeout_s,
            cache=cache,
            on_event=on_event,
        )
        reports.append(report)
        if on_lab:
            on_lab(report)
    return Report(
        created=created,
        code=code,
        stack=stack,
        isolation=sandbox.isolation,
        machine=sandbox.machine,
        commit=_commit(catalog.root),
        labs=tuple(reports),
        seconds=round(time.monotonic() - started, 3),
    )


def grade_lab(
    catalog: Catalog,
    lab: Lab,
    sandbox: Sandbox,
    code: dict[str, bytes],
    *,
    slow: bool = False,
    seed: int = 0,
    trust: Trust = Trust.SAME_PROCESS,
    only: Callable[[str], bool] | None = None,
    timeout_s: float | None = None,
    cache: Path | None = None,
    job_id: str = "",
    on_event: OnEvent | None = None,
) -> LabReport:
    """Grade one lab with the given source files.

    Args:
        catalog: the course.
        lab: whose tests to run.
        sandbox: where.
        code: source files by name.
        slow: whether tests marked slow run too.
        seed: shifts the tests' random inputs.
        trust: whether code and tests share a process. `strict` needs a lab that supports it.
        only: says of a test's name whether it is to run; the report then holds no others.
        timeout_s: instead of the lab's own.
        cache: folder for expected test sets.
        job_id: what the run is called; anything that still runs by this name is ended first. Empty for a new one.
        on_event: called with every event.
    """
    if lab.planned:
        return LabReport(
            lab=lab.id, title=lab.title, status=Status.ERROR, reason="this lab is planned and not yet written"
        )
    if trust is Trust.STRICT and not lab.strict:
        return LabReport(
            lab=lab.id, title=lab.title, status=Status.NOT_VERIFIED_HERE, reason=no_strict(lab), trust=trust
        )
    try:
        expected = expected_tests(catalog, lab, lambda: sandbox, cache)
    except SandboxFailed as error:
        return LabReport(lab=lab.id, title=lab.title, status=Status.ERROR, reason=str(error))
    expected = tuple(t for t in expected if only is None or only(t.name))
    left_out = 0 if slow else sum(t.slow for t in expected)
    expected = tuple(t for t in expected if slow or not t.slow)
    job = Job(
        id=job_id or f"{lab.id}-{time.monotonic_ns()}",
        sole=bool(job_id),
        folder=f"{lab.path.parent.name}/{lab.path.name}",
        preload=lab.preload,
        slow=slow,
        seed=seed,
        trust=trust.value,
        tests=tuple(t.name for t in expected) if only else (),
        limits=Limits(
            timeout_s=timeout_s or lab.timeout,
            memory_bytes=int(lab.memory_gb * (1 << 30)) if lab.stack == "cpu" else None,
        ),
    )
    events = []
    try:
        for event in sandbox.run(job, pack(catalog, lab, code, _data(lab) if slow else None)):
            events.append(event)
            if on_event:
                on_event(lab, event)
    except SandboxFailed as error:
        return LabReport(lab=lab.id, title=lab.title, status=Status.ERROR, reason=str(error))
    report = _fold(lab, expected, events, job.limits, left_out)
    started = next((e for e in events if e["event"] == "started"), {})
    if trust is Trust.STRICT and started.get("trust") != trust.value:  # such as an image from before
        return LabReport(
            lab=lab.id,
            title=lab.title,
            status=Status.ERROR,
            reason="the sandbox does not know --trust strict: its image is older than this grader; "
            "`make images` builds a new one",
        )
    return report.model_copy(
        update={"suspicious": suspicious(code), "trust": trust, "trust_gaps": tuple(started.get("gaps", ()))}
    )


def no_strict(lab: Lab) -> str:
    """Say that a lab cannot be graded with strict trust, and what to do."""
    return (
        f"{lab.id} does not support --trust strict: its tests need the code under test in their own process. "
        "Grade it without"
    )


def _fold(
    lab: Lab,
    expected: Sequence[ExpectedTest],
    events: Iterable[Event],
    limits: Limits,
    slow_left_out: int,
) -> LabReport:
    results: dict[str, TestResult] = {}
    milestones: list[MilestoneResult] = []
    collect_errors: list[Event] = []
    repeated: set[str] = set()
    tampering: dict[str, None] = {}
    running: str | None = None
    session_finished = False
    finished: Event = {}
    for event in events:
        match event["event"]:
            case "test_started":
                running = event["test"]
            case "test":
                running = None
                if event["test"] in results:
                    repeated.add(event["test"])
                results[event["test"]] = _test_result(event)
                milestones += [_milestone(values) for values in event["milestones"]]
            case "collect_error":
                collect_errors.append(event)
            case "session_finished":
                session_finished = True
            case "tampering":
                tampering[f"the code under test {event['what']}"] = None
            case "finished":
                finished = event
    names = [t.name for t in expected]
    tests = tuple(results.get(n, TestResult(name=n, outcome=Outcome.NOT_RUN)) for n in names)
    strangers = results.keys() - set(names) - {n for n in results if results[n].message.startswith("slow:")}
    status, reason = _status(
        tests, strangers, repeated, collect_errors, running, session_finished, finished, limits
    )
    if tampering and status is not Status.TIMEOUT and status is not Status.ERROR:
        status, reason = Status.FAILED, "; ".join(list(tampering)[:3])
    found = None
    if status is Status.FAILED and not tampering:
        hints = {m.name: m.hint for m in misconceptions.load(lab).misconception}
        found = diagnosis.diagnose(tests, diagnosis.read_signatures(lab), hints)
    return LabReport(
        lab=lab.id,
        title=lab.title,
        status=status,
        reason=reason,
        tests=tests,
        milestones=tuple(milestones),
        diagnosis=found,
        seconds=finished["seconds"],
        peak_memory_bytes=finished["peak_memory_bytes"],
        output=finished["output"] if status is not Status.VERIFIED else "",
        output_cut=finished["output_cut"],
        tampering=tuple(tampering),
        slow_left_out=slow_left_out,
    )


def _status(
    tests: Sequence[TestResult],
    strangers: set[str],
    repeated: set[str],
    collect_errors: Sequence[Event],
    running: str | None,
    session_finished: bool,
    finished: Event,
    limits: Limits,
) -> tuple[Status, str]:
    """Return the lab's status and the sentence that goes with it."""
    during = f" during {running.split('::')[-1]}" if running else ""
    match finished["end"]:
        case "timeout":
            return Status.TIMEOUT, f"no verdict within {limits.timeout_s:g} s; stopped{during}"
        case "processes":
            return (
                Status.ERROR,
                f"more than {limits.processes} processes at a time; all were stopped{during}",
            )
        case "flood":
            return Status.ERROR, f"more results came than any lab has; stopped{during}"
        case "cancelled":
            return Status.ERROR, "the grading was cancelled"
        case "signalled":
            signal = finished["code"]
            return Status.ERROR, f"ended by signal {signal} ({_SIGNALS.get(signal, 'a signal')}){during}"
    if not session_finished:
        return (
            Status.ERROR,
            f"the process ended with status {finished['code']} before the tests had finished{during}: "
            "does the code call exit, os._exit or close files that are not its own?",
        )
    if collect_errors:
        first = collect_errors[0]
        mine = all(error["code_under_test"] for error in collect_errors)
        return (Status.FAILED if mine else Status.ERROR), str(first["message"])
    counts = {outcome: sum(t.outcome is outcome for t in tests) for outcome in Outcome}
    if strangers or repeated:
        odd = ", ".join(sorted(strangers | repeated)[:3])
        return Status.ERROR, f"results came for tests that are not expected, or came twice: {odd}"
    if missing := counts[Outcome.NOT_RUN]:
        return Status.ERROR, f"{missing} of {len(tests)} expected tests did not run{during}"
    wrong = counts[Outcome.FAILED] + counts[Outcome.ERROR]
    unwritten = counts[Outcome.NOT_WRITTEN]
    if unwritten and not wrong and not counts[Outcome.PASSED]:
        return Status.NOT_ATTEMPTED, "nothing is written yet"
    if wrong or unwritten:
        parts = [f"{wrong} of {len(tests)} tests failed"] if wrong else []
        parts += [f"{unwritten} wait for code that is not written yet"] if unwritten else []
        return Status.FAILED, ", ".join(parts)
    if waiting := counts[Outcome.NOT_VERIFIED_HERE]:
        why = next(t.message for t in tests if t.outcome is Outcome.NOT_VERIFIED_HERE)
        return Status.NOT_VERIFIED_HERE, f"{waiting} of {len(tests)} tests cannot run here: {why}"
    return Status.VERIFIED, ""


def _test_result(event: Event) -> TestResult:
    outcome = Outcome(event["outcome"])
    if event["not_written"]:
        outcome = Outcome.NOT_WRITTEN
    return TestResult(
        name=event["test"],
        outcome=outcome,
        seconds=event["seconds"],
        message=event["message"],
        output=event["output"] if outcome is not Outcome.PASSED else "",
    )


def _data(lab: Lab) -> dict[str, bytes]:
    """The texts the lab trains on, as far as this machine can have them; its tests say what is missing."""
    if "tiny_shakespeare" not in lab.data:
        return {}
    try:
        corpus = tiny_shakespeare()
    except DataUnavailable:
        return {}
    # A substitute under this name would be refused by its hash.
    return {TINY_SHAKESPEARE_FILE: corpus.text.encode()} if corpus.name == "tiny_shakespeare" else {}


def _milestone(values: dict[str, object]) -> MilestoneResult:
    result = MilestoneResult.model_validate({**values, "reached": False})
    reached = result.value >= result.target if result.better == "higher" else result.value <= result.target
    return result.model_copy(update={"reached": reached})


def _commit(root: Path) -> str | None:
    """Return the checkout's commit, or None where there is no git."""
    command = [
        "git",
        "-C",
        str(root),
        "describe",
        "--always",
        "--dirty=+changes",
        "--abbrev=12",
        "--exclude=*",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


__all__ = ["OnEvent", "SubmissionError", "grade", "grade_lab"]
