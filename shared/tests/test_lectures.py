"""Lectures are true: snippets run, outputs are as shown, figures can be made again, links lead somewhere."""

import contextlib
import io
import re
import runpy
import sys
import time
import tomllib
import warnings
from functools import cache
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch  # noqa: F401  # here, so that no lecture's time includes the import

matplotlib = pytest.importorskip("matplotlib")
markdown_it = pytest.importorskip("markdown_it")

from shared.figures import NIGHT, WHITE, contrast, made_with  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
LECTURES = sorted(ROOT.glob("labs/*/docs/*.md"))
SCRIPTS = sorted(ROOT.glob("labs/*/docs/figures/*.py"))
PAGES = sorted([*LECTURES, *ROOT.glob("labs/*/README.md"), *ROOT.glob("labs/*/lab*/README.md")])
SECONDS = 2.0


def each(paths, name="path"):
    return pytest.mark.parametrize(name, paths, ids=lambda path: path.relative_to(ROOT / "labs").as_posix())


@cache
def blocks(path):
    """The page's top-level and nested blocks, flat, as markdown-it gives them."""
    return markdown_it.MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8"))


def inlines(path, kind):
    """All inline elements of one kind: text, link_open, image, ..."""
    children = [child for block in blocks(path) for child in block.children or []]
    return [child for child in children if child.type == kind]


def sections(path):
    """Headings of the second level and the blocks below each, in order."""
    found, below = {}, []
    for before, block in pairwise(blocks(path)):
        if before.type == "heading_open" and before.tag == "h2":
            below = found[block.content] = []
        else:
            below.append(block)
    return found


def begun(chapter_file):
    """Whether a chapter has at least one lab that is not just planned."""
    chapter = tomllib.loads(chapter_file.read_text(encoding="utf-8"))
    return not all(lab.get("planned", False) for lab in chapter["lab"])


def planned(path):
    """Whether `path` is in a lab that its chapter announces and nobody has written yet."""
    for folder in path.parents:
        if (folder / "chapter.toml").is_file():
            chapter = tomllib.loads((folder / "chapter.toml").read_text(encoding="utf-8"))
            names = {lab["folder"] for lab in chapter["lab"] if lab.get("planned", False)}
            return path.relative_to(folder).parts[0] in names
    return False


def test_there_are_lectures_and_figures_to_test():
    assert LECTURES
    assert SCRIPTS


# --- snippets -------------------------------------------------------------------------------


@each(LECTURES)
def test_snippets_print_what_the_lecture_shows(path):
    fences = [block for block in blocks(path) if block.type == "fence"]
    assert any(fence.info == "python" for fence in fences), "a lecture has snippets to run"
    namespace, printed, started = {"__name__": "lecture"}, None, time.thread_time()
    for fence in fences:
        line = fence.map[0] + 1
        if fence.info == "python":
            assert not printed, f"line {line}: the output above is not shown in a ```text block:\n{printed}"
            # Blank lines in front give tracebacks the lecture's own line numbers.
            code = compile("\n" * line + fence.content, str(path), "exec")
            output = io.StringIO()
            with contextlib.redirect_stdout(output), warnings.catch_warnings():
                warnings.simplefilter("error")
                exec(code, namespace)
            printed = output.getvalue()
        elif fence.info == "text":
            assert printed is not None, f"line {line}: a ```text block without a snippet before it"
            shown = [text.rstrip() for text in fence.content.splitlines()]
            assert [text.rstrip() for text in printed.splitlines()] == shown, (
                f"line {line}: shown, not printed"
            )
            printed = None
        else:
            pytest.fail(f"line {line}: a fence is ```python, executed, or ```text, its output", pytrace=False)
    assert not printed, f"the last output is not shown in a ```text block:\n{printed}"
    # Time of this thread, so that a busy machine does not count.
    seconds = time.thread_time() - started
    assert seconds < SECONDS, f"the snippets take {seconds:.1f} s of {SECONDS}"


# --- form -----------------------------------------------------------------------------------


@each(LECTURES)
def test_a_lecture_has_600_to_1500_words(path):
    prose = [child.content for kind in ("text", "code_inline") for child in inlines(path, kind)]
    words = sum(len(text.split()) for text in prose)
    assert 600 <= words <= 1500, f"{words} words"


@each(LECTURES)
def test_a_lecture_asks_one_question_in_its_title(path):
    title = path.read_text(encoding="utf-8").splitlines()[0]
    assert re.fullmatch(r"# .*\?.*", title)
    assert sum(block.type == "heading_open" and block.tag == "h1" for block in blocks(path)) == 1


@each(LECTURES)
def test_a_lecture_ends_with_three_folded_questions_and_references(path):
    parts = sections(path)
    assert list(parts)[-2:] == ["Check yourself", "References"]

    folded, answers, questions = False, [], 0
    for block in parts["Check yourself"]:
        if block.type == "html_block" and block.content.startswith("<details><summary>Answer</summary>"):
            folded, _ = True, answers.append("")
        elif block.type == "html_block" and block.content.startswith("</details>"):
            folded = False
        elif block.type == "inline" and folded:
            answers[-1] += block.content
        elif block.type == "inline":
            questions += bool(re.match(rf"\*\*{questions + 1}\. ", block.content))
    assert not folded, "a <details> is never closed"
    assert questions == 3
    assert len(answers) == 3
    assert all(answers), "an answer is empty: leave a blank line after <details>, or Markdown stops there"

    references = [block.content for block in parts["References"] if block.type == "inline"]
    assert references
    for reference in references:
        assert re.search(r"\b(19|20)\d\d\b", reference), f"no year: {reference}"
        assert re.search(r"“|\"", reference), f"no title: {reference}"


# --- figures --------------------------------------------------------------------------------


@each(LECTURES)
def test_every_image_has_alt_text_and_a_script_beside_it(path):
    images = inlines(path, "image")
    assert images, "a lecture has a figure"
    for image in images:
        file = path.parent / image.attrs["src"]
        assert file.is_file(), f"{image.attrs['src']} does not exist"
        assert len(image.content) >= 40, f"{file.name}: the alt text does not say what there is to see"
        assert file.with_suffix(".py").is_file(), f"{file.name}: no script draws it"


@each(SCRIPTS)
def test_every_figure_is_in_a_lecture(path):
    chapter = path.parents[1]
    shown = {
        (lecture.parent / image.attrs["src"]).resolve()
        for lecture in chapter.glob("*.md")
        for image in inlines(lecture, "image")
    }
    assert path.with_suffix(".svg") in shown, "no lecture of the chapter shows this figure"


@each(SCRIPTS)
def test_a_figure_can_be_made_again(path, tmp_path, monkeypatch):
    committed = path.with_suffix(".svg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path), str(tmp_path)])
    runpy.run_path(str(path), run_name="__main__")
    made = tmp_path / committed.name
    version = made_with(committed)
    if version != matplotlib.__version__:
        pytest.skip(f"drawn with matplotlib {version}, here is {matplotlib.__version__}: bytes may differ")
    # Processors round differently, which moves a point by a millionth; nobody sees less than a hundredth.
    words, numbers = parted(made)
    committed_words, committed_numbers = parted(committed)
    assert words == committed_words, f"run {path.name} again and look at what changed"
    assert numbers == pytest.approx(committed_numbers, abs=0.01, rel=0), f"run {path.name} again and look"


def parted(svg):
    """Return a drawing's text without its numbers, and the numbers."""
    parts = re.split(r"(-?\d+(?:\.\d+)?(?:e[-+]?\d+)?)", svg.read_text())
    return parts[::2], [float(number) for number in parts[1::2]]


@each(SCRIPTS)
def test_a_figure_is_readable_on_light_and_dark_pages(path):
    text = path.with_suffix(".svg").read_text(encoding="utf-8")
    colours = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", text))
    # White and near-black are for labels on coloured squares (shared.figures.text_on).
    for colour in colours - {WHITE, NIGHT}:
        assert min(contrast(colour, page) for page in (WHITE, NIGHT)) >= 3, f"{colour} fades on a page"


# --- links ----------------------------------------------------------------------------------


@each(PAGES)
def test_relative_links_lead_to_files(path):
    for link in inlines(path, "link_open"):
        url = urlsplit(link.attrs["href"])
        if url.scheme or not url.path:
            continue
        file = (path.parent / unquote(url.path)).resolve()
        assert file.exists() or planned(file), f"{link.attrs['href']} leads nowhere"


@each([path for path in sorted(ROOT.glob("labs/*/chapter.toml")) if begun(path)])
def test_a_chapter_readme_links_to_every_lab_and_lecture(path):
    readme = path.with_name("README.md")
    chapter = tomllib.loads(path.read_text(encoding="utf-8"))
    targets = {link.attrs["href"] for link in inlines(readme, "link_open")}
    for lab in chapter["lab"]:
        assert f"{lab['folder']}/README.md" in targets, f"no link to {lab['folder']}"
    for lecture in path.parent.glob("docs/*.md"):
        assert f"docs/{lecture.name}" in targets, f"no link to {lecture.name}"
