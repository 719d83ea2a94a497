"""The pytest plugin of the labs: `--code`, provenance, marks, fixtures, brief messages.

It is ordinary pytest. Tests of a lab say `from attention import softmax`; which
`attention.py` that is, `--code` decides (`shared.code_under_test`).
"""

import dis
import random
import sys
import traceback
import unittest
import zlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytest

from shared.code_under_test import CannotImport, CodeUnderTest, explain, locate_code, relative
from shared.course import LabFolder, find_lab
from shared.timing import PairedTiming, time_pairs

if TYPE_CHECKING:
    from shared.apart.client import ForbiddenElsewhere
    from shared.forbid import Forbidden  # imports torch, which not every run needs

NOT_VERIFIED_HERE = "not verified here"

_LABS = pytest.StashKey[dict[Path, CodeUnderTest | None]]()
_FORBIDDEN = pytest.StashKey["Forbidden | ForbiddenElsewhere"]()

# What a test says to pytest, and code under test must not say in its place.
_VERDICTS = (pytest.skip.Exception, pytest.xfail.Exception, pytest.exit.Exception, unittest.SkipTest)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("topeka", "Topeka labs")
    group.addoption(
        "--code",
        default="src",
        metavar="src|solutions|PATH",
        help="code under test: the learner's src/ (default), the solutions, or a folder",
    )
    group.addoption("--slow", action="store_true", help="also run tests marked slow (full training runs)")
    group.addoption(
        "--seed",
        type=int,
        default=0,
        help="shift every test's random inputs (default 0); results must not depend on it",
    )

    group.addoption(
        "--code-socket",
        type=int,
        default=None,
        help="descriptor of a socket to the process that runs the code under test (the grader sets it)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_LABS] = {}
    for line in (
        "gpu: needs a CUDA GPU; not verified on machines without one",
        "multi_gpu(n): needs n CUDA GPUs; not verified on machines with fewer",
        "slow: takes minutes; runs with --slow",
        "milestone: measures the chapter's claim",
    ):
        config.addinivalue_line("markers", line)
    code = config.getoption("--code")
    if (
        code not in ("src", "solutions")
        and not (config.invocation_params.dir / Path(code).expanduser()).is_dir()
    ):
        raise pytest.UsageError(f"--code: there is no folder {code!r} (allowed: src, solutions, or a folder)")


# --- which code is under test ------------------------------------------------------------


def _code_of(node: pytest.Item | pytest.Collector) -> CodeUnderTest | None:
    known = node.config.stash[_LABS]
    folder = node.path if node.path.is_dir() else node.path.parent
    if folder not in known:
        lab = _lab_of(folder)
        if lab is None:
            known[folder] = None
        else:
            # One CodeUnderTest per lab, however many test folders it has.
            same = [c for c in known.values() if c is not None and c.lab.path == lab.path]
            where = locate_code(lab, node.config.getoption("--code"), node.config.invocation_params.dir)
            known[folder] = same[0] if same else _code(lab, where, node.config.getoption("--code-socket"))
    return known[folder]


def _code(lab: LabFolder, where: Path, descriptor: int | None) -> CodeUnderTest:
    if descriptor is None:
        return CodeUnderTest(lab, where)
    from shared.apart.client import CodeElsewhere

    return CodeElsewhere(lab, descriptor)


def _lab_of(folder: Path) -> LabFolder | None:
    try:
        return find_lab(folder)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_plugin_registered(plugin: object) -> None:
    """Refuse a lab's conftest.py that imported a namesake of the code under test.

    pytest may read it before it knows what to collect, so at its top level the lab's names
    do not mean the code under test yet.
    """
    if not isinstance(plugin, ModuleType) or Path(plugin.__file__ or "").name != "conftest.py":
        return
    lab = _lab_of(Path(plugin.__file__ or "").parent)
    if lab is None:
        return
    for value in vars(plugin).values():
        origin = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
        if origin in lab.module_names:
            raise pytest.UsageError(
                f"{relative(Path(plugin.__file__ or ''))} imports `{origin}` at its top level, where that is "
                f"not the code under test of {lab.id} yet: import it inside the fixtures"
            )


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    code = _code_of(collector) if isinstance(collector, pytest.File | pytest.Class) else None
    if code is None:
        return (yield)
    with code.active():
        report = yield
        strangers = code.strangers()
    call = report.__dict__.get("call")
    message = None
    if call is not None and call.excinfo is not None:
        message = _why_not_started(call.excinfo.value, code)
    elif strangers:
        message = "\n".join(strangers)
    if message is not None:
        report.outcome = "failed"
        report.longrepr = message
        report.result = []
        report.code_under_test_failed = True
    return report


def _why_not_started(error: BaseException | None, code: CodeUnderTest) -> str | None:
    """Return what kept a test file from being imported if that is the code under test, else None."""
    while error is not None:
        if isinstance(error, CannotImport):
            return f"{error}\nThe tests of {code.lab.id} cannot start until this is mended."
        if module := _lacking_module(error, code):
            return (
                f"{relative(code.folder / code.lab.module_files[module])}: {error}\n"
                f"The tests of {code.lab.id} need every name of the skeleton. `topeka reset {code.lab.id}` "
                "brings the skeleton back (and keeps a copy of your file)."
            )
        if code.took_part_in(error):
            return (
                f"{explain(error, code.folder)}\n"
                f"The tests of {code.lab.id} cannot start until this is mended."
            )
        error = error.__cause__
    return None


def _lacking_module(error: BaseException, code: CodeUnderTest) -> str | None:
    """Return the name of the lab's module that lacks a name a test wants (`from m import x`, `m.x`)."""
    if isinstance(error, ImportError) and error.name in code.lab.module_names:
        return error.name
    if isinstance(error, AttributeError):
        return next((name for name, module in code.modules.items() if error.obj is module), None)
    return None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    code = _code_of(item)
    if code is None:
        return (yield)
    with code.active():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    __tracebackhide__ = True
    code = _code_of(item)
    try:
        result = yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        _fail_if_forbidden(item)  # the reason, where the error is what came of it
        if code is not None and isinstance(error, _VERDICTS) and code.took_part_in(error):
            pytest.fail(f"the code under test ended the test with {error!r}", pytrace=False)
        raise
    _fail_if_forbidden(item)
    if code is not None and (strangers := code.strangers()):
        pytest.fail("\n".join(strangers), pytrace=False)
    return result


def _fail_if_forbidden(item: pytest.Item) -> None:
    __tracebackhide__ = True
    forbidden = item.stash.get(_FORBIDDEN, None)
    if forbidden and forbidden.violations:
        pytest.fail(forbidden.violations[0], pytrace=False)


# --- what can run here -------------------------------------------------------------------


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("slow") and not item.config.getoption("--slow"):
        pytest.skip("slow: runs with --slow")
    wanted = 1 if item.get_closest_marker("gpu") else 0
    if mark := item.get_closest_marker("multi_gpu"):
        if len(mark.args) != 1 or mark.kwargs:
            pytest.fail("multi_gpu needs the number of GPUs: @pytest.mark.multi_gpu(2)", pytrace=False)
        wanted = max(wanted, mark.args[0])
    if wanted:
        import torch

        found = torch.cuda.device_count()
        if found < wanted:
            need = "a CUDA GPU" if wanted == 1 else f"{wanted} CUDA GPUs"
            pytest.skip(f"{NOT_VERIFIED_HERE}: needs {need}, this machine has {found or 'none'}")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if not _is_slow_skip(r)]
    if skipped:
        terminalreporter.section("not verified here", sep="-")
        for report in skipped:
            terminalreporter.line(f"{report.nodeid}: {skip_reason(report)}")
        terminalreporter.line(
            f"{len(skipped)} not verified here; they count neither as passed nor as failed."
        )


def skip_reason(report: Any) -> str:
    """Return why a skipped test did not run."""
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return str(reason).removeprefix("Skipped: ").removeprefix(f"{NOT_VERIFIED_HERE}: ")


def _is_slow_skip(report: Any) -> bool:
    return skip_reason(report).startswith("slow:")


# --- what a failure says -----------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    report = yield
    error = call.excinfo.value if call.excinfo else None
    code = _code_of(item)
    if error is not None and code is not None and report.failed:
        report.not_written = is_not_written(error, code)
        report.brief = _brief(error, code)
        if isinstance(error, CannotImport):  # by an import inside a test or a fixture
            report.longrepr = report.brief
    return report


def is_not_written(error: BaseException, code: CodeUnderTest) -> bool:
    """Whether `error` is the skeleton's `raise NotImplementedError`.

    An error raised below by a function written in C, such as one of torch's, ends in the
    same frame; but there the instruction is a call.
    """
    if getattr(error, "not_written", False) is True and code.elsewhere:
        return True
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if not isinstance(error, NotImplementedError) or last is None or not code.owns_frame(last.tb_frame):
        return False
    return last.tb_frame.f_code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _brief(error: BaseException, code: CodeUnderTest) -> str:
    """The failure in a few lines, without the frames of pytest, the tests or the libraries."""
    if is_not_written(error, code):
        return f"not written yet: {_words(error)}"
    if isinstance(error, CannotImport):
        return _words(error)
    if code.elsewhere and isinstance(explained := getattr(error, "explained", None), str):
        return explained
    if isinstance(error, pytest.fail.Exception):
        return _words(error) or "the test failed"
    if isinstance(error, AssertionError) and not _ends_in(error, code):
        # Hypothesis keeps the falsifying example in the notes.
        return "\n".join([_words(error) or "the assertion failed", *getattr(error, "__notes__", ())])
    return explain(error, code.folder)


def _ends_in(error: BaseException, code: CodeUnderTest) -> bool:
    frames = list(traceback.walk_tb(error.__traceback__))
    return bool(frames) and code.owns_frame(frames[-1][0])


def _words(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as inner:  # an exception class of the code under test with a broken __str__
        return f"{type(error).__name__}, whose message raises {type(inner).__name__}"


# --- fixtures ----------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    """Seed Python, NumPy and torch from the test's own name, so that order does not matter."""
    seed = _seed_of(request)
    random.seed(seed)
    np.random.seed(seed)
    # Tests of a lab may import torch when they run; other tests need not wait for it.
    if "torch" in sys.modules or _code_of(request.node) is not None:
        import torch

        torch.manual_seed(seed)


def _seed_of(request: pytest.FixtureRequest) -> int:
    # The name below the lab's folder: the same from the root, from inside the lab and in a sandbox.
    file, separator, test = request.node.nodeid.partition("::")
    name = file.rsplit("/", 1)[-1] + separator + test
    return (zlib.crc32(name.encode()) + int(request.config.getoption("--seed"))) % 2**32


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """A NumPy generator seeded from the test's name."""
    return np.random.default_rng(_seed_of(request))


@pytest.fixture
def randn(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """`randn(*shape, dtype=float64, device="cpu")`: a normal tensor, seeded from the test's name."""
    import torch

    generator = torch.Generator().manual_seed(_seed_of(request))

    def draw(*shape: int, dtype: Any = torch.float64, device: str = "cpu") -> Any:
        # Drawn in float64 on the CPU and then converted, so all dtypes and devices see the same numbers.
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype=dtype, device=device)

    return draw


@pytest.fixture
def device() -> str:
    """`"cuda"` where there is a GPU, else `"cpu"`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def one_thread() -> "Iterator[None]":
    """Torch computes with one thread during the test.

    For small tensors threads only cost time, and they make the last bits of a sum depend on the machine.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def forbid(request: pytest.FixtureRequest) -> "Iterator[Forbidden | ForbiddenElsewhere]":
    """`forbid(*targets, why="")`: the test fails if the code under test calls one of them."""
    from shared.forbid import Forbidden

    code = _code_of(request.node)
    if code is None:
        raise pytest.UsageError("forbid is for tests of a lab: no chapter.toml lists this folder")
    if code.elsewhere:
        from shared.apart.client import CodeElsewhere, ForbiddenElsewhere

        assert isinstance(code, CodeElsewhere)
        remote = request.node.stash[_FORBIDDEN] = ForbiddenElsewhere(code, getattr(request, "module", None))
        yield remote
        remote.close()
        return
    forbidden = request.node.stash[_FORBIDDEN] = Forbidden(code, getattr(request, "module", None))
    yield forbidden
    forbidden.close()


@dataclass(frozen=True)
class Milestone:
    """A measured claim, as the report shows it.

    Attributes:
        name: what was measured.
        value: the measurement.
        target: what the course promises.
        unit: the unit of both.
        better: whether `value` must be at most (`lower`) or at least (`higher`) `target`.
    """

    name: str
    value: float
    target: float
    unit: str
    better: Literal["higher", "lower"] = "higher"

    @property
    def reached(self) -> bool:
        """Whether the target is reached; NaN reaches nothing."""
        return self.value >= self.target if self.better == "higher" else self.value <= self.target


@pytest.fixture
def milestone(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`milestone(name, value, target, unit, better="higher")`: record a measurement and assert it."""

    def record(
        name: str, value: float, target: float, unit: str, better: Literal["higher", "lower"] = "higher"
    ) -> None:
        __tracebackhide__ = True
        if better not in ("higher", "lower"):
            raise ValueError(f'better must be "higher" or "lower", not {better!r}')
        result = Milestone(name, float(value), float(target), unit, better)
        request.node.user_properties.append(("milestone", asdict(result)))
        bound = "at least" if better == "higher" else "at most"
        assert result.reached, (
            f"milestone: {name} is {value:.4g} {unit}, promised is {bound} {target:g} {unit}"
        )

    return record


@pytest.fixture
def paired_timer() -> Callable[..., PairedTiming]:
    """`paired_timer(slow, fast, pairs=7)`: interleaved timing; its `.ratio` is the speed-up."""
    import torch

    def run(
        slow: Callable[[], Any], fast: Callable[[], Any], *, pairs: int = 7, warmup: int = 1
    ) -> PairedTiming:
        synchronize = torch.cuda.synchronize if torch.cuda.is_available() else None
        return time_pairs(slow, fast, pairs=pairs, warmup=warmup, synchronize=synchronize)

    return run
