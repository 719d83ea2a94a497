"""Wrong code that wants to be `verified`: every row of the matrix in docs/security.md, in every mode."""

from collections.abc import Callable
from pathlib import Path

import pytest
from grader.catalog import Catalog, load
from grader.grading import grade_lab
from grader.report import LabReport, Status, Trust
from grader.sandbox.local import LocalSandbox

from .conftest import write_course
from .forging import ATTACKS, COMPARES, RIGHT, TEST

Grade = Callable[..., LabReport]


@pytest.fixture(scope="module")
def arenas(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Catalog]:
    """For each way of comparing a course whose first lab has one test that compares so."""
    return {compares: arena(tmp_path_factory.mktemp("arena"), body) for compares, body in COMPARES.items()}


def arena(root: Path, body: str) -> Catalog:
    write_course(root)
    chapter = root / "labs" / "ch01_numbers" / "chapter.toml"
    head, first, second = chapter.read_text().split("[[lab]]")
    first = first.replace("numbers_lab.py", "answer.py")
    chapter.write_text("[[lab]]".join([head, first.rstrip() + "\n\n", second]))
    lab = chapter.parent / "lab01_double"
    for folder in ("src", "solutions"):
        (lab / folder / "numbers_lab.py").unlink()
        (lab / folder / "answer.py").write_text(RIGHT)
    (lab / "tests" / "test_numbers.py").unlink()
    (lab / "tests" / "test_answer.py").write_text(TEST.format(body=body))
    return load(root)


def judge(catalog: Catalog, sandbox: LocalSandbox, code: str, **options: object) -> LabReport:
    return grade_lab(catalog, catalog.labs[0], sandbox, {"answer.py": code.encode()}, **options)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.name)
def test_in_the_same_process(arenas, sandbox, attack):
    report = judge(arenas[attack.compares], sandbox, attack.code)
    if attack.same_process == "possible":
        # Kept as a test, so that the table says no less than the truth. When it fails, a hole was closed.
        assert report.status is Status.VERIFIED
        assert report.trust is Trust.SAME_PROCESS
        return
    assert report.status is not Status.VERIFIED, "the attack went through"
    if attack.same_process == "found":
        assert report.tampering, report.reason
