"""The command as users run it: real processes in a miniature course."""

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from grader.catalog import Catalog

TOPEKA = [sys.executable, "-m", "grader.cli"]
LAB = Path("labs/ch01_numbers/lab01_double")


def topeka(course: Catalog, *arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*TOPEKA, *arguments], cwd=course.root, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
        **options,
    )  # fmt: skip


def write(course: Catalog, text: str) -> None:
    (course.root / LAB / "src" / "numbers_lab.py").write_text(text)


def right(course: Catalog) -> str:
    return (course.root / LAB / "solutions" / "numbers_lab.py").read_text()


def test_grading_the_solutions_verifies_all_and_exits_with_0(course):
    done = topeka(course, "grade", "ch01", "--code", "solutions", "--json", "-")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["schema_version"] == 1
    assert [lab["status"] for lab in report["labs"]] == ["verified", "verified"]
    milestone = report["labs"][1]["milestones"][0]
    assert (milestone["value"], milestone["target"], milestone["reached"]) == (0.0, 1e-5, True)
    assert report["isolation"] | {"note": ""} == {
        "sandbox": "local", "isolated": False, "note": "", "image_digest": None, "flags": [],
    }  # fmt: skip
    assert report["machine"]["libraries"]["torch"]


def test_grading_the_skeletons_exits_with_1_and_passes_nothing(course):
    done = topeka(course, "grade", "ch01", "--json", "-")
    assert done.returncode == 1
    labs = json.loads(done.stdout)["labs"]
    assert [lab["status"] for lab in labs] == ["not_attempted", "not_attempted"]
    assert not [t for lab in labs for t in lab["tests"] if t["outcome"] == "passed"]


def test_a_failing_grade_shows_message_diagnosis_and_next_step_as_plain_text(course):
    assert topeka(course, "check", "all", "--write").returncode == 0
    write(course, right(course).replace("x * 2", "x * 2 + 1"))
    done = topeka(course, "grade", "ch01/lab01", "--json", "report.json")
    assert done.returncode == 1
    for words in (
        "ch01/lab01  failed  1/5 tests",
        "test_double (3 of 3)",
        "got 4.0: is the operator right?",
        "Looks like: wrong_factor (100% alike)",
        "You are off by one somewhere.",
        "Next: `topeka watch ch01/lab01`",
    ):
        assert words in done.stdout, done.stdout
    assert "Traceback" not in done.stdout
    assert "\x1b[" not in done.stdout
    report = json.loads((course.root / "report.json").read_text())
    assert report["labs"][0]["diagnosis"]["misconception"] == "wrong_factor"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["grade", "ch99"], 2, "ch99"),
        (["grade", "ch01/lab07"], 2, "ch01/lab07"),
        (["grade"], 2, "TARGET"),
        (["grade", "ch01", "--code", "nowhere"], 2, "nowhere is no folder"),
        (["grade", "ch01", "--sandbox", "moon"], 2, "moon"),
        (["grade", "ch01", "--timeout", "0"], 2, "timeout"),
        (["grade", "ch01", "--json", "no/such/folder/report.json"], 2, "No such file"),
        (["grade", "ch01", "--stack", "multi-gpu"], 3, "this environment is the"),
        (["hint", "ch01"], 2, "names 2 labs"),
        (["nonsense"], 2, "nonsense"),
    ],
)
def test_wrong_usage_is_a_sentence_and_no_stack(course, arguments, code, words):
    done = topeka(course, *arguments)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_broken_catalogue_names_file_and_key(course):
    chapter = course.root / "labs" / "ch01_numbers" / "chapter.toml"
    chapter.write_text(chapter.read_text().replace("minutes = 5", 'minutes = "soon"', 1))
    done = topeka(course, "list")
    assert done.returncode == 3
    assert "chapter.toml" in done.stderr
    assert "minutes" in done.stderr
    assert "Traceback" not in done.stderr


def test_state_moves_from_to_do_to_verified_and_next_follows(course):
    assert "ch01/lab01" in topeka(course, "next").stdout
    write(course, right(course))
    assert topeka(course, "grade", "ch01/lab01").returncode == 0
    assert "ch01/lab02" in topeka(course, "next").stdout
    rows = {row["lab"]: row["status"] for row in json.loads(topeka(course, "list", "--json").stdout)}
    assert rows == {"ch01/lab01": "verified", "ch01/lab02": None}
    assert "1 of 2 labs verified" in topeka(course, "progress").stdout


def test_grading_the_solutions_is_no_progress(course):
    assert topeka(course, "grade", "all", "--code", "solutions").returncode == 0
    assert "0 of 2 labs verified" in topeka(course, "progress").stdout


def test_hints_come_one_at_a_time_down_to_the_solutions_lines(course):
    texts = [topeka(course, "hint", "ch01/lab01").stdout for _ in range(4)]
    assert "Next to write: `double`" in texts[0]
    assert "README.md" in texts[1]
    assert "return x * 2" in texts[2]
    assert "Hint 3 of 3" in texts[3]  # the last one stays
    assert "Hint 1 of 3" in topeka(course, "hint", "ch01/lab01", "--restart").stdout
    write(course, right(course))
    topeka(course, "grade", "ch01/lab01")
    assert "Nothing is left to write" in topeka(course, "hint", "ch01/lab01").stdout


def test_the_solution_is_shown_unasked_only_when_verified(course):
    done = topeka(course, "solution", "ch01/lab01")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--yes" in done.stderr
    assert topeka(course, "solution", "ch01/lab01", "--yes").stdout == right(course)
    write(course, right(course))
    topeka(course, "grade", "ch01/lab01")
    assert topeka(course, "solution", "ch01/lab01").stdout == right(course)


def test_reset_brings_the_skeleton_back_and_keeps_a_backup(course):
    shipped = (course.root / LAB / "src" / "numbers_lab.py").read_text()
    assert "nothing to do" in topeka(course, "reset", "ch01/lab01").stdout
    topeka(course, "lab", "ch01", "--no-serve")  # keeps snapshots: this course is not in git
    write(course, "my own work\n")
    assert topeka(course, "reset", "ch01/lab01").returncode == 2  # asks first
    done = topeka(course, "reset", "ch01/lab01", "--yes")
    assert done.returncode == 0, done.stderr
    assert (course.root / LAB / "src" / "numbers_lab.py").read_text() == shipped
    backups = list((course.root / ".topeka" / "backups").rglob("numbers_lab.py"))
    assert [b.read_text() for b in backups] == ["my own work\n"]


def test_a_read_only_state_folder_grades_all_the_same(course):
    (course.root / ".topeka").write_text("a file where the folder should be")
    write(course, right(course))
    done = topeka(course, "grade", "ch01/lab01")
    assert done.returncode == 0, done.stderr
    assert "not remembered" in done.stderr


def test_from_inside_a_lab_folder_the_same_course_is_found(course):
    done = subprocess.run(
        [*TOPEKA, "list"], cwd=course.root / LAB / "src", capture_output=True, text=True, timeout=60
    )
    assert "Doubling" in done.stdout


def test_the_command_starts_without_torch():
    program = (
        "import sys, grader.cli; sys.argv = ['topeka', 'list']\n"
        "grader.cli.app(standalone_mode=False); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


# --- in a terminal --------------------------------------------------------------------------------


class Terminal:
    """A command in a pseudo-terminal."""

    def __init__(self, course: Catalog, *arguments: str) -> None:
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.chdir(course.root)
            # Whoever runs these tests in the background of a script ignores Ctrl-C, and that is inherited.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.environ.update(TERM="xterm-256color", COLUMNS="120", LINES="50")
            os.execv(sys.executable, [*TOPEKA, *arguments])
        self.text = ""

    def wait_for(self, pattern: str, timeout: float = 60.0) -> str:
        """Read until `pattern` is in the new text, and return that text."""
        start, deadline = len(self.text), time.monotonic() + timeout
        while not re.search(pattern, self.text[start:]):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.text[start:]!r}"
            if select.select([self._fd], [], [], 0.1)[0]:
                try:
                    self.text += os.read(self._fd, 1 << 16).decode(errors="replace")
                except OSError:
                    raise AssertionError(f"ended before {pattern!r}: {self.text[start:]!r}") from None
        return self.text[start:]

    def interrupt(self) -> int:
        """Press Ctrl-C and return the exit status."""
        os.write(self._fd, b"\x03")
        return self.end()

    def end(self) -> int:
        """Wait for the command to end and return its exit status."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if select.select([self._fd], [], [], 0.05)[0]:
                with contextlib.suppress(OSError):  # the terminal closes when the command ends
                    self.text += os.read(self._fd, 1 << 16).decode(errors="replace")
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
        os.kill(self.pid, signal.SIGKILL)
        raise AssertionError("it does not end")


def test_a_terminal_gets_a_coloured_table(course):
    terminal = Terminal(course, "grade", "ch01", "--code", "solutions")
    text = terminal.wait_for("All 2 verified")
    assert "\x1b[" in text
    assert "milestone" in text
    assert "largest error: 0 absolute (at most 1e-05 promised)" in text
    assert "1 slow test left out" in text
    assert terminal.end() == 0


def test_watch_follows_saves_syntax_errors_and_renames_until_ctrl_c(course):
    file = course.root / LAB / "src" / "numbers_lab.py"
    terminal = Terminal(course, "watch", "ch01/lab01")
    terminal.wait_for("not attempted(.|\n)*watching for the next save")
    file.write_text(right(course).replace("* 2", "* 3"))
    terminal.wait_for("failed(.|\n)*watching for the next save")
    file.write_text("def double(x:\n")
    assert "SyntaxError" in terminal.wait_for("watching for the next save")
    new = file.with_suffix(".new")  # as vim and many others do
    new.write_text(right(course))
    new.replace(file)
    terminal.wait_for("verified(.|\n)*watching for the next save")
    file.unlink()
    assert "is missing" in terminal.wait_for("watching for the next save")
    file.write_text(right(course))
    terminal.wait_for("verified(.|\n)*watching for the next save")
    assert terminal.interrupt() == 0
    assert "Stopped watching." in terminal.text


def test_ctrl_c_in_the_middle_of_a_grading_ends_it_at_once_and_leaves_nothing(course):
    write(course, "import time\nprint('here')\ntime.sleep(1e6)\n")
    terminal = Terminal(course, "grade", "ch01/lab01")
    terminal.wait_for("ch01/lab01")
    time.sleep(1.5)
    assert terminal.interrupt() == 130
    left = subprocess.run(["pgrep", "-g", str(terminal.pid)], capture_output=True, text=True).stdout
    assert left == ""
