"""`--trust strict`: what crosses between the two processes, and what the code under test can no longer reach."""

import os
import textwrap
from pathlib import Path

import pytest
from grader.catalog import Catalog, load
from grader.cli import app
from grader.grading import grade_lab
from grader.report import LabReport, Outcome, Status, Trust
from grader.runner import apart, landlock
from grader.sandbox.local import LocalSandbox
from shared.plugin import NOT_VERIFIED_HERE
from typer.testing import CliRunner

from .conftest import write_course

SOLUTION = """
import numpy as np
import torch
from torch import nn


def double(x):
    return x * 2


def wrap(value):
    return [value, (value,)]


def raises(kind):
    raise {"value": ValueError, "key": KeyError}[kind]("because of " + kind)


def in_place(values):
    values[0] = values[0] * 10
    return values


def apply(f, x):
    return f(x) + 1


def shapes(x):
    return {"stride": list(x.stride()), "contiguous": x.is_contiguous(), "dtype": x.dtype, "grad": x.requires_grad}


class Scale(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.ones(size))
        self.register_buffer("calls", torch.zeros(()))
        self.inner = nn.Linear(size, size)
        nn.init.normal_(self.inner.weight)

    def forward(self, x):
        self.calls += 1
        return self.inner(x * self.weight)


class Counter:
    def __init__(self, start):
        self.value = start

    def add(self, n):
        self.value += n
        return self
"""

TESTS = """
import math

import numpy as np
import pytest
import torch
from answer import Counter, Scale, apply, double, in_place, raises, shapes, wrap
from shared.compare import assert_close
from torch import nn


@pytest.mark.parametrize(
    "value", [0.1, -0.0, math.inf, 7, True, 2**70, "text\\n", (1, 2.5), [[1.0], [2.0]], 1j, None, {"a": 1}, {3}, b"x"]
)
def test_plain_values_cross_unchanged(value):
    first, (second,) = wrap(value)
    assert type(first) is type(second) is type(value)
    assert first == second == value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.complex64])
def test_tensors_cross_with_their_dtype(dtype):
    x = torch.arange(6).reshape(2, 3).to(dtype)
    result = double(x)
    assert result.dtype == dtype
    assert torch.equal(result, x + x)


def test_nan_and_infinity_cross():
    x = torch.tensor([math.nan, math.inf, -math.inf, -0.0])
    result = double(x)
    assert torch.equal(result.isnan(), x.isnan())
    assert torch.equal(result[1:], x[1:])
    assert math.copysign(1, result[3]) == -1


def test_arrays_cross():
    x = np.arange(12.0).reshape(3, 4)[:, ::2]
    result = double(x)
    assert type(result) is np.ndarray
    assert_close(result, 2 * x, atol=0)


def test_strides_and_expanded_axes_cross():
    assert shapes(torch.zeros(3, 4).T)["stride"] == [1, 4]
    assert shapes(torch.zeros(3, 1).expand(3, 5))["stride"] == [1, 0]
    found = shapes(torch.zeros(2, dtype=torch.float16, requires_grad=True))
    assert found["dtype"] is torch.float16
    assert found["grad"] is True


def test_changes_in_place_come_back_and_identity_holds():
    x = torch.tensor([1.0, 2.0])
    assert in_place(x) is x
    assert x.tolist() == [10.0, 2.0]
    a = np.array([1.0, 2.0])
    assert in_place(a) is a
    assert a.tolist() == [10.0, 2.0]
    values = [1.0, 2.0]
    assert in_place(values) is values
    assert values == [10.0, 2.0]


def test_exceptions_cross_by_class_and_words():
    with pytest.raises(ValueError, match="because of value"):
        raises("value")
    with pytest.raises(KeyError, match="because of key"):
        raises("key")


def test_gradients_cross(randn):
    x = randn(3, 4).requires_grad_()
    y = double(x)
    assert y.requires_grad
    (y**2).sum().backward()
    assert_close(x.grad, 8 * x.detach(), atol=1e-12)
    assert torch.autograd.gradcheck(double, (randn(2, 2).requires_grad_(),))


def test_no_gradient_without_grad_mode(randn):
    with torch.no_grad():
        assert not double(randn(2).requires_grad_()).requires_grad


def test_functions_of_the_tests_are_called_back_with_gradients(randn):
    x = randn(3).requires_grad_()
    y = apply(lambda v: v * v, x)
    assert_close(y.detach(), (x * x + 1).detach(), atol=1e-12)
    y.sum().backward()
    assert_close(x.grad, 2 * x.detach(), atol=1e-12)


def test_modules_are_mirrored(randn):
    torch.manual_seed(3)
    scale = Scale(4)
    assert isinstance(scale, nn.Module)
    assert scale.size == 4
    assert sorted(scale.state_dict()) == ["calls", "inner.bias", "inner.weight", "weight"]
    x = randn(2, 4, dtype=torch.float32)
    with torch.no_grad():
        scale.weight.mul_(3)
    expected = nn.functional.linear(x * 3, scale.inner.weight, scale.inner.bias)
    y = scale(x)
    assert_close(y.detach(), expected.detach(), atol=1e-5)
    assert scale.calls.item() == 1
    y.sum().backward()
    expected = (torch.ones(2, 4) @ scale.inner.weight.detach() * x).sum(0)
    assert_close(scale.weight.grad, expected, atol=1e-5)
    torch.manual_seed(3)
    assert torch.equal(Scale(4).inner.weight, scale.inner.weight), "the random numbers are the tests' own"


def test_objects_keep_their_state():
    counter = Counter(3)
    assert counter.add(4) is counter
    assert counter.value == 7


def test_forbid_reaches_over(forbid):
    forbid(torch.nn.functional.gelu)
    assert double(2) == 4
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """A course whose first lab supports strict trust and has `SOLUTION` and `TESTS`."""
    return strict_course(tmp_path_factory.mktemp("strict"), SOLUTION, TESTS)


def strict_course(root: Path, solution: str, tests: str) -> Catalog:
    write_course(root)
    chapter = root / "labs" / "ch01_numbers" / "chapter.toml"
    head, first, second = chapter.read_text().split("[[lab]]")
    first = first.replace("numbers_lab.py", "answer.py").rstrip() + "\nstrict = true\n\n"
    chapter.write_text("[[lab]]".join([head, first, second]))
    folder = chapter.parent / "lab01_double"
    for part in ("src", "solutions"):
        (folder / part / "numbers_lab.py").unlink()
        (folder / part / "answer.py").write_text(solution)
    (folder / "tests" / "test_numbers.py").unlink()
    (folder / "tests" / "test_answer.py").write_text(tests)
    return load(root)


def grade(catalog: Catalog, sandbox: LocalSandbox, code: str, **options: object) -> LabReport:
    return grade_lab(
        catalog, catalog.labs[0], sandbox, {"answer.py": code.encode()}, trust=Trust.STRICT, **options
    )


def test_what_tests_need_crosses(lab, sandbox):
    report = grade(lab, sandbox, SOLUTION)
    wrong = {t.name: t.message for t in report.tests if t.outcome is not Outcome.PASSED}
    assert not wrong
    assert report.status is Status.VERIFIED, report.reason
    assert report.trust is Trust.STRICT
    assert report.tampering == ()


def test_the_report_says_what_separates_less_than_it_could(lab, sandbox):
    report = grade(lab, sandbox, SOLUTION)
    assert report.trust_gaps == tuple(apart.gaps())


def test_wrong_code_and_unwritten_code_are_told_apart(lab, sandbox):
    report = grade(lab, sandbox, SOLUTION.replace("return x * 2", "return x * 3"))
    assert report.status is Status.FAILED
    report = grade(lab, sandbox, SOLUTION.replace("return x * 2", "raise NotImplementedError('twice')"))
    messages = {t.name.split("::")[-1]: (t.outcome, t.message) for t in report.tests}
    assert messages["test_arrays_cross"] == (Outcome.NOT_WRITTEN, "not written yet: twice")


def test_an_error_shows_the_learners_own_lines(lab, sandbox):
    report = grade(lab, sandbox, SOLUTION.replace("return x * 2", "return x * y"))
    message = next(t.message for t in report.tests if "arrays" in t.name)
    assert "labs/ch01_numbers/lab01_double/src/answer.py" in message
    assert "return x * y" in message
    assert "NameError" in message
    assert "shared/apart" not in message


def test_a_file_that_cannot_be_imported_says_why(lab, sandbox):
    report = grade(lab, sandbox, "def double(x:\n")
    assert report.status is Status.FAILED
    assert "answer.py" in report.reason
    assert "^" in report.reason


def test_forbidden_calls_are_seen_in_the_other_process(lab, sandbox):
    report = grade(
        lab,
        sandbox,
        SOLUTION.replace("return x * 2", "torch.nn.functional.gelu(torch.ones(1))\n    return x * 2"),
    )
    outcomes = {t.name.split("::")[-1]: t for t in report.tests}
    assert outcomes["test_forbid_reaches_over"].outcome is Outcome.FAILED
    assert "gelu is forbidden in this lab" in outcomes["test_forbid_reaches_over"].message


SPY = """
import os, sys


def attempts():
    got = []

    def attempt(name, function):
        try:
            result = function()
        except BaseException:
            return
        got.append(f"{name}: {result!r:.60}")

    parent = os.getppid()
    for pid in (parent, *range(max(parent - 5, 1), parent + 40)):
        if pid == os.getpid():
            continue
        attempt(f"environment of {pid}", lambda: open(f"/proc/{pid}/environ", "rb").read())
        attempt(f"memory map of {pid}", lambda: open(f"/proc/{pid}/maps").read())
        attempt(f"memory of {pid}", lambda: open(f"/proc/{pid}/mem", "rb").read(1))
        attempt(f"descriptors of {pid}", lambda: os.listdir(f"/proc/{pid}/fd"))
        attempt(f"signal to {pid}", lambda: os.kill(pid, 0))
    root = os.path.abspath("..")
    attempt("other work folders", lambda: os.listdir(root))
    attempt("the checkout", lambda: os.listdir(CHECKOUT))
    attempt("a file of the checkout", lambda: open(CHECKOUT + "/pyproject.toml").read())
    attempt("home", lambda: os.listdir("/root"))
    attempt("passwords", lambda: open("/etc/shadow").read())
    attempt("writing elsewhere", lambda: open("/tmp/topeka-was-here", "w"))
    attempt("tests", lambda: os.listdir("labs/ch01_numbers/lab01_double/tests"))
    attempt("descriptors", lambda: [fd for fd in range(4, 256) if _is_open(fd)] or 1 / 0)
    attempt("secrets in the environment", lambda: [n for n in os.environ if "SECRET" in n] or 1 / 0)
    attempt("test modules", lambda: [n for n in sys.modules if "test_answer" in n] or 1 / 0)
    return got


def _is_open(fd):
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def double(x):
    return attempts()
"""


def test_nothing_of_the_grading_is_in_reach(tmp_path, monkeypatch):
    if not landlock.version():
        pytest.skip(f"{NOT_VERIFIED_HERE}: this kernel has no Landlock")
    tests = "from answer import double\n\n\ndef test_reach():\n    assert double(1) == []\n"
    catalog = strict_course(tmp_path, "def double(x):\n    return []\n", tests)
    monkeypatch.setenv("A_SECRET", "token")
    with LocalSandbox(threads=1) as sandbox:
        report = grade(catalog, sandbox, f"CHECKOUT = {str(tmp_path)!r}\n{SPY}")
    (test,) = report.tests
    assert test.outcome is Outcome.PASSED, test.message


@pytest.mark.parametrize(
    "body",
    [
        "os.write(3, b'\\x00' * 64)",
        "os.write(3, (2).to_bytes(4, 'big') + (0).to_bytes(8, 'big') + b'{}')",
        "os.write(3, (9).to_bytes(4, 'big') + (0).to_bytes(8, 'big') + b'{\"ok\":1}')",
        "os.write(3, b'\\xff' * 12)",
        "os.close(3)",
        "os._exit(0)",
    ],
)
def test_breaking_the_conversation_verifies_nothing(tmp_path, sandbox, body):
    tests = "from answer import double\n\n\ndef test_twice():\n    assert double(2) == 4\n    assert double(3) == 6\n"
    catalog = strict_course(tmp_path, "def double(x):\n    return x * 2\n", tests)
    report = grade(catalog, sandbox, f"import os\n\n\ndef double(x):\n    {body}\n    return x * 3\n")
    assert report.status in (Status.FAILED, Status.ERROR)


def test_an_object_cannot_pretend_to_be_a_number(tmp_path, sandbox):
    """Its class has the name of one that the tests know, so it crosses; but it has no say in what it equals."""
    tests = (
        "from answer import Counter, double\n\n\ndef test_twice():\n"
        "    assert double(2) == 4\n\n\ndef test_near():\n    assert abs(double(2) - 4) < 1e-9\n"
    )
    right = "class Counter:\n    pass\n\n\ndef double(x):\n    return x * 2\n"
    catalog = strict_course(tmp_path, right, tests)
    report = grade(catalog, sandbox, textwrap.dedent("""
        class Counter:
            def __eq__(self, other): return True
            def __sub__(self, other): return 0.0
            def __abs__(self): return 0.0
            def __lt__(self, other): return True
            def __float__(self): return 4.0
            def __bool__(self): return True


        def double(x):
            return Counter()
    """))  # fmt: skip
    assert [t.outcome for t in report.tests] == [Outcome.FAILED] * 2


def test_a_lab_that_does_not_support_it_says_so(course, sandbox, monkeypatch):
    report = grade_lab(course, course.labs[0], sandbox, {}, trust=Trust.STRICT)
    assert report.status is Status.NOT_VERIFIED_HERE
    assert "does not support --trust strict" in report.reason
    monkeypatch.setenv("TOPEKA_ROOT", str(course.root))
    result = CliRunner().invoke(app, ["grade", "ch01/lab01", "--trust", "strict"])
    assert result.exit_code != 0
    assert "does not support --trust strict" in str(result.exception)


def test_the_environment_variable_asks_for_it(lab, monkeypatch):
    monkeypatch.setenv("TOPEKA_ROOT", str(lab.root))
    monkeypatch.setenv("TOPEKA_TRUST", "strict")
    result = CliRunner().invoke(app, ["grade", "ch01/lab01", "--code", "solutions", "--json", "-"])
    assert result.exit_code == 0, result.output
    assert '"trust": "strict"' in result.output


def test_why_the_user_stays_the_same_is_said(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert apart.why_same_user() == "the runner is not root"
