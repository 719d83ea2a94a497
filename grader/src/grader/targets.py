"""Finds the labs that a learner names: `ch01/lab01`, `1.1`, `ch01`, `1`, a folder, or `all`."""

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from grader.chapter import Chapter, Lab
from grader.errors import UsageError

_NUMBER = re.compile(r"(?:ch=?)?0*(\d{1,2})", re.IGNORECASE)
_LAB_NUMBER = re.compile(r"(?:lab=?)?0*(\d{1,2})", re.IGNORECASE)


class UnknownTarget(UsageError):
    """A target that names no lab.

    Attributes:
        target: as it was given.
        matches: ids that come close, best first.
    """

    def __init__(self, target: str, matches: Sequence[str], chapters: Sequence[Chapter]) -> None:
        self.target = target
        self.matches = tuple(matches)
        first, last = chapters[0], chapters[-1]
        meant = f" Did you mean {', '.join(matches)}?" if matches else ""
        super().__init__(
            f"there is no lab or chapter {target!r}.{meant} Valid are a lab (such as {first.labs[0].id}), a chapter "
            f"({first.id} to {last.id}), a folder (such as labs/{first.path.name}/{first.labs[0].folder}) and all; "
            "`topeka list` shows every lab"
        )


def select(root: Path, chapters: Sequence[Chapter], targets: Sequence[str]) -> tuple[Lab, ...]:
    """Return the labs that `targets` name, in the order of the targets, each once.

    Args:
        root: the course's folder, absolute.
        chapters: all of them.
        targets: each names a lab, a chapter or everything, by id, number, folder name or path. A
            relative path starts from the current folder or from `root`.

    Raises:
        UnknownTarget: a target names nothing.
    """
    chosen: dict[str, Lab] = {}
    for target in targets:
        labs = _named(chapters, target.strip()) or _at(root, chapters, target.strip())
        if not labs:
            raise UnknownTarget(target, _close(chapters, target), chapters)
        chosen.update((lab.id, lab) for lab in labs)
    return tuple(chosen.values())


def _named(chapters: Sequence[Chapter], target: str) -> tuple[Lab, ...]:
    if target.lower() == "all":
        return tuple(lab for chapter in chapters for lab in chapter.labs)
    if whole := [lab for chapter in chapters for lab in chapter.labs if lab.folder == target]:
        return tuple(whole) if len(whole) == 1 else ()
    match re.split(r"[/.]", target.rstrip("/")):
        case [name]:
            return tuple(lab for c in chapters if _is_chapter(c, name) for lab in c.labs)
        case [name, below]:
            return tuple(
                lab for c in chapters if _is_chapter(c, name) for lab in c.labs if _is_lab(lab, below)
            )
    return ()


def _is_chapter(chapter: Chapter, name: str) -> bool:
    number = _NUMBER.fullmatch(name)
    return name == chapter.path.name or (number is not None and int(number[1]) == chapter.number)


def _is_lab(lab: Lab, name: str) -> bool:
    number = _LAB_NUMBER.fullmatch(name)
    return name == lab.folder or (number is not None and int(number[1]) == int(lab.folder[3:5]))


def _at(root: Path, chapters: Sequence[Chapter], target: str) -> tuple[Lab, ...]:
    """Return the labs in the folder `target`, or the lab that the file `target` belongs to."""
    for path in _paths(root, target):
        if path in (root, root / "labs"):
            return _named(chapters, "all")
        for chapter in chapters:
            if path == chapter.path:
                return chapter.labs
            for lab in chapter.labs:
                if path == lab.path or (lab.path in path.parents and path.exists()):
                    return (lab,)
    return ()


def _paths(root: Path, target: str) -> Iterator[Path]:
    if target and "\0" not in target:
        for start in (Path.cwd(), root):
            yield (start / target).resolve()


def _close(chapters: Sequence[Chapter], target: str) -> list[str]:
    """Return the ids that come close: the labs of the chapter `target` begins with, or look-alikes."""
    wanted = target.lower().strip("/ ").removeprefix("labs/")
    first = re.split(r"[/.]", wanted)[0]
    if chapter := next((c for c in chapters if _is_chapter(c, first)), None):
        return [lab.id for lab in chapter.labs]
    ids: dict[str, str] = {}
    for chapter in chapters:
        for lab in chapter.labs:
            ids |= {lab.id: lab.id, lab.folder: lab.id}
            ids.setdefault(lab.folder[6:], lab.id)
        ids |= {chapter.id: chapter.id, chapter.path.name: chapter.id, chapter.path.name[5:]: chapter.id}
    return list(dict.fromkeys(ids[name] for name in difflib.get_close_matches(wanted, ids)))
