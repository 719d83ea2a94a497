import sqlite3
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from grader.machine import describe
from grader.report import LabReport, Outcome, Report, Status, TestResult
from grader.sandbox.local import LocalSandbox
from grader.state import State, StateUnusable


def report(status: Status, lab: str = "ch01/lab01") -> Report:
    tests = (TestResult(name="tests/test_a.py::test_a", outcome=Outcome.PASSED, seconds=0.5),)
    return Report(
        created=datetime.now(UTC),
        code="src",
        stack="cpu",
        isolation=LocalSandbox.isolation,
        machine=describe(),
        commit=None,
        labs=(LabReport(lab=lab, title="A lab", status=status, tests=tests),),
        seconds=1.0,
    )


def test_an_empty_state_knows_nothing_and_writes_nothing(tmp_path: Path):
    state = State(tmp_path / ".topeka")
    assert (state.last("ch01/lab01"), state.last_by_lab(), state.verified(), state.count("x")) == (
        None,
        {},
        set(),
        0,
    )
    assert not (tmp_path / ".topeka").exists()


def test_the_newest_attempt_wins_and_verified_stays(tmp_path: Path):
    state = State(tmp_path)
    state.remember(report(Status.VERIFIED))
    state.remember(report(Status.FAILED))
    state.remember(report(Status.FAILED, "ch01/lab02"))
    again = State(tmp_path)  # another process would see the same
    last = again.last("ch01/lab01")
    assert last is not None
    assert last.report.status is Status.FAILED
    assert last.report.tests[0].seconds == 0.5
    assert again.last_by_lab().keys() == {"ch01/lab01", "ch01/lab02"}
    assert again.verified() == {"ch01/lab01"}
    assert again.count("ch01/lab01") == 2


def test_hints_are_counted_by_topic_and_can_begin_again(tmp_path: Path):
    state = State(tmp_path)
    assert [state.next_hint("ch01/lab01", "dot") for _ in range(3)] == [0, 1, 2]
    assert state.next_hint("ch01/lab01", "softmax") == 0
    state.forget_hints("ch01/lab01")
    assert state.next_hint("ch01/lab01", "dot") == 0


def test_two_processes_write_at_once_and_nothing_is_lost(tmp_path: Path):
    program = (
        "import sys; from pathlib import Path; from grader.state import State\n"
        "state = State(Path(sys.argv[1]))\n"
        "for _ in range(100): state.next_hint('ch01/lab01', 'dot')\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path)]) for _ in range(3)]
    assert [w.wait(timeout=120) for w in writers] == [0, 0, 0]
    assert State(tmp_path).next_hint("ch01/lab01", "dot") == 300


def test_a_damaged_file_is_an_error_that_says_what_to_do_and_stays_as_it_is(tmp_path: Path):
    (tmp_path / "state.db").write_bytes(b"this is no database, " * 100)
    with pytest.raises(StateUnusable, match="move it away"):
        State(tmp_path).last("ch01/lab01")
    assert (tmp_path / "state.db").read_bytes().startswith(b"this is no database")


def test_a_file_of_a_newer_version_is_left_alone(tmp_path: Path):
    State(tmp_path).remember(report(Status.FAILED))
    with sqlite3.connect(tmp_path / "state.db") as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(StateUnusable, match="newer version"):
        State(tmp_path).remember(report(Status.FAILED))
