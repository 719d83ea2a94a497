"""SYLLABUS.md of the repository, and of small courses in `tmp_path`."""

import re
from pathlib import Path

import pytest
from grader.catalog import Catalog, CatalogError, load

from grader import syllabus

REPOSITORY = Path(__file__).resolve().parents[2]

CHAPTER = """\
title = "Attention"
phase = "attention variants"
stack = "{stack}"
also = {also}
summary = "From a dot product to heads."

[milestone]
lab = "lab0{carrier}"
claim = "Heads match"
measure = "largest |difference|"
unit = "tokens"
better = "{better}"
promised = {promised}
ours = {ours}
notes = ["bitwise in float64"]

[[lab]]
folder = "lab01_dots"
title = "Dot products"
summary = "a | b <c>"
minutes = 45
files = ["attention.py"]

[[lab]]
folder = "lab02_heads"
title = "Heads"
summary = "Many at once"
minutes = 120
files = ["heads.py"]
planned = true
"""


def course(
    root: Path,
    *,
    stack: str = "cpu",
    also: str = "[]",
    carrier: str = "1_dots",
    better: str = "lower",
    promised: str = "1e-5",
    ours: str = "2.5e-6",
) -> Path:
    solutions = root / "labs/ch01_attention/lab01_dots/solutions"
    solutions.mkdir(parents=True)
    (solutions / "attention.py").touch()
    (root / "pyproject.toml").touch()
    text = CHAPTER.format(
        stack=stack, also=also, carrier=carrier, better=better, promised=promised, ours=ours
    )
    (root / "labs/ch01_attention/chapter.toml").write_text(text, encoding="utf-8")
    return root


def page(root: Path) -> str:
    return syllabus.render(load(root))


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return load(REPOSITORY)


def test_page_of_the_repository_is_up_to_date() -> None:
    assert not syllabus.is_stale(REPOSITORY), "run `topeka syllabus --write`"


def test_page_has_every_lab_and_its_minutes(catalog: Catalog) -> None:
    rows = re.findall(r"^\| \[?(ch\d\d/lab\d\d).*\| (\d+) \| .* \|$", syllabus.render(catalog), re.MULTILINE)
    assert rows == [(lab.id, str(lab.minutes)) for lab in catalog.labs]


def test_links_lead_to_folders_that_exist(catalog: Catalog) -> None:
    links = re.findall(r"\]\(([^)]+)\)", syllabus.render(catalog))
    assert len(links) == sum(not lab.planned for lab in catalog.labs)
    assert [link for link in links if not (REPOSITORY / link).is_dir()] == []


def test_totals_come_from_the_catalogue(catalog: Catalog) -> None:
    hours = round(sum(lab.minutes for lab in catalog.labs) / 60)
    assert f"4 phases, 12 chapters, 54 labs, about {hours} hours of work." in syllabus.render(catalog)


def test_written_lab_is_linked_and_planned_lab_is_not(tmp_path: Path) -> None:
    lines = page(course(tmp_path)).splitlines()
    assert "1 phase, 1 chapter, 2 labs, about 3 hours of work. 1 is written; the other 1 is planned." in lines
    assert "| ch01/lab02 | Heads (planned) | Many at once | 120 | `cpu` |" in lines
    assert (
        r"| [ch01/lab01](labs/ch01_attention/lab01_dots/) | Dot products | a \| b &lt;c> | 45 | `cpu` |"
        in lines
    )


def test_course_without_planned_labs_says_so(tmp_path: Path) -> None:
    root = course(tmp_path)
    solutions = root / "labs/ch01_attention/lab02_heads/solutions"
    solutions.mkdir(parents=True)
    (solutions / "heads.py").touch()
    file = root / "labs/ch01_attention/chapter.toml"
    file.write_text(file.read_text().replace("planned = true\n", ""))
    assert "All labs are written." in page(root)
    assert "planned" not in page(root)


def test_phases_are_headings(tmp_path: Path) -> None:
    assert "\n## Attention variants\n\n### Chapter 1: Attention\n\nFrom a dot" in page(course(tmp_path))


def test_milestone_line_tells_promise_and_ours(tmp_path: Path) -> None:
    text = page(course(tmp_path))
    assert "**Milestone** (ch01/lab01): Heads match.\n" in text
    assert (
        "Promised at most 1e-5 tokens / our own solutions reach at most 2.5e-6 tokens: "
        r"largest \|difference\|."
    ) in text
    assert "\nAlso: bitwise in float64.\n" in text


def test_milestone_of_a_planned_lab_is_not_claimed(tmp_path: Path) -> None:
    text = page(course(tmp_path, carrier="2_heads", better="higher", promised="100", ours="20000"))
    assert "Promised at least 100 tokens / our own solutions are to reach at least 20,000 tokens: " in text


@pytest.mark.parametrize(
    ("stack", "also", "says"),
    [
        ("cpu", "[]", "`cpu`"),
        ("cpu", '["cuda"]', "`cpu`, *also* `cuda`"),
        ("cuda", "[]", "`cuda`, CPU tier"),
        ("multi-gpu", "[]", "`multi-gpu`, CPU tier"),
    ],
)
def test_stack_is_told(tmp_path: Path, stack: str, also: str, says: str) -> None:
    assert f"| 120 | {says} |" in page(course(tmp_path, stack=stack, also=also))


def test_page_is_stale_until_written_and_after_a_change(tmp_path: Path) -> None:
    root = course(tmp_path)
    assert syllabus.is_stale(root)
    assert syllabus.write(root) == root / "SYLLABUS.md"
    assert not syllabus.is_stale(root)
    file = root / "labs/ch01_attention/chapter.toml"
    file.write_text(file.read_text().replace("minutes = 45", "minutes = 50"))
    assert syllabus.is_stale(root)


def test_writing_leaves_a_readable_file_and_nothing_else(tmp_path: Path) -> None:
    root = course(tmp_path)
    before = set(root.iterdir())
    file = syllabus.write(root)
    assert set(root.iterdir()) - before == {file}
    assert file.stat().st_mode & 0o777 == 0o644
    assert file.read_text(encoding="utf-8") == page(root)


def test_failed_write_leaves_the_old_page_and_nothing_else(tmp_path: Path) -> None:
    root = course(tmp_path)
    (root / "SYLLABUS.md").mkdir()  # a file cannot replace a folder
    before = set(root.iterdir())
    with pytest.raises(OSError, match=r"SYLLABUS\.md"):
        syllabus.write(root)
    assert set(root.iterdir()) == before


def test_broken_course_leaves_the_old_page(tmp_path: Path) -> None:
    root = course(tmp_path)
    syllabus.write(root)
    old = (root / "SYLLABUS.md").read_bytes()
    (root / "labs/ch01_attention/chapter.toml").write_text("title =")
    with pytest.raises(CatalogError):
        syllabus.write(root)
    assert (root / "SYLLABUS.md").read_bytes() == old
