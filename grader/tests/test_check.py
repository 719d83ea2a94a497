"""`check` on the miniature course: right as it stands, and every way of being wrong is named."""

from pathlib import Path

import pytest
from grader.catalog import Catalog
from grader.check import LabCheck, anatomy, check


def edit(file: Path, find: str, replace: str) -> None:
    text = file.read_text()
    assert find in text
    file.write_text(text.replace(find, replace))


def problems(found: list[LabCheck]) -> list[str]:
    return [problem for lab in found for problem in lab.problems]


def test_a_good_chapter_has_no_problems_and_every_misconception_is_diagnosed(course: Catalog):
    assert problems(check(course, course.labs, write_signatures=True)) == []
    found = check(course, course.labs, workers=2)
    assert problems(found) == []
    assert [(lab.tests, lab.caught, lab.diagnosed, lab.accepted) for lab in found] == [
        (5, 5, 5, 1),
        (6, 5, 5, 1),
    ]


def test_without_signatures_the_author_is_told_to_write_them(course: Catalog):
    assert any("topeka check --write" in p for p in problems(check(course, course.labs[:1])))


LAB = Path("labs/ch01_numbers/lab01_double")


@pytest.mark.parametrize(
    ("file", "find", "replace", "words"),
    [
        ("tests/test_numbers.py", "assert is_even(4)", "return\n    assert is_even(4)", "the skeleton passes 1 tests"),
        ("tests/test_numbers.py", "== x * 2, f", "== x * 2 or True, f", "wrong_factor is not caught by test_double"),
        ("tests/test_numbers.py", "== 0.0", "== 0.0 and False", "the solution is failed"),
        ("misconceptions.toml", 'caught_by = ["test_even_and_odd"]', 'caught_by = ["test_typo"]',
         "there is no test test_typo"),
        ("misconceptions.toml", 'find = "n % 2 == 0"\nreplace = "True"', 'find = "n % 3"\nreplace = "True"',
         "always_even: `find` occurs 0 times"),
        ("misconceptions.toml", 'replace = "n - n // 2 * 2 == 0"', 'replace = "n > 3"',
         "alternative modulo_by_subtraction is rejected"),
        ("misconceptions.toml", 'name = "nonsense"', 'name = "wrong_factor"', "used twice: wrong_factor"),
        ("misconceptions.toml", 'hint = "Seven', 'tip = "Seven', "misconception.2.hint: Field required"),
        ("misconceptions.toml", 'replace = "return x * 2 + 1"', 'replace = "return x"',
         "forgets_the_operator is diagnosed as wrong_factor"),
        ("solutions/numbers_lab.py", "return x * 2", 'raise NotImplementedError("later")',
         "still raises NotImplementedError"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(course: Catalog, file: str, find: str, replace: str, words: str):
    edit(course.root / LAB / file, find, replace)
    found = problems(check(course, course.labs[:1], write_signatures=True))
    assert any(words in problem for problem in found), found


@pytest.mark.parametrize(
    ("file", "find", "replace", "words"),
    [
        ("README.md", "## Background", "## Theory", "README.md needs the sections"),
        ("README.md", "About 5 minutes", "Soon done", "no time estimate"),
        ("src/numbers_lab.py", "x: float", "y: float", "double: args differ"),
        ("src/numbers_lab.py", "    # It is not addition.\n", "", "1 lines of guidance"),
    ],
)
def test_anatomy_names_what_is_missing(course: Catalog, file: str, find: str, replace: str, words: str):
    lab = course.labs[0]
    assert anatomy(lab) == []
    edit(lab.path / file, find, replace)
    assert any(words in problem for problem in anatomy(lab)), anatomy(lab)


def test_missing_files_are_named(course: Catalog):
    lab = course.labs[0]
    for name in ("README.md", "src/numbers_lab.py", "tests/test_numbers.py"):
        (lab.path / name).unlink()
    found = anatomy(lab)
    assert "README.md is missing" in found
    assert "src/numbers_lab.py is missing" in found
    assert "tests/ holds no test_*.py" in found


def test_a_milestone_short_of_our_own_number_is_a_problem(course: Catalog):
    lab = course.labs[1]
    edit(lab.path / "tests" / "test_numbers.py", "abs(half(3.0) - 1.5)", "abs(half(3.0) - 1.5) + 1e-6")
    assert any("milestone is 1e-06" in p for p in problems(check(course, [lab], write_signatures=True)))


def test_every_milestone_is_judged(course: Catalog):
    lab = course.labs[1]
    tests = lab.path / "tests" / "test_numbers.py"
    edit(
        tests,
        '    milestone("largest error"',
        '    milestone("smallest", 0.0, 1e-5, "absolute", better="lower")\n    milestone("largest error"',
    )
    edit(tests, "abs(half(3.0) - 1.5)", "abs(half(3.0) - 1.5) + 1e-6")
    assert any("milestone is 1e-06" in p for p in problems(check(course, [lab], write_signatures=True)))


def test_a_misconception_that_could_not_be_run_is_said_to_have_been(course: Catalog):
    lab = course.labs[0]
    edit(lab.path / "misconceptions.toml", 'replace = "return x"', "replace = \"__import__('os')._exit(0)\"")
    [found] = [
        p for p in problems(check(course, [lab], write_signatures=True)) if "forgets_the_operator" in p
    ]
    assert "is not caught by test_double: the process ended" in found


def test_a_milestone_that_only_a_slow_test_measures_is_judged_when_asked_for(course: Catalog):
    lab = course.labs[1]
    tests = lab.path / "tests" / "test_numbers.py"
    edit(tests, "@pytest.mark.milestone", "@pytest.mark.slow\n@pytest.mark.milestone")
    assert problems(check(course, [lab], write_signatures=True)) == []
    assert problems(check(course, [lab], slow=True)) == []
    edit(tests, "abs(half(3.0) - 1.5)", "abs(half(3.0) - 1.5) + 1e-6")
    assert problems(check(course, [lab])) == []
    assert any("milestone is 1e-06" in p for p in problems(check(course, [lab], slow=True)))
    edit(tests, 'milestone("largest error"', 'print("largest error"')
    assert any("no test records it" in p for p in problems(check(course, [lab], slow=True)))
