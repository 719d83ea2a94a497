"""Reads one `chapter.toml` and compares it with the disk; every problem becomes one precise line."""

import difflib
import json
import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from grader.chapter import Chapter, Lab, Milestone
from grader.errors import TopekaError


class CatalogError(TopekaError):
    """The course's own files are wrong or contradict themselves; one line for each problem."""


def read(folder: Path) -> Chapter:
    """Read `folder/chapter.toml`.

    Raises:
        CatalogError: it is no TOML, a key is missing, unknown or wrong, or the disk has other labs.
    """
    document = _parse(folder / "chapter.toml", _name(folder))
    try:
        chapter = Chapter.model_validate(_completed(document, folder))
    except ValidationError as error:
        raise _error(
            folder, [_explain(e, document) for e in error.errors() if _stands(e, document)]
        ) from error
    if problems := [*_contradictions(chapter), *_missing_on_disk(chapter)]:
        raise _error(folder, problems)
    return chapter


def has_content(folder: Path) -> bool:
    """Whether `folder` holds a file other than what tools leave behind when a folder is deleted."""
    return any(
        file.is_file()
        and not any(part == "__pycache__" or part[0] == "." for part in file.parts[len(folder.parts) :])
        for file in folder.rglob("*")
    )


def _name(folder: Path) -> str:
    return f"{folder.parent.name}/{folder.name}/chapter.toml"


def _error(folder: Path, problems: list[str]) -> CatalogError:
    return CatalogError("\n".join(f"{_name(folder)}: {problem}" for problem in problems))


# --- TOML ----------------------------------------------------------------------------------


def _parse(file: Path, name: str) -> dict[str, Any]:
    content = file.read_bytes()
    try:
        return tomllib.loads(content.decode())
    except UnicodeDecodeError as error:
        before = content[: error.start].split(b"\n")
        place, reason = (len(before), len(before[-1].decode()) + 1), "this is not UTF-8"
        raise CatalogError(f"{name}:{place[0]}:{place[1]}: {reason}") from error
    except tomllib.TOMLDecodeError as error:
        lines = content.decode().splitlines() or [""]
        reason, _, where = str(error).rpartition(" (at ")
        at = re.match(r"line (\d+), column (\d+)", where)  # else "end of document"
        line, column = (at[1], at[2]) if at else (len(lines), len(lines[-1]) + 1)
        raise CatalogError(f"{name}:{line}:{column}: {reason}") from error


# --- keys and values -----------------------------------------------------------------------


def _completed(document: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Add where everything is, and to each lab what it inherits from its chapter."""
    completed = {"path": folder, **document}
    if isinstance(tables := document.get("lab"), list):
        completed["lab"] = [_completed_lab(t, document, folder) for t in tables]
    return completed


def _completed_lab(table: Any, document: dict[str, Any], folder: Path) -> Any:
    if not isinstance(table, dict):
        return table
    inherited: dict[str, Any] = {
        "path": folder / str(table.get("folder")),
        "stack": document.get("stack"),
        "also": [],
    }
    if "stack" not in table:
        inherited["also"] = document.get("also", [])
    return {**inherited, **table}


def _stands(error: ErrorDetails, document: dict[str, Any]) -> bool:
    """Whether the error is the file's own: no lab inherited the value, no wrong entry made a list short."""
    if error["type"] == "too_short" and error["input"]:
        return False
    match error["loc"]:
        case ("lab", int(index), "stack" | "also" as key, *_):
            return key in document["lab"][index]
    return True


def _explain(error: ErrorDetails, document: dict[str, Any]) -> str:
    table, keys, prefix = _place(error["loc"], document)
    key = prefix + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in keys)
    key = key.removeprefix(".")
    fields = {field.alias or name: field.description for name, field in table.model_fields.items()}
    if error["type"] == "extra_forbidden":
        likely = difflib.get_close_matches(str(keys[0]), fields, n=1)
        meant = f"; did you mean {likely[0]}?" if likely else ""
        return (
            f"{key}: found a key of no meaning{meant}; allowed: {', '.join(k for k in fields if k != 'path')}"
        )
    allowed = fields[str(keys[0])] if keys else "a table of keys and values"
    if error["type"] == "missing":
        return f"{key}: missing; allowed: {allowed}"
    found = json.dumps(error["input"], ensure_ascii=False, default=str)
    found = found if len(found) <= 80 else f"{found[:77]}..."
    reason = f", {error['ctx']['error']}" if error["type"] == "value_error" else ""
    return f"{key}: found {found}{reason}; allowed: {allowed}"


def _place(
    loc: tuple[int | str, ...], document: dict[str, Any]
) -> tuple[type[BaseModel], tuple[int | str, ...], str]:
    """Return the table that `loc` is in, the keys below it, and what messages call the table."""
    match loc:
        case ("milestone", _, *_):
            return Milestone, loc[1:], "milestone"
        case ("lab", int(index), *_):
            lab = document["lab"][index]
            folder = lab.get("folder") if isinstance(lab, dict) else None
            return Lab, loc[2:], folder if isinstance(folder, str) else f"lab[{index}]"
    return Chapter, loc, ""


# --- between keys, and on disk -------------------------------------------------------------


def _contradictions(chapter: Chapter) -> Iterator[str]:
    folders = [lab.folder for lab in chapter.labs]
    twice = [folder for folder, n in Counter(folders).items() if n > 1]
    for folder in twice:
        yield f"{folder}.folder: found {folders.count(folder)} times; allowed: once"
    for number, folder in enumerate(folders, start=1):
        if not twice and folder[:5] != f"lab{number:02d}":
            yield f"{folder}.folder: found lab number {int(folder[3:5])}; allowed: {number}, without gaps, in order"
            break
    for lab in chapter.labs:
        for name, n in Counter(lab.files).items():
            if n > 1:
                yield f"{lab.folder}.files: found {json.dumps(name)} {n} times; allowed: once"
    claim = chapter.milestone
    if claim.lab not in folders:
        yield f"milestone.lab: found {json.dumps(claim.lab)}; allowed: {', '.join(folders)}"
    if claim.ours > claim.promised if claim.better == "lower" else claim.ours < claim.promised:
        bound = "at most" if claim.better == "lower" else "at least"
        yield f"milestone.ours: found {claim.ours:g}; allowed: {bound} what is promised, {claim.promised:g}"


def _missing_on_disk(chapter: Chapter) -> Iterator[str]:
    for lab in chapter.labs:
        if lab.planned:
            continue
        if not lab.path.is_dir():
            yield f"{lab.folder}.folder: found no such folder; allowed: an existing one, or planned = true"
            continue
        for name in lab.files:
            if not (lab.path / "solutions" / name).is_file():
                found = f"{json.dumps(name)}, which is not in solutions/"
                yield f"{lab.folder}.files: found {found}; allowed: files that are, or planned = true"


def unlisted_labs(chapter: Chapter) -> list[str]:
    """Return the lab folders on disk that the chapter does not list.

    No error when the course is loaded: a learner may keep a copy of a lab beside it.
    """
    listed = {lab.folder for lab in chapter.labs}
    folders = sorted(chapter.path.glob("lab*"))
    return [f.name for f in folders if f.is_dir() and f.name not in listed and has_content(f)]
