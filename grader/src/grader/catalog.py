"""The catalogue: every chapter and lab of the course, as the files in `labs/` list them."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from grader import chapter_file
from grader.chapter import Chapter, Lab, Milestone, Phase, Stack
from grader.chapter_file import CatalogError
from grader.errors import TopekaError
from grader.targets import UnknownTarget, select

__all__ = [
    "Catalog",
    "CatalogError",
    "Chapter",
    "CourseNotFound",
    "Lab",
    "Milestone",
    "Phase",
    "Stack",
    "UnknownTarget",
    "find_root",
    "load",
]

_CHAPTER_FOLDER = re.compile(r"ch\d\d(_[a-z0-9]+)+")


class CourseNotFound(TopekaError):
    """There is no course where one was looked for."""


class Catalog(BaseModel):
    """The course.

    Attributes:
        root: its folder, absolute.
        chapters: in order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    root: Path = Field(repr=False)
    chapters: tuple[Chapter, ...]

    @property
    def labs(self) -> tuple[Lab, ...]:
        """All labs, in the order of the course."""
        return tuple(lab for chapter in self.chapters for lab in chapter.labs)

    def select(self, targets: Sequence[str]) -> tuple[Lab, ...]:
        """Return the labs that `targets` name, in that order, each once.

        Args:
            targets: `ch01/lab01`, `1.1`, `ch01`, `1`, `CH=1`, a folder's name or path, or `all`.

        Raises:
            UnknownTarget: one names nothing; the message has what comes close and what is valid.
        """
        return select(self.root, self.chapters, targets)


def find_root(start: Path) -> Path:
    """Return the course's folder, absolute: `$TOPEKA_ROOT`, or the nearest at or above `start`.

    Raises:
        CourseNotFound: neither is a course.
    """
    if given := os.environ.get("TOPEKA_ROOT"):
        root = Path(given).expanduser().resolve()
        if not _is_course(root):
            raise CourseNotFound(
                f"TOPEKA_ROOT is {given}, which holds no course (pyproject.toml and labs/ with chapters): "
                "set it to the course's folder, or unset it"
            )
        return root
    start = start.resolve()
    for folder in (start, *start.parents):
        if _is_course(folder):
            return folder
    raise CourseNotFound(
        f"no course at or above {start} (a folder with pyproject.toml and labs/): change into the course's "
        "folder, or set TOPEKA_ROOT to it"
    )


def _is_course(folder: Path) -> bool:
    return (folder / "pyproject.toml").is_file() and any((folder / "labs").glob("*/chapter.toml"))


def load(root: Path) -> Catalog:
    """Read every `labs/*/chapter.toml` below `root`.

    Raises:
        CatalogError: a file is wrong, or files contradict each other or the disk.
        CourseNotFound: `root` holds no course.
    """
    root = root.resolve()
    if not _is_course(root):
        raise CourseNotFound(f"{root} holds no course: it needs pyproject.toml and labs/ with chapters")
    folders = [f for f in sorted((root / "labs").iterdir()) if _is_chapter_folder(f)]
    for number, folder in enumerate(folders, start=1):
        if folder.name[:4] != f"ch{number:02d}":
            raise CatalogError(
                f"labs/{folder.name}: found chapter number {int(folder.name[2:4])}; "
                f"allowed: {number}, chapters are numbered without gaps and each number once"
            )
    catalog = Catalog(root=root, chapters=tuple(chapter_file.read(folder) for folder in folders))
    if problems := list(_wrong_uses(catalog)):
        raise CatalogError("\n".join(problems))
    return catalog


def _is_chapter_folder(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    listed = (folder / "chapter.toml").is_file()
    if _CHAPTER_FOLDER.fullmatch(folder.name):
        if not listed and chapter_file.has_content(folder):
            raise CatalogError(f"labs/{folder.name}: found no chapter.toml; allowed: every chapter has one")
    elif listed:
        raise CatalogError(
            f'labs/{folder.name}: found "{folder.name}", which has a chapter.toml; '
            "allowed: ch, two digits and a name, such as ch01_attention"
        )
    return listed


def _wrong_uses(catalog: Catalog) -> Iterator[str]:
    """A lab may use labs before it, and a written lab only written ones."""
    earlier: dict[str, Lab] = {}
    for lab in catalog.labs:
        key = f"labs/{lab.path.parent.name}/chapter.toml: {lab.folder}.uses"
        for used in lab.uses:
            if used not in earlier:
                yield f'{key}: found "{used}"; allowed: ids of earlier labs'
            elif earlier[used].planned and not lab.planned:
                yield f'{key}: found "{used}", which is planned; allowed: labs that are written'
        earlier[lab.id] = lab
