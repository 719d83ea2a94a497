"""Renders SYLLABUS.md from the catalogue."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from grader.catalog import Catalog, Chapter, Lab, load

FILE = "SYLLABUS.md"


def write(root: Path) -> Path:
    """Write SYLLABUS.md below `root` and return its path; the file is never half-written.

    Raises:
        CatalogError: the course's own files are wrong.
        OSError: the file cannot be written; the old one is untouched.
    """
    file = root / FILE
    text = render(load(root))
    handle, temporary = tempfile.mkstemp(dir=root, prefix=f".{FILE}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return file


def is_stale(root: Path) -> bool:
    """Whether SYLLABUS.md below `root` is missing or differs from what the catalogue says.

    Raises:
        CatalogError: the course's own files are wrong.
    """
    file = root / FILE
    return not file.is_file() or file.read_text(encoding="utf-8", errors="replace") != render(load(root))


def render(catalog: Catalog) -> str:
    """Return the text of SYLLABUS.md."""
    return "\n".join(_lines(catalog)) + "\n"


def _lines(catalog: Catalog) -> Iterator[str]:
    phases = [(phase, list(chapters)) for phase, chapters in groupby(catalog.chapters, key=lambda c: c.phase)]
    yield from ("<!-- Made from labs/*/chapter.toml by `topeka syllabus --write`; edit those files. -->", "")
    yield from ("# Syllabus", "")
    yield (
        f"{_count(len(phases), 'phase')}, {_count(len(catalog.chapters), 'chapter')}, "
        f"{_count(len(catalog.labs), 'lab')}, {_duration(catalog.labs)} of work. {_written(catalog.labs)}"
    )
    yield ""
    yield (
        "The stack is the environment a lab is written for; *also* names one where more of it can be verified. "
        "Labs for `cuda` and `multi-gpu` have a CPU tier: they can be learned on a laptop, and what needs the "
        "hardware is then reported as not verified."
    )
    for phase, chapters in phases:
        yield from ("", f"## {phase.capitalize()}")
        for chapter in chapters:
            yield from ("", f"### Chapter {chapter.number}: {chapter.title}", "")
            yield from (f"{_text(chapter.summary)} {_duration(chapter.labs, capital=True)}.", "")
            yield from _table(chapter)
            yield from ("", *_milestone(chapter))


def _table(chapter: Chapter) -> Iterator[str]:
    yield "| lab | title | what it is about | minutes | stack |"
    yield "|---|---|---|--:|---|"
    for lab in chapter.labs:
        name = lab.id if lab.planned else f"[{lab.id}](labs/{lab.path.parent.name}/{lab.folder}/)"
        title = _text(lab.title) + (" (planned)" if lab.planned else "")
        yield f"| {name} | {title} | {_text(lab.summary)} | {lab.minutes} | {_stack(lab)} |"


def _milestone(chapter: Chapter) -> Iterator[str]:
    claim = chapter.milestone
    lab = next(lab for lab in chapter.labs if lab.folder == claim.lab)
    bound = "at most" if claim.better == "lower" else "at least"
    ours = "our own solutions are to reach" if lab.planned else "our own solutions reach"
    unit = f" {_text(claim.unit)}"
    yield f"**Milestone** ({lab.id}): {_text(claim.claim)}."
    yield (
        f"Promised {bound} {_number(claim.promised)}{unit} / {ours} {bound} {_number(claim.ours)}{unit}: "
        f"{_text(claim.measure)}."
    )
    for note in claim.notes:
        yield f"Also: {_text(note)}."


def _stack(lab: Lab) -> str:
    if lab.stack != "cpu":
        return f"`{lab.stack}`, CPU tier"
    return ", *also* ".join(f"`{stack}`" for stack in ("cpu", *lab.also))


def _written(labs: Sequence[Lab]) -> str:
    planned = sum(lab.planned for lab in labs)
    if not planned:
        return "All labs are written."
    written = len(labs) - planned
    return f"{written} {_is(written)} written; the other {planned} {_is(planned)} planned."


def _duration(labs: Sequence[Lab], capital: bool = False) -> str:
    """Full hours: half an hour more or less is within the error of such estimates."""
    hours = _count(max(1, round(sum(lab.minutes for lab in labs) / 60)), "hour")
    return f"{'About' if capital else 'about'} {hours}"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _is(n: int) -> str:
    return "is" if n == 1 else "are"


def _number(value: float) -> str:
    """Such as 1e-5, 16, 1.6 or 20,000."""
    if 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.10g}"


def _text(text: str) -> str:
    """Text that is safe in a cell of a Markdown table."""
    return text.replace("|", r"\|").replace("<", "&lt;")
