"""Runs real pytest in subprocesses, on a miniature course made of this checkout's own wiring.

Starting Python and importing torch takes longer than the tests themselves, so most runs
hold many labs or tests, and what several tests look at is run once (`runs`).
"""

import importlib.metadata
import itertools
import json
import os
import re
import shutil
import sys
from pathlib import Path
from textwrap import dedent

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]

# Writes what the plugin adds to reports, and the random numbers the tests drew, as JSON lines.
RECORDER = """
import json
import os
import zlib


def write(report, **more):
    event = {
        "test": report.nodeid,
        "outcome": report.outcome,
        "shown": str(report.longrepr),
        "mine": getattr(report, "code_under_test_failed", False),
        **more,
    }
    with open(os.environ["RECORD"], "a") as file:
        file.write(json.dumps(event) + "\\n")


def pytest_collectreport(report):
    if report.outcome != "passed":
        write(report, when="collect")


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        write(
            report,
            when=report.when,
            brief=getattr(report, "brief", None),
            not_written=getattr(report, "not_written", None),
            properties=report.user_properties,
        )


def pytest_collection_modifyitems(items):
    if order := os.environ.get("ORDER"):
        items.sort(key=lambda item: zlib.crc32(item.nodeid.encode() + order.encode()))
"""


class Course:
    """A miniature course in pytester's folder."""

    def __init__(self, pytester, monkeypatch):
        self.path = pytester.path / "a course"
        self._pytester = pytester
        self._monkeypatch = monkeypatch
        self.path.mkdir()
        for name in ("pyproject.toml", "conftest.py"):
            shutil.copy(ROOT / name, self.path / name)
        without = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "shared" / "src", self.path / "shared" / "src", ignore=without)
        self.write("grader/src/grader/__init__.py", "")
        self._tools = pytester.mkdir("tools")
        (self._tools / "recorder.py").write_text(RECORDER)
        self._record = pytester.path / "record.jsonl"
        for name, value in {
            "CUDA_VISIBLE_DEVICES": "",  # these tests are about machines without a GPU
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTHONPATH": str(self._tools),
            "RECORD": str(self._record),
        }.items():
            monkeypatch.setenv(name, value)
        for name in ("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX"):
            monkeypatch.delenv(name, raising=False)  # bytecode caching as learners have it

    def write(self, name, text):
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(dedent(text).lstrip("\n"))
        return file

    def lab(self, folder, files, chapter="ch01_numbers"):
        """Write a lab; `files` are texts by path in it, and those in `src/` are the listed ones."""
        home = f"labs/{chapter}"
        for name, text in files.items():
            self.write(f"{home}/{folder}/{name}", text)
        listed = [name.removeprefix("src/") for name in files if name.startswith("src/")]
        with (self.path / home / "chapter.toml").open("a") as file:
            file.write(f'[[lab]]\nfolder = "{folder}"\nfiles = {json.dumps(listed)}\n')
        return self.path / home / folder

    def run(self, *arguments, cwd=None, python=(), **environment):
        self._record.write_text("")
        with self._monkeypatch.context() as patch:
            patch.chdir(self.path if cwd is None else cwd)
            for name, value in environment.items():
                patch.setenv(name, value)
            command = [sys.executable, *python, "-m", "pytest", "-p", "recorder", "-p", "no:cacheprovider"]
            result = self._pytester.run(*command, *arguments, timeout=100)
        return Run(result, [json.loads(line) for line in self._record.read_text().splitlines()])


class Run:
    """How a run of pytest ended, and what it recorded."""

    def __init__(self, result, events):
        self.exit = result.ret
        self.text = result.stdout.str() + result.stderr.str()
        self.counts = result.parseoutcomes() if " in " in (result.outlines or [""])[-1] else {}
        self.events = events

    def event(self, name):
        """The last event of the test or file whose id ends with `name`."""
        found = [event for event in self.events if event["test"].endswith(name)]
        assert found, f"nothing recorded for {name} in:\n{self.text}"
        return found[-1]

    def property(self, wanted):
        (value,) = [v for event in self.events for name, v in event.get("properties", []) if name == wanted]
        return value

    def draws(self):
        return {
            event["test"]: value
            for event in self.events
            for name, value in event.get("properties", [])
            if name == "draws"
        }


@pytest.fixture
def course(pytester, monkeypatch):
    return Course(pytester, monkeypatch)


@pytest.fixture(scope="module")
def runs():
    """Runs that several tests look at, by name."""
    return {}


def once(name):
    """Make a fixture of a function that runs pytest: the first test to ask runs it."""

    def decorate(function):
        @pytest.fixture(name=name)
        def fixture(course, runs):
            if name not in runs:
                runs[name] = function(course)
            return runs[name]

        return fixture

    return decorate


# --- a course in order ----------------------------------------------------------------------

TEST_WHERE = """
    import sys

    import numpy as np
    import pytest
    import torch
    from same import where


    def test_the_code_is_this_labs(record_property):
        import same

        assert where() == same.where() == WHERE
        assert "same" in sys.modules


    class TestInAClass:
        @pytest.mark.parametrize("x", ["a", "a/b::c"])
        def test_draws(self, x, record_property, rng, randn):
            import random

            draws = [rng.random(), randn(2).tolist(), randn(2).tolist()]
            draws += [random.random(), np.random.rand(), torch.rand(1).item()]
            record_property("draws", draws)
    """

GOOD = {
    "lab01_one": {
        "src/same.py": "def where(): return 'src of one'",
        "solutions/same.py": "def where(): return 'solution of one'",
        "tests/test_where.py": TEST_WHERE.replace("WHERE", "'src of one'"),
        "tests/conftest.py": """
            import pytest


            @pytest.fixture
            def place():
                from same import where

                return where()
            """,
        "tests/test_fixture.py": """
            def test_a_fixture_of_conftest_sees_the_code(place):
                assert place == "src of one"
            """,
        "tests/deep/conftest.py": """
            import pytest


            @pytest.fixture
            def place(place):
                return "deep in the " + place
            """,
        "tests/deep/test_where.py": """
            def test_a_deeper_conftest_builds_on_it(place):
                from same import where

                assert place == "deep in the " + where() == "deep in the src of one"
            """,
    },
    "lab02_two": {
        "src/same.py": "import other\ndef where(): return 'src of ' + other.NAME\ndef spell(): return 'two'",
        "src/other.py": "import same\nNAME = 'two'\ndef respell(): return same.spell()",
        "tests/test_where.py": TEST_WHERE.replace("WHERE", "'src of two'"),
        "tests/test_cycle.py": """
            import other

            def test_two_files_import_each_other():
                import same

                assert other.respell() == "two"
                assert other.same is same
            """,
    },
}


def write_good(course):
    for folder, files in GOOD.items():
        course.lab(folder, files)
    course.write(
        "shared/tests/test_small.py",
        """
        import shared.course
        import sys

        def test_shared_is_the_checkouts(record_property):
            record_property("shared", shared.__file__)
            record_property("same", getattr(sys.modules.get("same"), "__file__", None))
        """,
    )
    course.write("grader/tests/conftest.py", "import grader")
    course.write("grader/tests/test_small.py", "import grader\ndef test_grader(): assert grader.__file__")


def is_good(run, tests):
    assert run.exit == 0, run.text
    assert run.counts == {"passed": tests}, run.text


@once("whole")
def run_whole(course):
    write_good(course)
    # A namesake elsewhere on sys.path, imported before any lab, must not matter.
    course.write("../tools/same.py", "def where(): raise RuntimeError('the wrong file')")
    course.write("../tools/early.py", "import same")
    return course.run("labs", "shared", "grader", "-p", "early")


def test_labs_with_the_same_module_names_shared_and_grader_run_together(whole):
    is_good(whole, 11)
    assert whole.property("shared").endswith("a course/shared/src/shared/__init__.py")


def test_outside_the_labs_a_namesake_is_what_it_was(whole):
    assert whole.property("same").endswith("tools/same.py")


def test_inputs_do_not_depend_on_the_order_also_if_labs_alternate(course, whole):
    write_good(course)
    run = course.run("labs", "shared", "grader", ORDER="mixed")
    is_good(run, 11)
    labs = [event["test"].split("/")[2] for event in run.events if event["test"].startswith("labs/")]
    assert sum(a != b for a, b in itertools.pairwise(labs)) > 2
    assert run.draws() == whole.draws()


def test_inputs_differ_between_tests_and_between_draws(whole):
    draws = whole.draws()
    assert len(draws) == 4
    for test, (_, first, second, *_) in draws.items():
        assert first != second, test
    # The same test in another lab draws the same; another parameter does not.
    by_name = {test.split("/")[2] + test.split("::", 2)[2]: value for test, value in draws.items()}
    assert by_name["lab01_onetest_draws[a]"] == by_name["lab02_twotest_draws[a]"]
    assert all(
        x != y
        for x, y in zip(
            by_name["lab01_onetest_draws[a]"], by_name["lab01_onetest_draws[a/b::c]"], strict=True
        )
    )


def test_seed_shifts_every_input_and_the_same_seed_gives_the_same(course, whole):
    write_good(course)
    inside = course.path / "labs" / "ch01_numbers" / "lab01_one" / "src"
    run = course.run("../tests/test_where.py", "--seed", "7", cwd=inside)
    is_good(run, 3)
    for test, draws in run.draws().items():
        assert all(a != b for a, b in zip(draws, whole.draws()[test], strict=True))


def test_a_lab_runs_from_inside_with_the_same_inputs(course, whole):
    write_good(course)
    run = course.run(cwd=course.path / "labs" / "ch01_numbers" / "lab01_one")
    is_good(run, 5)
    assert len(run.draws()) == 2
    assert run.draws().items() <= whole.draws().items()


def site_with_only(folder, *names):
    """Fill `folder` with links to installed distributions and what they need, and nothing else."""
    pending, seen = list(names), set()
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # needed on another system
        for top in {
            file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")
        }:
            link = folder / top
            if not link.exists():
                link.symlink_to(distribution.locate_file(top))
        needs = (Requirement(need) for need in distribution.requires or ())
        pending += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return folder


def test_a_bare_checkout_needs_only_torch_and_pytest(course, pytester, monkeypatch, whole):
    write_good(course)
    site = site_with_only(pytester.mkdir("site"), "torch", "numpy", "pytest")
    # -S: Python reads no site-packages and no .pth file, so an editable install is out of reach.
    path = os.pathsep.join([str(site), str(pytester.path / "tools")])
    with monkeypatch.context() as patch:
        patch.chdir(site)
        patch.setenv("PYTHONPATH", path)
        look = "import importlib.util as u; print([u.find_spec(n) is None for n in ('shared', 'hypothesis', 'pytest')])"
        assert pytester.run(sys.executable, "-S", "-c", look).outlines == ["[True, True, False]"]
    run = course.run("labs", "shared", python=["-S"], PYTHONPATH=path, PYTEST_DISABLE_PLUGIN_AUTOLOAD="")
    is_good(run, 10)
    assert run.draws() == whole.draws()
    assert run.property("shared") == str(course.path / "shared" / "src" / "shared" / "__init__.py")
    assert run.property("same") is None


# --- --code ---------------------------------------------------------------------------------

TEST_ORIGIN = """
    import pytest
    from numbers_lab import ORIGIN


    @pytest.mark.parametrize("origin", [ORIGIN])
    def test_origin(origin):
        pass
    """


def origins(run):
    """Where the code of each lab came from: known at collection, so no test needs to run."""
    assert run.exit == 0, run.text
    return dict(re.findall(r"(lab\d\d)_\w+/tests/test_origin\.py::test_origin\[(.*)\]", run.text))


def test_code_chooses_src_solutions_a_folder_or_a_mirror_of_labs(course):
    for lab in ("lab01_one", "lab02_two"):
        home = course.lab(
            lab, {"src/numbers_lab.py": f"ORIGIN = 'src of {lab}'", "tests/test_origin.py": TEST_ORIGIN}
        )
        course.write(home / "solutions" / "numbers_lab.py", f"ORIGIN = 'solution of {lab}'")
        course.write(f"mirror/ch01_numbers/{lab}/numbers_lab.py", f"ORIGIN = 'mirror of {lab}'")
    home = course.path / "labs" / "ch01_numbers" / "lab01_one"
    course.write(home / "mine" / "numbers_lab.py", "ORIGIN = 'mine'")
    both = ("--collect-only", "-q", "labs")

    def all_of(what):
        return {lab[:5]: f"{what} of {lab}" for lab in ("lab01_one", "lab02_two")}

    assert origins(course.run(*both, "--code=solutions")) == all_of("solution")
    assert origins(course.run(*both, "--code", "mirror")) == all_of("mirror")
    # Relative to where pytest is called, not to the root.
    assert origins(course.run("--collect-only", "-q", "--code", "mine", cwd=home)) == {"lab01": "mine"}
    assert origins(course.run("--collect-only", "-q", ".", "--code=../mine", cwd=home / "tests")) == {
        "lab01": "mine"
    }


@pytest.mark.parametrize("path", ["nowhere", "conftest.py"])
def test_a_code_folder_that_does_not_exist_is_a_usage_error(course, path):
    course.lab("lab01_one", {"src/numbers_lab.py": "", "tests/test_one.py": ""})
    run = course.run("labs", "--code", path)
    assert run.exit == pytest.ExitCode.USAGE_ERROR
    assert f"ERROR: --code: there is no folder '{path}' (allowed: src, solutions, or a folder)" in run.text
    assert "Traceback" not in run.text


def test_an_edit_of_equal_size_in_the_same_second_is_tested(course):
    home = course.lab(
        "lab01_one", {"src/numbers_lab.py": "ORIGIN = 1 + 2\n", "tests/test_origin.py": TEST_ORIGIN}
    )
    file = home / "src" / "numbers_lab.py"
    before = file.stat()
    assert origins(course.run("--collect-only", "-q", "labs")) == {"lab01": "3"}
    file.write_text("ORIGIN = 1 - 2\n")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert origins(course.run("--collect-only", "-q", "labs")) == {"lab01": "-1"}
    assert sorted(p.name for p in file.parent.iterdir()) == ["numbers_lab.py"]


# --- code that cannot be imported -------------------------------------------------------------

TEST_DOUBLE = "from numbers_lab import double\n\n\ndef test_double():\n    assert double(1) == 2\n"

BROKEN = {
    "lab01_syntax": {"src/numbers_lab.py": "def double(x):\n    return x +* 2\n"},
    "lab02_missing": {},
    "lab03_name": {
        "src/numbers_lab.py": "import json\n\ndef helper():\n    return json.undefined\n\nVALUE = helper()\n"
    },
    "lab04_zero": {"src/numbers_lab.py": "VALUE = 1 / 0\n"},
    "lab05_lacks": {"src/numbers_lab.py": "def triple(x): return 3 * x\n"},
    "lab06_lacks_attribute": {
        "src/numbers_lab.py": "",
        "tests/test_numbers.py": "import numbers_lab\nF = [numbers_lab.double]\ndef test_double(): assert F",
    },
    "lab07_replaces_itself": {
        "src/numbers_lab.py": """
            import sys


            class Everything:
                def __getattr__(self, name):
                    return lambda *args: 2


            sys.modules[__name__] = Everything()
            """
    },
    "lab08_helper": {"src/numbers_lab.py": "from helper import double\n"},
    "lab09_exit": {"src/numbers_lab.py": "def double(x): return 2 * x\n\n\nexit()\n"},
    "lab10_skip": {"src/numbers_lab.py": "import pytest\n\npytest.skip('later', allow_module_level=True)\n"},
    "lab11_not_written": {
        "src/numbers_lab.py": "def double(x):\n    raise NotImplementedError('twice a number')\n",
        "tests/test_numbers.py": "from numbers_lab import double\nTABLE = [double(1)]\ndef test_double(): assert TABLE",
    },
    "lab12_test_is_wrong": {
        "src/numbers_lab.py": "def double(x): return 2 * x\n",
        "tests/test_numbers.py": "from numbers_lab import double\nTABLE = nonsense\ndef test_double(): assert TABLE",
    },
    "lab13_swaps_other": {
        "src/numbers_lab.py": "import json, sys\nsys.modules['other_lab'] = json\ndef double(x): return 2 * x\n",
        "src/other_lab.py": "",
        "tests/test_numbers.py": "import numbers_lab, other_lab\ndef test_double(): assert other_lab",
    },
    "lab14_chain": {
        "src/numbers_lab.py": "import other_lab\ndef double(x): return other_lab.TWO * x\n",
        "src/other_lab.py": "TWO = (1 +\n",
    },
    "lab15_fine": {"src/numbers_lab.py": "def double(x): return 2 * x\n"},
}


@once("broken")
def run_broken(course):
    for folder, files in BROKEN.items():
        source = {"src/numbers_lab.py": ""} if folder == "lab02_missing" else {}
        home = course.lab(folder, {"tests/test_numbers.py": TEST_DOUBLE, **source, **files})
        if folder == "lab02_missing":
            (home / "src" / "numbers_lab.py").unlink()
        if folder == "lab08_helper":
            course.write(home / "src" / "helper.py", "def double(x): return 2 * x")
    return course.run("labs", "--continue-on-collection-errors", "--tb=short")


def shown(run, folder):
    """What the run says about the lab's test file; it must be the learner's, without our stack."""
    event = run.event(f"{folder}/tests/test_numbers.py")
    assert event["when"] == "collect"
    assert event["outcome"] == "failed"
    assert event["mine"]
    for stranger in (
        "importlib",
        "code_under_test.py",
        "plugin.py",
        "_pytest",
        "test_numbers.py",
        "Traceback",
    ):
        assert stranger not in event["shown"]
    assert event["shown"] in run.text
    return event["shown"]


def test_one_broken_lab_does_not_keep_others_from_running(broken):
    assert broken.counts == {"passed": 1, "errors": len(BROKEN) - 1}
    assert broken.exit == pytest.ExitCode.TESTS_FAILED
    assert broken.event("lab15_fine/tests/test_numbers.py::test_double")["outcome"] == "passed"


def test_a_syntax_error_shows_file_line_and_caret(broken):
    lines = shown(broken, "lab01_syntax").splitlines()
    assert lines[0].strip() == 'File "labs/ch01_numbers/lab01_syntax/src/numbers_lab.py", line 2'
    assert lines[1].strip() == "return x +* 2"
    assert lines[2].strip() == "^"
    assert lines[2].index("^") == lines[1].index("*")
    assert lines[3:] == [
        "SyntaxError: invalid syntax",
        "The tests of ch01/lab01 cannot start until this is mended.",
    ]


def test_a_missing_file_is_named_with_the_way_to_get_it_back(broken):
    assert shown(broken, "lab02_missing").startswith(
        "labs/ch01_numbers/lab02_missing/src/numbers_lab.py is missing. `topeka reset ch01/lab02` brings back"
    )


def test_an_error_at_import_shows_only_the_learners_frames(broken):
    assert shown(broken, "lab03_name").splitlines()[:5] == [
        '  File "labs/ch01_numbers/lab03_name/src/numbers_lab.py", line 6',
        "    VALUE = helper()",
        '  File "labs/ch01_numbers/lab03_name/src/numbers_lab.py", line 4',
        "    return json.undefined",
        "AttributeError: module 'json' has no attribute 'undefined'",
    ]
    assert "VALUE = 1 / 0\nZeroDivisionError: division by zero" in shown(broken, "lab04_zero")


@pytest.mark.parametrize("lab", ["lab05_lacks", "lab06_lacks_attribute"])
def test_a_missing_function_is_named(broken, lab):
    text = shown(broken, lab)
    assert text.startswith(f"labs/ch01_numbers/{lab}/src/numbers_lab.py: ")
    assert "'double'" in text
    assert f"`topeka reset ch01/{lab[:5]}` brings the skeleton back" in text


def test_a_module_that_replaces_itself_fails_although_every_test_would_pass(broken):
    text = shown(broken, "lab07_replaces_itself")
    assert "the tests did not run against labs/ch01_numbers/lab07_replaces_itself/src/numbers_lab.py" in text
    assert "is an object of class Everything" in text
    assert not [e for e in broken.events if "lab07" in e["test"] and e["when"] == "call"]


def test_a_module_that_replaces_another_of_the_lab_fails(broken):
    assert "`other_lab` is the module" in shown(broken, "lab13_swaps_other")


def test_an_unlisted_helper_is_refused_with_the_next_step(broken):
    text = shown(broken, "lab08_helper")
    assert "    from helper import double\n" in text
    assert "lab08_helper/src/helper.py is not one of the files of ch01/lab08 (numbers_lab.py)." in text


def test_leaving_at_import_is_an_error_and_ends_nothing_else(broken):
    assert "    exit()\nSystemExit" in shown(broken, "lab09_exit")
    assert "pytest.skip" in shown(broken, "lab10_skip")


def test_an_error_in_the_code_that_a_test_file_meets_at_its_import_is_the_codes(broken):
    assert "NotImplementedError: twice a number\n" in shown(broken, "lab11_not_written")


def test_a_syntax_error_in_a_file_imported_by_another_is_shown_where_it_is(broken):
    text = shown(broken, "lab14_chain")
    assert 'src/other_lab.py", line 1\n    TWO = (1 +\n          ^\n' in text
    assert "numbers_lab.py" not in text


def test_an_error_of_a_test_file_keeps_pytests_own_report(broken):
    event = broken.event("lab12_test_is_wrong/tests/test_numbers.py")
    assert event["outcome"] == "failed"
    assert not event["mine"]
    assert "NameError: name 'nonsense' is not defined" in event["shown"]
    assert "test_numbers.py:2" in event["shown"]


@pytest.mark.parametrize("arguments", [["labs"], ["labs/ch01_numbers/lab01_one/tests"]], ids=["labs", "lab"])
def test_a_conftest_that_imports_a_namesake_at_its_top_level_is_refused(course, arguments):
    course.lab(
        "lab01_one",
        {
            "src/same.py": "def where(): return 'src'",
            "tests/conftest.py": "from same import where",
            "tests/test_one.py": "def test_one(): pass",
        },
    )
    course.write("../tools/same.py", "def where(): return 'elsewhere'")
    run = course.run(*arguments)
    assert run.exit in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.INTERRUPTED)
    assert "conftest.py imports `same` at its top level" in run.text
    assert "import it inside the fixtures" in run.text


def test_a_broken_chapter_file_is_a_usage_error(course):
    course.lab("lab01_one", {"src/same.py": "", "tests/test_one.py": "def test_one(): pass"})
    course.write("labs/ch01_numbers/chapter.toml", "title = \n")
    run = course.run("labs")
    assert run.exit == pytest.ExitCode.USAGE_ERROR
    assert re.search(r"ERROR: .*chapter\.toml: .*line 1", run.text)
    assert "INTERNALERROR" not in run.text


# --- what a failure says ----------------------------------------------------------------------

CODE = """
    import json
    import sys

    import pytest
    import torch
    import torch.nn.functional as F


    class Odd(Exception):
        def __str__(self):
            raise RuntimeError("no words")


    class OddAssertion(AssertionError):
        def __str__(self):
            raise RuntimeError("no words")


    def not_written(x):
        # YOUR CODE HERE
        raise NotImplementedError("twice a number")


    def not_written_on_two_lines(x):
        raise NotImplementedError(
            "a long story"
        )


    def not_written_odd(x):
        raise type("Odd", (NotImplementedError,), {"__str__": Odd.__str__})()


    def torch_has_not_written(x):
        return torch.ones(2, device="meta").cpu()


    def library_has_not_written(x):
        return torch.nn.Module()(x)


    def raises_below(x):
        return json.loads("{")


    def recurses(x):
        return recurses(x)


    def asserts(x):
        assert x == 2


    def odd(x):
        raise Odd


    def odd_assertion(x):
        raise OddAssertion


    def wrong(x):
        return 2


    def swaps_modules(x):
        sys.modules[__name__] = json
        return 1


    def fine(x):
        return 1


    def skips(x):
        pytest.skip("not today")


    def xfails(x):
        pytest.xfail("expected")


    def exits_pytest(x):
        pytest.exit("enough", returncode=0)


    def exits(x):
        sys.exit(0)


    def raises_skip_test(x):
        import unittest

        raise unittest.SkipTest("not today")


    def imports_helper(x):
        import helper


    def imports_broken(x):
        import late_lab


    def loses_its_folder(x):
        import os
        import tempfile

        here = tempfile.mkdtemp()
        os.chdir(here)
        os.rmdir(here)
        return 2


    def swallows(x):
        try:
            return F.softmax(torch.ones(2), -1)
        except BaseException:
            return 1


    def swallows_and_errs(x):
        try:
            return F.softmax(torch.ones(2), -1)
        except BaseException:
            return 2


    def swallows_and_skips(x):
        try:
            return F.softmax(torch.ones(2), -1)
        except BaseException:
            pytest.skip("quietly")


    def uses_softmax(x):
        return F.softmax(torch.ones(2), -1)
    """

FAILING = [
    *("not_written", "not_written_on_two_lines", "not_written_odd", "torch_has_not_written"),
    *("library_has_not_written", "raises_below", "recurses", "asserts", "odd", "odd_assertion", "wrong"),
    *("swaps_modules", "skips", "xfails", "exits_pytest", "exits", "raises_skip_test"),
    *("imports_helper", "imports_broken"),
]

TESTS = f"""
    import math

    import pytest
    import torch
    import torch.nn.functional as F
    import numbers_lab

    FAILING = {FAILING!r}


    @pytest.mark.parametrize("name", FAILING)
    def test_of(name):
        result = getattr(numbers_lab, name)(1)
        assert result == 1, f"got {{result}}: is the operator right?"


    def test_after_the_modules_were_swapped():
        import numbers_lab as again

        assert again is numbers_lab
        assert again.fine(1) == 1


    def test_with_a_bare_assertion():
        assert not numbers_lab.fine(1)


    def test_that_no_error_is_raised():
        with pytest.raises(ValueError):
            numbers_lab.fine(1)


    def test_with_notes():
        error = AssertionError("it differs")
        error.add_note("Falsifying example: x=0")
        raise error


    def test_in_the_tests_own_code():
        return 1 / (numbers_lab.fine(1) - 1)


    def test_in_a_folder_that_is_gone(monkeypatch):
        monkeypatch.chdir(".")  # comes back after the test
        assert numbers_lab.loses_its_folder(1) == 1, "wrong number"


    # --- forbid


    @pytest.mark.parametrize("name", ["uses_softmax", "swallows", "swallows_and_errs", "swallows_and_skips"])
    def test_forbidden(forbid, name):
        forbid("softmax", why="write it out")
        assert getattr(numbers_lab, name)(1) == 1


    def test_forbidden_again_is_forgotten():
        numbers_lab.uses_softmax(1)
        assert not torch.overrides._get_current_function_mode_stack()


    def test_the_oracle_may_use_it(forbid):
        forbid("softmax", why="write it out")
        assert F.softmax(torch.zeros(2), -1).tolist() == [0.5, 0.5]
        assert numbers_lab.fine(1) == 1


    # --- milestones


    @pytest.mark.milestone
    @pytest.mark.parametrize(
        ("value", "target", "better"),
        [
            (3.0, 2.0, "higher"), (2.0, 2.0, "higher"), (1.0, 2.0, "higher"),
            (1.0, 2.0, "lower"), (2.0, 2.0, "lower"), (3.0, 2.0, "lower"),
            (math.nan, 2.0, "higher"), (math.nan, 2.0, "lower"), (1.0, math.nan, "lower"),
            (math.inf, 2.0, "higher"), (math.inf, 2.0, "lower"), (1.0, 2.0, "faster"),
        ],
    )
    def test_milestone(milestone, value, target, better):
        milestone("speed-up", torch.tensor(value), target, "x", better=better)


    def test_milestone_is_higher_by_default(milestone):
        milestone("speed-up", 3, 2, "x")


    # --- what cannot run here


    @pytest.fixture
    def expensive():
        raise RuntimeError("set up although the test cannot run here")


    @pytest.mark.gpu
    def test_gpu(expensive):
        raise RuntimeError


    @pytest.mark.multi_gpu(4)
    def test_multi_gpu(expensive):
        raise RuntimeError


    @pytest.mark.multi_gpu
    def test_multi_gpu_without_a_number():
        raise RuntimeError


    @pytest.mark.slow
    def test_slow(record_property):
        record_property("ran", True)


    @pytest.mark.slow
    @pytest.mark.gpu
    def test_slow_on_a_gpu():
        raise RuntimeError


    def test_a_library_is_missing():
        pytest.importorskip("no_such_library")


    def test_device(device, randn):
        assert device == "cpu"
        x = randn(2, 3, dtype=torch.float32, device=device)
        assert (x.shape, x.dtype, x.device.type) == ((2, 3), torch.float32, "cpu")


    @pytest.mark.usefixtures("one_thread")
    def test_one_thread():
        assert torch.get_num_threads() == 1
        torch.set_num_threads(3)  # undone afterwards


    def test_paired_timer(paired_timer):
        calls = []
        timing = paired_timer(lambda: calls.append("A"), lambda: calls.append("B"), pairs=2, warmup=1)
        assert "".join(calls) == "ABABBA"
        assert len(timing.slow) == len(timing.fast) == 2
    """


def write_failing(course):
    home = course.lab(
        "lab01_one",
        {
            "src/numbers_lab.py": CODE,
            "src/late_lab.py": "VALUE = 1 / 0\n",
            "tests/test_numbers.py": TESTS,
            "tests/test_optional.py": "import pytest\npytest.importorskip('no_such_library')\ndef test_x(): pass\n",
        },
    )
    course.write(home / "src" / "helper.py", "")


@once("failing")
def run_failing(course):
    write_failing(course)
    course.write(
        "labs/test_outside.py",
        "def test_forbid_is_for_labs(forbid): pass\ndef test_outside(rng): raise NotImplementedError('outside')\n",
    )
    return course.run("labs", "--tb=short")


def of(run, name):
    return run.event(f"test_numbers.py::test_of[{name}]")


def brief(run, name):
    """The brief message about a failure, which holds no frames but the learner's."""
    event = of(run, name) if "test_" not in name else run.event(name)
    assert event["outcome"] == "failed", event
    for stranger in (
        "_pytest",
        "pluggy",
        "plugin.py",
        "code_under_test.py",
        "forbid.py",
        "test_numbers.py",
        "site-packages",
    ):
        assert stranger not in event["brief"]
    return event["brief"]


def test_every_failing_test_fails_and_no_hook_does(failing):
    assert failing.exit == pytest.ExitCode.TESTS_FAILED
    assert "INTERNALERROR" not in failing.text
    for name in FAILING:
        assert of(failing, name)["outcome"] == "failed", name


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("not_written", "not written yet: twice a number"),
        ("not_written_on_two_lines", "not written yet: a long story"),
        ("not_written_odd", "not written yet: Odd, whose message raises RuntimeError"),
    ],
)
def test_the_skeletons_not_implemented_error_means_not_written(failing, name, words):
    assert of(failing, name)["not_written"] is True
    assert brief(failing, name) == words


def test_only_the_skeletons_not_implemented_error_means_not_written(failing):
    for name in FAILING:
        if not name.startswith("not_written"):
            assert of(failing, name)["not_written"] is False, name
    assert "NotImplementedError" in brief(failing, "torch_has_not_written")
    assert "NotImplementedError" in brief(failing, "library_has_not_written")
    assert failing.event("test_outside.py::test_outside")["not_written"] is None


def test_a_brief_message_shows_the_learners_frames_and_the_error(failing):
    lines = brief(failing, "raises_below").splitlines()
    assert re.fullmatch(r'  File "labs/ch01_numbers/lab01_one/src/numbers_lab.py", line \d+', lines[0])
    assert lines[1] == '    return json.loads("{")'
    assert lines[2].startswith("json.decoder.JSONDecodeError: ")
    assert len(lines) == 3


def test_a_brief_message_of_a_deep_recursion_is_short(failing):
    text = brief(failing, "recurses")
    assert "more calls ..." in text
    assert len(text.splitlines()) < 25
    assert "RecursionError" in text.splitlines()[-1]


def test_a_brief_message_of_an_assertion_is_its_message(failing):
    assert brief(failing, "wrong").startswith("got 2: is the operator right?")
    assert brief(failing, "::test_with_a_bare_assertion").startswith("assert not 1")
    assert brief(failing, "::test_that_no_error_is_raised").startswith("DID NOT RAISE")
    assert brief(failing, "::test_with_notes") == "it differs\nFalsifying example: x=0"


def test_an_assertion_in_the_learners_code_shows_its_line(failing):
    assert "    assert x == 2\n" in brief(failing, "asserts")


def test_an_error_in_the_tests_own_code_shows_the_error_alone(failing):
    assert brief(failing, "::test_in_the_tests_own_code") == "ZeroDivisionError: division by zero"


def test_an_exception_without_words_hides_nothing(failing):
    assert "    raise Odd\n" in brief(failing, "odd")
    assert "raise OddAssertion" in brief(failing, "odd_assertion")


def test_a_folder_that_is_gone_hides_nothing(failing):
    assert brief(failing, "::test_in_a_folder_that_is_gone").startswith("wrong number")


def test_modules_swapped_at_call_time_fail_that_test_and_no_other(failing):
    assert brief(failing, "swaps_modules").startswith(
        "the tests did not run against labs/ch01_numbers/lab01_one/src/numbers_lab.py: `numbers_lab` is the module"
    )
    assert failing.event("::test_after_the_modules_were_swapped")["outcome"] == "passed"


@pytest.mark.parametrize("name", ["skips", "xfails", "exits_pytest", "raises_skip_test"])
def test_code_under_test_cannot_skip_or_end_its_tests(failing, name):
    assert brief(failing, name).startswith("the code under test ended the test with ")


def test_sys_exit_is_a_failure(failing):
    assert "SystemExit: 0" in brief(failing, "exits")


def test_an_import_at_call_time_fails_with_the_same_sentences(failing):
    assert "src/helper.py is not one of the files of ch01/lab01" in brief(failing, "imports_helper")
    text = brief(failing, "imports_broken")
    assert 'src/late_lab.py", line 1\n    VALUE = 1 / 0\nZeroDivisionError: division by zero' in text
    assert of(failing, "imports_broken")["shown"] == text


# --- forbid, milestones, marks -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["uses_softmax", "swallows", "swallows_and_errs", "swallows_and_skips"])
def test_a_forbidden_call_is_the_failure_even_if_the_code_swallows_it(failing, name):
    assert brief(failing, f"::test_forbidden[{name}]") == "softmax is forbidden in this lab: write it out"


def test_a_ban_ends_with_its_test_and_spares_the_oracle(failing):
    assert failing.event("::test_forbidden_again_is_forgotten")["outcome"] == "passed"
    assert failing.event("::test_the_oracle_may_use_it")["outcome"] == "passed"


def test_forbid_outside_every_lab_says_why_it_cannot_work(failing):
    event = failing.event("test_outside.py::test_forbid_is_for_labs")
    assert event["outcome"] == "failed"
    assert "forbid is for tests of a lab: no chapter.toml lists this folder" in event["shown"]


def milestones(run, test):
    return [
        value for name, value in run.event(f"::test_milestone{test}")["properties"] if name == "milestone"
    ]


@pytest.mark.parametrize(
    ("test", "reached"),
    [
        ("[3.0-2.0-higher]", True),
        ("[2.0-2.0-higher]", True),
        ("[1.0-2.0-higher]", False),
        ("[1.0-2.0-lower]", True),
        ("[2.0-2.0-lower]", True),
        ("[3.0-2.0-lower]", False),
        ("[nan-2.0-higher]", False),
        ("[nan-2.0-lower]", False),
        ("[1.0-nan-lower]", False),
        ("[inf-2.0-higher]", True),
        ("[inf-2.0-lower]", False),
        ("_is_higher_by_default", True),
    ],
)
def test_a_milestone_is_recorded_and_asserted(failing, test, reached):
    event = failing.event(f"::test_milestone{test}")
    (value,) = milestones(failing, test)
    assert event["outcome"] == ("passed" if reached else "failed")
    assert (value["name"], value["unit"]) == ("speed-up", "x")
    if "nan" not in test:
        assert (value["better"] == "higher") == ("higher" in test)
        assert value["target"] == 2.0
    if not reached:
        bound = "at least" if value["better"] == "higher" else "at most"
        assert re.match(
            rf"milestone: speed-up is \S+ x, promised is {bound} \S+ x",
            brief(failing, f"::test_milestone{test}"),
        )


def test_a_milestone_of_no_direction_is_an_error_and_not_recorded(failing):
    assert milestones(failing, "[1.0-2.0-faster]") == []
    assert 'better must be "higher" or "lower", not \'faster\'' in brief(
        failing, "::test_milestone[1.0-2.0-faster]"
    )


@pytest.mark.parametrize(
    ("test", "reason"),
    [
        ("test_numbers.py::test_gpu", "needs a CUDA GPU, this machine has none"),
        ("test_numbers.py::test_multi_gpu", "needs 4 CUDA GPUs, this machine has none"),
        ("test_numbers.py::test_a_library_is_missing", "could not import 'no_such_library'"),
        ("test_optional.py", "could not import 'no_such_library'"),
    ],
)
def test_what_cannot_run_here_is_reported_with_its_reason_and_not_passed(failing, test, reason):
    assert failing.event(test)["outcome"] == "skipped"
    assert f"{test}: {reason}" in failing.text
    section = failing.text[failing.text.index("- not verified here -") :]
    assert f"{test}: {reason}" in section
    assert "4 not verified here; they count neither as passed nor as failed." in section


def test_a_slow_test_is_skipped_as_slow_and_not_as_impossible(failing):
    for test in ("test_slow", "test_slow_on_a_gpu"):
        assert failing.event(f"::{test}")["outcome"] == "skipped"
        assert "slow: runs with --slow" in failing.event(f"::{test}")["shown"]
        assert f"::{test}:" not in failing.text


def test_multi_gpu_wants_a_number(failing):
    event = failing.event("::test_multi_gpu_without_a_number")
    assert event["outcome"] == "failed"
    assert "@pytest.mark.multi_gpu(2)" in event["shown"]


def test_slow_runs_what_is_slow_and_still_not_what_is_impossible(course):
    write_failing(course)
    run = course.run("labs", "--slow", "-k", "test_slow")
    assert run.event("::test_slow")["properties"] == [["ran", True]]
    assert run.event("::test_slow_on_a_gpu")["outcome"] == "skipped"
    assert "test_slow_on_a_gpu: needs a CUDA GPU, this machine has none" in run.text
    assert "2 not verified here" in run.text  # the other is the test file whose library is missing


def test_device_and_timer_fixtures_work(failing):
    assert failing.event("::test_device")["outcome"] == "passed"
    assert failing.event("::test_paired_timer")["outcome"] == "passed"
    assert failing.event("::test_one_thread")["outcome"] == "passed"
