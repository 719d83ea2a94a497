"""A miniature course in a temporary folder: real files, graded by the real runner."""

import functools
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import docker
import psutil
import pytest
from docker.errors import ImageNotFound, NotFound
from docker.models.containers import Container
from grader.catalog import Catalog, load
from grader.sandbox.docker import EngineUnusable, connect
from grader.sandbox.local import LocalSandbox
from shared.plugin import NOT_VERIFIED_HERE

ROOT = Path(__file__).resolve().parents[2]
SANDBOX_IMAGE = os.environ.get("TOPEKA_TEST_IMAGE", "topeka-sandbox:cpu")

CHAPTER = """
title = "Numbers"
phase = "foundation"
stack = "cpu"
summary = "A chapter for tests."

[milestone]
lab = "lab02_half"
claim = "Halves are exact"
measure = "largest error"
unit = "absolute"
better = "lower"
promised = 1e-5
ours = 1e-9

[[lab]]
folder = "lab01_double"
title = "Doubling"
summary = "Twice a number"
minutes = 5
files = ["numbers_lab.py"]

[[lab]]
folder = "lab02_half"
title = "Halving"
summary = "Half a number, measured"
minutes = 5
files = ["numbers_lab.py"]
"""

README = """# Lab: {title}

*About 5 minutes.*

## You will build
One function.

## Why
To test the grader.

## Background
Arithmetic.

## Steps
One.

## How it is checked
By equality.

## Going further
Two functions.
"""

SKELETON = '''"""Arithmetic."""


def {name}(x: float) -> float:
    """Return {what} x."""
    # YOUR CODE HERE
    # One operator is enough.
    # It is not addition.
    raise NotImplementedError("{what} a number")


def is_even(n: int) -> bool:
    """Return whether n is even."""
    # YOUR CODE HERE
    # What is left after division by two?
    # The operator is %.
    raise NotImplementedError("evenness")
'''

SOLUTION = '''"""Arithmetic."""


def {name}(x: float) -> float:
    """Return {what} x."""
    return x {operator}


def is_even(n: int) -> bool:
    """Return whether n is even."""
    return n % 2 == 0
'''

TESTS = """
import pytest
from numbers_lab import {name}, is_even


@pytest.mark.parametrize("x", [1.5, -3.0, 7.0])
def test_{name}(x):
    assert {name}(x) == x {operator}, f"got {{{name}(x)}}: is the operator right?"


def test_{name}_of_zero_is_zero_and_of_eight_is_right():
    assert {name}(8.0) == 8.0 {operator}, f"got {{{name}(8.0)}}"
    assert {name}(0.0) == 0.0


def test_even_and_odd():
    assert is_even(4), "4 is even"
    assert is_even(-2), "-2 is even"
    assert not is_even(7), "7 is odd"


@pytest.mark.slow
def test_slowly():
    assert {name}(2.0) == 2.0 {operator}
"""

MILESTONE = """

@pytest.mark.milestone
def test_milestone(milestone):
    milestone("largest error", abs(half(3.0) - 1.5), 1e-5, "absolute", better="lower")
"""

MISCONCEPTIONS = """
[[misconception]]
name = "forgets_the_operator"
file = "numbers_lab.py"
find = "return x {operator}"
replace = "return x"
caught_by = ["test_{name}"]
hint = "The number comes back unchanged."

[[misconception]]
name = "wrong_factor"
file = "numbers_lab.py"
find = "return x {operator}"
replace = "return x {operator} + 1"
caught_by = ["test_{name}", "test_{name}_of_zero_is_zero_and_of_eight_is_right"]
hint = "You are off by one somewhere."

[[misconception]]
name = "always_even"
file = "numbers_lab.py"
find = "n % 2 == 0"
replace = "True"
caught_by = ["test_even_and_odd"]
hint = "Seven is not even, is it?"

[[misconception]]
name = "never_even"
file = "numbers_lab.py"
find = "n % 2 == 0"
replace = "False"
caught_by = ["test_even_and_odd"]
hint = "Four is even, is it not?"

[[misconception]]
name = "nonsense"
file = "numbers_lab.py"
find = "return x {operator}"
replace = "return -x * 100"
caught_by = ["test_{name}"]
hint = "Where do the sign and the hundred come from?"

[[alternative]]
name = "modulo_by_subtraction"
file = "numbers_lab.py"
find = "n % 2 == 0"
replace = "n - n // 2 * 2 == 0"
"""


def write_course(root: Path) -> Path:
    """Write the miniature course below `root` and return `root`."""
    for name in ("pyproject.toml", "conftest.py"):
        shutil.copy(ROOT / name, root / name)
    chapter = root / "labs" / "ch01_numbers"
    chapter.mkdir(parents=True)
    (chapter / "chapter.toml").write_text(CHAPTER)
    for folder, name, what, operator in (
        ("lab01_double", "double", "twice", "* 2"),
        ("lab02_half", "half", "half of", "/ 2"),
    ):
        lab = chapter / folder
        for part in ("src", "tests", "solutions"):
            (lab / part).mkdir(parents=True)
        words = {"name": name, "what": what, "operator": operator}
        (lab / "README.md").write_text(README.format(title=name))
        (lab / "src" / "numbers_lab.py").write_text(SKELETON.format(**words))
        (lab / "solutions" / "numbers_lab.py").write_text(SOLUTION.format(**words))
        tests = TESTS.format(**words) + (MILESTONE if name == "half" else "")
        (lab / "tests" / "test_numbers.py").write_text(tests)
        (lab / "misconceptions.toml").write_text(MISCONCEPTIONS.format(**words))
    return root


@pytest.fixture(scope="session")
def make_course() -> Callable[[Path], Catalog]:
    """Writes the miniature course into a folder, for tests that share one."""
    return lambda root: load(write_course(root))


@pytest.fixture
def course(tmp_path: Path, make_course: Callable[[Path], Catalog]) -> Catalog:
    """The miniature course, in a folder with a space in its name."""
    root = tmp_path / "a course"
    root.mkdir()
    return make_course(root)


@pytest.fixture(scope="session", autouse=True)
def _own_temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Runners put their work folders where no other run of them on this machine does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("jobs")))
        # The command takes Docker where it can; what Docker does is tested with Docker, by name.
        patch.setenv("TOPEKA_SANDBOX", "local")
        yield


def lives(process: psutil.Process) -> bool:
    """Whether a process is there and no zombie; it may end while we ask."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="session")
def sandbox() -> Iterator[LocalSandbox]:
    """One warm parent for all tests of a run."""
    with LocalSandbox(threads=1) as sandbox:
        yield sandbox


# --- containers: the only place that says what a test needs of them -----------------------------------


@pytest.fixture(scope="session")
def engine() -> Iterator[docker.DockerClient]:
    """A Docker Engine that has the sandbox's image; without one, the test is not verified here."""
    try:
        client = connect()
    except EngineUnusable as error:
        pytest.skip(f"{NOT_VERIFIED_HERE}: {error}")
    try:
        client.images.get(SANDBOX_IMAGE)
    except ImageNotFound:
        client.close()
        pytest.skip(f"{NOT_VERIFIED_HERE}: the engine has no image {SANDBOX_IMAGE}; `make images` builds it")
    yield client
    deadline = time.monotonic() + 20
    while (left := _containers_of(client, os.getpid())) and time.monotonic() < deadline:
        time.sleep(0.1)
    client.close()
    assert left == [], "no container outlives the tests"


@pytest.fixture(scope="session")
def image(engine: docker.DockerClient) -> str:
    """Name of the image under test; TOPEKA_TEST_IMAGE chooses another."""
    return SANDBOX_IMAGE


@pytest.fixture(scope="session")
def containers_of(engine: docker.DockerClient) -> Callable[[int], list[Container]]:
    """`containers_of(pid)`: the sandbox's containers, in any state, that a process of this host started."""

    return functools.partial(_containers_of, engine)


def _containers_of(client: docker.DockerClient, pid: int) -> list[Container]:
    found = client.containers.list(all=True, filters={"label": "topeka.client"}, sparse=True)
    return [each for each in found if each.attrs["Labels"]["topeka.client"].split()[1:2] == [str(pid)]]


@pytest.fixture(scope="session")
def is_gone(engine: docker.DockerClient) -> Callable[[str], bool]:
    """`is_gone(id)`: whether a container is no more, or is no more within ten seconds."""

    def gone(container: str) -> bool:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                engine.containers.get(container)
            except NotFound:
                return True
            time.sleep(0.05)
        return False

    return gone
