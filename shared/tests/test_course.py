import pytest
from shared.course import LabFolder, find_lab

CHAPTER = """
title = "Numbers"

[[lab]]
folder = "lab01_double"
files = ["numbers_lab.py", "model/layers.py", "kernel.cu"]

[[lab]]
folder = "lab02_half"
"""


@pytest.fixture
def chapter(tmp_path):
    folder = tmp_path / "labs" / "ch01_numbers"
    for lab in ("lab01_double", "lab02_half", "lab03_unlisted"):
        (folder / lab / "tests" / "deep").mkdir(parents=True)
    (folder / "chapter.toml").write_text(CHAPTER)
    return folder


def test_a_lab_is_found_from_its_folder_and_from_anything_below(chapter):
    lab = LabFolder(
        "ch01/lab01", chapter / "lab01_double", ("numbers_lab.py", "model/layers.py", "kernel.cu")
    )
    assert find_lab(chapter / "lab01_double") == lab
    assert find_lab(chapter / "lab01_double" / "tests" / "deep" / "test_x.py") == lab


def test_only_python_files_are_modules_and_each_is_named_by_its_stem(chapter):
    lab = find_lab(chapter / "lab01_double")
    assert lab is not None
    assert lab.module_names == ("numbers_lab", "layers")
    assert lab.module_files == {"numbers_lab": "numbers_lab.py", "layers": "model/layers.py"}


def test_a_lab_without_files_has_no_modules(chapter):
    lab = find_lab(chapter / "lab02_half")
    assert lab is not None
    assert (lab.files, lab.module_names) == ((), ())


def test_outside_every_lab_and_in_an_unlisted_folder_there_is_no_lab(chapter):
    assert find_lab(chapter) is None
    assert find_lab(chapter.parent / "nowhere") is None
    assert find_lab(chapter / "lab03_unlisted" / "tests") is None


def test_a_broken_chapter_file_is_named_in_the_error(chapter):
    (chapter / "chapter.toml").write_text("title = \n")
    with pytest.raises(ValueError, match=r"chapter\.toml: .*line 1"):
        find_lab(chapter / "lab01_double")


def test_a_chapter_file_that_is_no_text_is_named_in_the_error(chapter):
    (chapter / "chapter.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"chapter\.toml: .*utf-8"):
        find_lab(chapter / "lab01_double")
