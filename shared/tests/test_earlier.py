"""Earlier labs' solutions, in the checkout and in a folder laid out like a sandbox."""

from pathlib import Path

import pytest
from shared.earlier import solution_of

CHAPTER = '[[lab]]\nfolder = "lab01_first"\nfiles = ["{files}"]\n'


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    lab = tmp_path / "labs" / "ch77_made_up" / "lab01_first"
    (lab / "solutions").mkdir(parents=True)
    (lab.parent / "chapter.toml").write_text(
        '[[lab]]\nfolder = "lab01_first"\nfiles = ["one.py", "two.py"]\n'
    )
    (lab / "solutions" / "one.py").write_text(
        "from dataclasses import dataclass\n\n@dataclass\nclass A:\n    x: int = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    return lab


def test_a_solution_of_the_course_is_the_same_module_every_time():
    module = solution_of("ch01/lab01")
    assert module.__file__
    assert module.__file__.endswith("lab01_dot_product/solutions/attention.py")
    assert solution_of("ch01/lab01", "attention") is module
    assert module.__name__ == "topeka_solutions.ch01_lab01.attention"


def test_the_working_folders_labs_come_first(sandbox):
    assert solution_of("ch77/lab01", "one").A().x == 3


def test_a_file_that_was_not_sent_along_is_named_with_the_remedy(sandbox):
    with pytest.raises(
        ImportError, match=r"two.py is not here: does chapter.toml list ch77/lab01 under .* `uses`"
    ):
        solution_of("ch77/lab01", "two")


def test_of_several_modules_one_must_be_named(sandbox):
    with pytest.raises(ImportError, match="has the modules one, two; solution_of wants one of them"):
        solution_of("ch77/lab01")


@pytest.mark.parametrize("lab", ["ch78/lab01", "nonsense", "ch01/lab09", ""])
def test_an_unknown_lab_is_an_import_error(lab):
    with pytest.raises(ImportError, match="there is no lab"):
        solution_of(lab)


def test_a_solution_that_fails_to_import_is_not_kept(sandbox):
    file = sandbox / "solutions" / "two.py"
    file.write_text("raise RuntimeError('half-written')")
    with pytest.raises(RuntimeError, match="half-written"):
        solution_of("ch77/lab01", "two")
    file.write_text("x = 1")
    assert solution_of("ch77/lab01", "two").x == 1
