import subprocess
import textwrap
from pathlib import Path

import pytest
from grader.catalog import Catalog
from grader.skeleton import NoSkeleton, as_shipped, drift, missing_guidance, snapshot, stubs

SOLUTION = '''
"""Module."""

import math

LIMIT = 3


def area(r: float) -> float:
    """Return the area."""
    square = r * r
    return math.pi * square


class Model:
    """A model."""

    size = 4

    def forward(self, x: int) -> int:
        """Return x + size."""
        return x + self.size
'''
SKELETON = SOLUTION.replace(
    "    return math.pi * square",
    '    # YOUR CODE HERE\n    # one\n    # two\n    raise NotImplementedError("the area")',
).replace(
    "        return x + self.size",
    '        # YOUR CODE HERE\n        # one\n        # two\n        raise NotImplementedError("the sum")',
)


def test_a_skeleton_with_given_code_above_its_stub_has_not_drifted():
    assert drift(SKELETON, SOLUTION) == []
    assert missing_guidance(SKELETON) == []


def test_stubs_are_found_with_dotted_names_and_tasks():
    assert [(s.name, s.task) for s in stubs(SKELETON)] == [("area", "the area"), ("Model.forward", "the sum")]


@pytest.mark.parametrize(
    ("find", "replace", "words"),
    [
        ("r: float", "radius: float", "area: args differ"),
        ("-> float", "-> int", "area: returns differ"),
        ('"""Return the area."""', '"""Return an area."""', "area: the docstrings differ"),
        ("LIMIT = 3", "LIMIT = 4", "`LIMIT = 4` stands in the skeleton only"),
        ("import math\n", "", "`import math` stands in the solution only"),
        ("size = 4", "size = 5", "`size = 5` stands in the skeleton only"),
        ("class Model:", "class Model(dict):", "class Model: bases or decorators differ"),
        (
            "square = r * r",
            "square = r * 2",
            "area: the code given above the stub is not the solution's beginning",
        ),
        (
            'raise NotImplementedError("the sum")',
            "return 7",
            "forward: the body is neither the solution's nor a stub",
        ),
        ("class Model", "def extra() -> None: ...\n\n\nclass Model", "`extra` stands in the skeleton only"),
    ],
)
def test_drift_is_named(find, replace, words):
    assert SKELETON.count(find) >= 1
    assert any(words in problem for problem in drift(SKELETON.replace(find, replace, 1), SOLUTION))


@pytest.mark.parametrize(
    ("find", "replace", "words"),
    [
        ("# YOUR CODE HERE\n    # one", "# one", "area: no comment"),
        ("    # two\n    raise", "    raise", "area: 1 lines of guidance"),
        ('("the sum")', "()", "Model.forward: NotImplementedError says nothing"),
    ],
)
def test_missing_guidance_is_named(find, replace, words):
    assert any(words in p for p in missing_guidance(SKELETON.replace(find, replace, 1)))


# --- the file as shipped ------------------------------------------------------------------------


def git(root: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=Learner", "-c", "user.email=learner@example.org"]
    subprocess.run(["git", "-C", str(root), *identity, *arguments], check=True, capture_output=True)


def commit(root: Path) -> None:
    git(root, "add", "-A")
    git(root, "commit", "-m", "work")


def test_git_gives_the_skeleton_back_after_the_learner_committed_work(course: Catalog, tmp_path: Path):
    lab, root = course.labs[0], course.root
    file = lab.path / "src" / "numbers_lab.py"
    shipped = file.read_text()
    git(root, "init")
    commit(root)
    half_done = shipped.replace(
        "    # YOUR CODE HERE\n    # One operator is enough.\n    # It is not addition.\n"
        '    raise NotImplementedError("twice a number")',
        "    return x + x",
    )
    assert half_done != shipped
    for text in (half_done, (lab.path / "solutions" / "numbers_lab.py").read_text(), "nonsense ("):
        file.write_text(text)
        commit(root)
        assert as_shipped(course, lab, "numbers_lab.py", tmp_path / "none") == shipped


def test_without_git_a_snapshot_gives_the_skeleton_back(course: Catalog, tmp_path: Path):
    lab = course.labs[0]
    file = lab.path / "src" / "numbers_lab.py"
    shipped = file.read_text()
    snapshot(course, tmp_path / "kept")
    file.write_text("gone")
    snapshot(course, tmp_path / "kept")  # an edited file never replaces the copy
    assert as_shipped(course, lab, "numbers_lab.py", tmp_path / "kept") == shipped
    file.unlink()
    assert as_shipped(course, lab, "numbers_lab.py", tmp_path / "kept") == shipped


def test_no_skeleton_anywhere_is_said(course: Catalog, tmp_path: Path):
    lab = course.labs[0]
    (lab.path / "src" / "numbers_lab.py").write_text(textwrap.dedent(SOLUTION))
    with pytest.raises(NoSkeleton, match="take the file from a fresh copy of the course"):
        as_shipped(course, lab, "numbers_lab.py", tmp_path / "none")
