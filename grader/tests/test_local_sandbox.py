"""Hostile and broken code in the local sandbox: right status, nothing left behind, parent still working."""

import os
import textwrap
import time
from pathlib import Path

import psutil
import pytest
from grader.catalog import Catalog
from grader.diagnosis import fingerprint
from grader.grading import grade_lab
from grader.report import LabReport, Outcome, Status
from grader.runner.protocol import Job, Limits
from grader.sandbox import SandboxFailed
from grader.sandbox.local import LocalSandbox
from grader.submission import pack

from .conftest import lives

RIGHT = "def double(x):\n    return x * 2\n\n\ndef is_even(n):\n    return n % 2 == 0\n"


def grade(course: Catalog, sandbox: LocalSandbox, code: str, **options: float) -> LabReport:
    source = textwrap.dedent(code).encode()
    return grade_lab(course, course.labs[0], sandbox, {"numbers_lab.py": source}, **options)


def hostile(body: str) -> str:
    """A right solution whose `double` first runs `body`."""
    return f"import os, signal, sys, time\n{RIGHT}\n_right = double\n\n\ndef double(x):\n" + textwrap.indent(
        textwrap.dedent(body) + "\nreturn _right(x)\n", "    "
    )


def left_behind() -> list[str]:
    """Work folders on disk and runner processes other than the warm parents themselves."""
    folders = [str(p) for p in Path(os.environ["TMPDIR"]).glob("topeka-job-*")]
    children = [p for p in psutil.Process().children() if lives(p)]
    parents = [p for p in children if "grader.runner" in " ".join(p.cmdline())]
    return folders + [f"process {c.pid}" for p in parents for c in p.children(recursive=True)]


@pytest.fixture(autouse=True)
def _nothing_is_left_and_the_parent_still_works(course: Catalog, sandbox: LocalSandbox):
    # Another file's tests kill warm parents; what those leave is swept by the next one that starts.
    before = set(left_behind())
    yield
    assert set(left_behind()) <= before
    assert grade(course, sandbox, RIGHT).status is Status.VERIFIED
    assert set(left_behind()) <= before


def test_right_code_is_verified_with_every_expected_test(course, sandbox):
    report = grade(course, sandbox, RIGHT)
    assert report.status is Status.VERIFIED
    assert [t.outcome for t in report.tests] == [Outcome.PASSED] * 5
    assert report.tests[0].name == "tests/test_numbers.py::test_double[1.5]"
    assert report.peak_memory_bytes is not None
    assert report.peak_memory_bytes > 10 << 20


def test_the_skeleton_is_not_attempted(course, sandbox):
    report = grade(course, sandbox, (course.labs[0].path / "src" / "numbers_lab.py").read_text())
    assert report.status is Status.NOT_ATTEMPTED
    assert {t.outcome for t in report.tests} == {Outcome.NOT_WRITTEN}
    assert report.tests[0].message == "not written yet: twice a number"


def test_wrong_code_fails_with_the_tests_own_message(course, sandbox):
    report = grade(course, sandbox, RIGHT.replace("x * 2", "x * 3"))
    assert report.status is Status.FAILED
    assert report.reason == "4 of 5 tests failed"
    assert report.tests[0].message.splitlines()[0] == "got 4.5: is the operator right?"


def test_messages_do_not_depend_on_the_callers_environment(course, monkeypatch):
    """pytest words a comparison differently where CI is set, and takes options from PYTEST_ADDOPTS."""
    tests = course.labs[0].path / "tests" / "test_numbers.py"
    tests.write_text(tests.read_text() + "\n\ndef test_pair():\n    assert (double(1), 3) == (2, 3)\n")
    wrong = RIGHT.replace("x * 2", "x * 3")
    messages = []
    for environment in ({}, {"CI": "true", "BUILD_NUMBER": "7", "PYTEST_ADDOPTS": "-k nothing_at_all -vv"}):
        for name in ("CI", "BUILD_NUMBER", "PYTEST_ADDOPTS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with LocalSandbox(threads=1) as sandbox:
            report = grade(course, sandbox, wrong)
        assert report.status is Status.FAILED
        messages.append([t.message for t in report.tests])
    assert messages[0] == messages[1]
    assert messages[0][-1]


def test_half_written_code_fails_and_says_what_is_missing(course, sandbox):
    report = grade(course, sandbox, RIGHT.replace("return n % 2 == 0", "raise NotImplementedError('even')"))
    assert report.status is Status.FAILED
    assert report.reason == "1 wait for code that is not written yet"


def test_a_syntax_error_shows_file_line_and_caret(course, sandbox):
    report = grade(course, sandbox, "def double(x:\n    return x\n")
    assert report.status is Status.FAILED
    assert 'src/numbers_lab.py", line 1' in report.reason
    assert "^" in report.reason
    assert "site-packages" not in report.reason
    assert {t.outcome for t in report.tests} == {Outcome.NOT_RUN}


def test_a_missing_file_is_named(course, sandbox):
    report = grade_lab(course, course.labs[0], sandbox, {})
    assert report.status is Status.FAILED
    assert "numbers_lab.py is missing" in report.reason


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("os._exit(0)", "status 0 before the tests had finished during test_double[1.5]"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "signal 9"),
        ("os.abort()", "signal 6"),
        ("os.closerange(0, 256); os._exit(0)", "before the tests had finished"),
    ],
)
def test_code_that_ends_its_process_is_an_error(course, sandbox, body, words):
    report = grade(course, sandbox, hostile(body))
    assert report.status is Status.ERROR
    assert words in report.reason


def test_code_that_exits_on_import_is_an_error(course, sandbox):
    report = grade(course, sandbox, f"import os\nos._exit(0)\n{RIGHT}")
    assert report.status is Status.ERROR


@pytest.mark.parametrize("statement", ["sys.exit(0)", "raise SystemExit", "raise GeneratorExit"])
def test_leaving_by_exception_is_no_way_to_pass(course, sandbox, statement):
    assert grade(course, sandbox, hostile(statement)).status in (Status.FAILED, Status.ERROR)


def test_a_keyboard_interrupt_does_not_hide_tests(course, sandbox):
    report = grade(course, sandbox, hostile("raise KeyboardInterrupt"))
    assert report.status is Status.ERROR
    assert "did not run" in report.reason


@pytest.mark.parametrize(
    "statement", ["pytest.exit('done', returncode=0)", "pytest.skip('slow: no')", "pytest.xfail('known')"]
)
def test_pytests_own_ways_out_are_failures_when_the_code_under_test_takes_them(course, sandbox, statement):
    report = grade(course, sandbox, hostile(f"import pytest\n{statement}"))
    assert report.status is Status.FAILED
    assert report.reason == "4 of 5 tests failed"


def test_closing_every_descriptor_does_not_pass(course, sandbox):
    report = grade(course, sandbox, hostile("os.closerange(0, 256)"))
    assert report.status is Status.ERROR


def test_printing_a_gigabyte_keeps_the_tail_and_says_that_it_is_cut(course, sandbox):
    # pytest captures descriptor 1, so look for the pipe behind it: it is open more than once, as
    # pytest's copies of standard output and standard error.
    body = """
    if x == 1.5:
        links = {int(fd): os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")[:-1]}
        pipes = [link for link in links.values() if link.startswith("pipe:")]
        out = next(fd for fd, link in links.items() if pipes.count(link) > 1)
        block = b"x" * (1 << 20)
        for _ in range(1024):
            os.write(out, block)
        os.write(out, b"the end")
    x = 5 * x
    """
    report = grade(course, sandbox, hostile(body))
    assert report.status is Status.FAILED
    assert report.output_cut
    assert len(report.output) == 64 << 10
    assert "the end" in report.output[-100:]


def test_printing_without_end_inside_a_test_stops_at_the_file_limit(course, sandbox):
    report = grade(course, sandbox, hostile("while True: print('x' * 1_000_000)"))
    assert report.status is Status.FAILED
    assert "File too large" in report.tests[0].message
    assert len(report.tests[0].output) <= 4_000


def test_sleeping_for_ever_is_a_timeout_that_names_the_test(course, sandbox):
    started = time.monotonic()
    report = grade(
        course,
        sandbox,
        hostile("signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(1e6)"),
        timeout_s=1.0,
    )
    assert report.status is Status.TIMEOUT
    assert report.reason == "no verdict within 1 s; stopped during test_double[1.5]"
    assert time.monotonic() - started < 20


def test_a_daemon_in_its_own_session_is_ended_too(course, sandbox, tmp_path):
    mark = tmp_path / "daemon"
    body = f"""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            open({str(mark)!r}, "w").write(str(os.getpid()))
            time.sleep(1e6)
        os._exit(0)
    while not (os.path.exists({str(mark)!r}) and open({str(mark)!r}).read()):
        time.sleep(0.01)
    """
    assert grade(course, sandbox, hostile(body)).status is Status.VERIFIED
    assert not psutil.pid_exists(int(mark.read_text()))


def test_forking_for_ever_ends_in_an_error_and_leaves_no_process(course, sandbox):
    body = """
    while True:
        try:
            os.fork()
        except OSError:
            time.sleep(0.01)
    """
    report = grade(course, sandbox, hostile(body), timeout_s=5.0)
    assert report.status in (Status.ERROR, Status.TIMEOUT)


def test_too_much_memory_fails_the_test_and_not_the_machine(course, sandbox):
    report = grade(course, sandbox, hostile("hoard = bytearray(64 << 30)"))
    assert report.status is Status.FAILED
    assert "MemoryError" in report.tests[0].message


def test_a_huge_file_cannot_be_written(course, sandbox):
    body = """
    with open("big", "wb") as f:
        for _ in range(1024):
            f.write(b"x" * (1 << 20))
    """
    report = grade(course, sandbox, hostile(body))
    assert report.status is Status.FAILED
    assert "File too large" in report.tests[0].message


def test_an_unreadable_folder_is_removed_all_the_same(course, sandbox):
    body = """
    os.makedirs("deep/er", exist_ok=True)
    open("deep/er/file", "w").close()
    os.chmod("deep", 0)
    """
    grade(course, sandbox, hostile(body))


def test_forged_lines_on_the_event_channel_are_no_events(course, sandbox):
    body = r"""
    for fd in range(3, 64):
        try:
            os.write(fd, b'{"event": "finished", "end": "exited", "code": 0}\nnonsense\n\xff\n')
        except OSError:
            pass
    """
    report = grade(course, sandbox, hostile(body).replace("_right(x)", "0.0"))
    assert report.status is not Status.VERIFIED


def test_a_submission_brings_no_tests_and_no_configuration(course, sandbox):
    lab = course.labs[0]
    wrong = RIGHT.replace("x * 2", "x")
    folder = lab.path / "src"
    (folder / "tests").mkdir()
    for name in ("conftest.py", "pytest.ini", "tests/test_numbers.py"):
        (folder / name).write_text("raise RuntimeError('this file must not be read')")
    (folder / "numbers_lab.py").write_text(wrong)
    from grader.submission import read_code

    assert set(read_code(lab, folder)) == {"numbers_lab.py"}
    assert grade_lab(course, lab, sandbox, read_code(lab, folder)).reason == "4 of 5 tests failed"


def test_slow_tests_count_only_when_asked_for(course, sandbox):
    report = grade(course, sandbox, RIGHT)
    assert (len(report.tests), report.slow_left_out) == (5, 1)
    assert report.status is Status.VERIFIED
    report = grade(course, sandbox, RIGHT, slow=True)
    assert (len(report.tests), report.slow_left_out) == (6, 0)
    assert report.status is Status.VERIFIED


def test_a_set_in_a_message_has_the_same_order_in_every_sandbox(course, sandbox):
    code = hostile("raise ValueError({str(n) for n in range(40)})")
    with LocalSandbox(threads=1) as other:
        messages = [[t.message for t in grade(course, where, code).tests] for where in (sandbox, other)]
    assert "'39'" in messages[0][0]
    assert messages[0] == messages[1]


def test_the_folder_of_a_job_is_no_part_of_a_fingerprint(course, sandbox):
    code = hostile("import tempfile\nraise ValueError(tempfile.gettempdir() + '/file')")
    with LocalSandbox(threads=1) as other:
        messages = [grade(course, where, code).tests[0].message for where in (sandbox, other)]
    assert messages[0] != messages[1]
    assert fingerprint(messages[0]) == fingerprint(messages[1])


def test_a_job_brings_the_texts_that_its_lab_trains_on(course, sandbox):
    lab = course.labs[0]
    tests = lab.path / "tests" / "test_numbers.py"
    before = tests.read_text()
    tests.write_text(
        before + "\n\ndef test_text():\n    import os, pathlib\n"
        '    assert pathlib.Path(os.environ["TOPEKA_DATA"], "text.txt").read_text() == "to be"\n'
    )
    job = Job(id="x", folder="ch01_numbers/lab01_double", tests=("tests/test_numbers.py::test_text",))
    for data, outcome in (({"text.txt": b"to be"}, "passed"), (None, "failed")):
        tar = pack(course, lab, {"numbers_lab.py": RIGHT.encode()}, data)
        told = [e["outcome"] for e in sandbox.run(job, tar) if e["event"] == "test"]
        assert told == [outcome]
    tests.write_text(before)


def test_a_killed_runner_is_reported_and_replaced(course, sandbox):
    with LocalSandbox(threads=1) as mine:
        assert grade(course, mine, RIGHT).status is Status.VERIFIED
        report = grade(course, mine, hostile("os.kill(os.getppid(), signal.SIGKILL); time.sleep(30)"))
        assert report.status is Status.ERROR
        assert "the runner ended in the middle of a job: killed by signal 9" in report.reason
        assert grade(course, mine, RIGHT).status is Status.VERIFIED  # sweeps what the killed one left


def test_a_stopped_runner_is_a_timeout_and_is_replaced(course, monkeypatch):
    monkeypatch.setattr("grader.sandbox.local.GRACE_S", 1.0)
    with LocalSandbox(threads=1) as mine:
        body = "os.kill(os.getppid(), signal.SIGSTOP); time.sleep(1e6)"
        assert grade(course, mine, hostile(body), timeout_s=1.0).status is Status.TIMEOUT
        assert grade(course, mine, RIGHT).status is Status.VERIFIED


def test_a_tree_deeper_than_recursion_goes_is_removed(course, sandbox):
    """It would keep every later runner from starting, since each sweeps what is left."""
    body = """
    here = os.getcwd()
    for number in range(3_000):
        os.mkdir("deep")
        open("file", "w").close()
        os.symlink("/", "link")
        os.chdir("deep")
    os.chdir(here)
    """
    grade(course, sandbox, hostile(f"if x == 1.5:\n{textwrap.indent(textwrap.dedent(body), '    ')}"))


def test_files_in_the_current_folder_are_not_the_runners_modules(course, tmp_path, monkeypatch):
    for name in ("psutil", "numpy", "torch", "pynvml"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('this file must not be read')")
    monkeypatch.chdir(tmp_path)
    with LocalSandbox(threads=1) as mine:
        assert grade(course, mine, RIGHT).status is Status.VERIFIED


def test_messages_that_are_no_text_do_not_stop_the_grading(course, sandbox):
    report = grade(course, sandbox, hostile(r"raise ValueError('half a pair: \ud800, nothing: \0')"))
    assert report.status is Status.FAILED
    assert "half a pair: ?" in report.tests[0].message
    assert report.model_dump_json()


def test_malformed_results_are_dropped(course, sandbox):
    body = r"""
    for fd in range(3, 64):
        try:
            for line in (b'{"event": "test"}', b'{"event": "test_started", "test": null}', b"[" * 100_000):
                os.write(fd, line + b"\n")
        except OSError:
            pass
    """
    report = grade(course, sandbox, hostile(body))
    assert report.status is Status.VERIFIED


def test_leaving_a_run_half_way_ends_the_job(course):
    lab = course.labs[0]
    code = hostile("time.sleep(1e6)").encode()
    job = Job(id="x", folder="ch01_numbers/lab01_double", limits=Limits(timeout_s=600))
    with LocalSandbox(threads=1) as mine:
        events = mine.run(job, pack(course, lab, {"numbers_lab.py": code}))
        assert next(events)["event"] == "started"
        pid = mine._process.pid
        events.close()
        assert not psutil.pid_exists(pid)


def test_a_runner_that_cannot_start_says_so(course, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.devnull)
    mine = LocalSandbox(preload=("this_module_is_ignored_if_missing",))
    monkeypatch.setattr("sys.executable", "/nonexistent/python")
    job = Job(id="x", folder="ch01_numbers/lab01_double")
    with pytest.raises(SandboxFailed, match="could not be started"):
        list(mine.run(job, b""))


def test_libraries_may_keep_what_is_no_module_among_the_modules(course, monkeypatch, tmp_path):
    # Keras, six and pybind11 do; None is Python's own word for a module that shall not be imported.
    lines = ["import sys", "sys.modules['odd.one'] = object()", "sys.modules['odd.none'] = None"]
    tmp_path.joinpath("odd.py").write_text("\n".join(lines))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    with LocalSandbox(threads=1, preload=("odd",)) as mine:
        assert grade(course, mine, RIGHT).status is Status.VERIFIED


def test_a_collection_that_pytest_gives_up_says_why(course, monkeypatch, tmp_path):
    tmp_path.joinpath("broken.py").write_text(
        "import grader.runner.child as child\n"
        "def fail(self, session):\n    raise RuntimeError('this library is broken')\n"
        "child.EventsPlugin.pytest_collection = fail\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    with LocalSandbox(threads=1, preload=("broken",)) as mine:
        report = grade(course, mine, RIGHT)
    assert report.status is Status.ERROR
    assert "pytest ended with exit status 70: RuntimeError: this library is broken" in report.reason


def test_the_process_that_forks_jobs_does_not_load_nvml(course, monkeypatch, tmp_path):
    # On a machine with a GPU NVML starts a thread with pipes, which jobs would inherit.
    asked = tmp_path / "asked"
    tmp_path.joinpath("pynvml.py").write_text(
        "import os\nclass NVMLError(Exception):\n    value = 12\n"
        f"def nvmlInit():\n    open({str(asked)!r}, 'a').write(f'{{os.getpid()}} ')\n    raise NVMLError\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    with LocalSandbox(threads=1) as mine:
        assert grade(course, mine, RIGHT).status is Status.VERIFIED
        askers = asked.read_text().split()
        assert len(askers) == 1
        assert int(askers[0]) != mine._process.pid
