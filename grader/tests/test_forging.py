"""Wrong code that wants to be `verified`: every row of the matrix in docs/security.md, in every mode."""

from pathlib import Path

import pytest
from grader.catalog import Catalog, load
from grader.grading import grade_lab
from grader.report import LabReport, Status, Trust
from grader.sandbox.local import LocalSandbox

from .conftest import ROOT, write_course
from .forging import ATTACKS, COMPARES, RIGHT, TEST

# What a failing torch.testing.assert_close imports, which takes seconds.
PRELOAD = 'preload = ["torch", "torch.fx.experimental.symbolic_shapes"]'


@pytest.fixture(scope="module")
def arenas(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Catalog]:
    """For each way of comparing a course whose first lab has one test that compares so."""
    return {compares: arena(tmp_path_factory.mktemp("arena"), body) for compares, body in COMPARES.items()}


def arena(root: Path, body: str) -> Catalog:
    write_course(root)
    chapter = root / "labs" / "ch01_numbers" / "chapter.toml"
    head, first, second = chapter.read_text().split("[[lab]]")
    first = first.replace("numbers_lab.py", "answer.py").rstrip() + f"\nstrict = true\n{PRELOAD}\n\n"
    chapter.write_text("[[lab]]".join([head, first, second]))
    lab = chapter.parent / "lab01_double"
    for folder in ("src", "solutions"):
        (lab / folder / "numbers_lab.py").unlink()
        (lab / folder / "answer.py").write_text(RIGHT)
    (lab / "tests" / "test_numbers.py").unlink()
    (lab / "tests" / "test_answer.py").write_text(TEST.format(body=body))
    return load(root)


def judge(arena: Catalog, sandbox: LocalSandbox, code: str, trust: Trust) -> LabReport:
    code_files = {"answer.py": code.encode()}
    return grade_lab(arena, arena.labs[0], sandbox, code_files, trust=trust, cache=arena.root / "cache")


@pytest.mark.parametrize("trust", list(Trust))
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.name)
def test_attack(arenas, sandbox, attack, trust):
    result = attack.same_process if trust is Trust.SAME_PROCESS else attack.strict
    report = judge(arenas[attack.compares], sandbox, attack.code, trust)
    assert report.trust is trust
    if result == "possible":
        # Kept as a test, so that the table says no less than the truth. When it fails, a hole was closed.
        assert report.status is Status.VERIFIED
        return
    assert report.status is not Status.VERIFIED, "the attack went through"
    if result == "found":
        assert report.tampering, report.reason


@pytest.mark.parametrize("trust", list(Trust))
@pytest.mark.parametrize("compares", ["tensor", "forbid", "timer"])
def test_right_code_is_not_accused(arenas, sandbox, compares, trust):
    right = RIGHT if compares != "timer" else "def double(x):\n    return x * 2\n"
    report = judge(arenas[compares], sandbox, right, trust)
    assert report.status is Status.VERIFIED, report.reason
    assert report.tampering == ()


@pytest.mark.parametrize("trust", list(Trust))
def test_code_that_imports_what_torch_imports_late_is_not_accused(arenas, sandbox, trust):
    # torch._dynamo exchanges torch.manual_seed. Checkpointing and forward-mode derivatives import it.
    code = "import torch\nimport torch._dynamo\n" + RIGHT
    report = judge(arenas["tensor"], sandbox, code, trust)
    assert report.status is Status.VERIFIED, report.reason


def test_the_page_has_every_attack_with_its_results():
    page = (ROOT / "docs" / "security.md").read_text()
    cells = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    rows = {name: rest for name, *rest in cells}
    expected = {a.name: [a.before, a.same_process, a.strict] for a in ATTACKS}
    assert {name: rows.get(name) for name in expected} == expected
    assert len(ATTACKS) >= 25
