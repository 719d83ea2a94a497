"""Where a lab is in the checkout, and which files a learner writes in it.

This is the little that tests need to know. The full catalogue, with titles and
milestones, is `grader.catalog`.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LabFolder:
    """One lab on disk.

    Attributes:
        id: such as `ch01/lab01`.
        path: the lab's folder, absolute.
        files: the names of the files a learner writes, relative to `src/`.
    """

    id: str
    path: Path
    files: tuple[str, ...]

    @property
    def module_files(self) -> dict[str, str]:
        """The Python files among them, by the name that tests import."""
        return {Path(name).stem: name for name in self.files if name.endswith(".py")}

    @property
    def module_names(self) -> tuple[str, ...]:
        """The names by which tests import those files."""
        return tuple(self.module_files)


def find_lab(path: Path) -> LabFolder | None:
    """Return the lab that `path` (a file or folder in it) belongs to, or None outside every lab.

    Raises:
        ValueError: the chapter's `chapter.toml` cannot be read; the message names the file.
    """
    for folder in [path, *path.parents]:
        chapter_file = folder.parent / "chapter.toml"
        if folder.name.startswith("lab") and chapter_file.is_file():
            try:
                chapter = tomllib.loads(chapter_file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{chapter_file}: {error}") from error
            for lab in chapter.get("lab", []):
                if lab.get("folder") == folder.name:
                    chapter_number = folder.parent.name.split("_")[0]
                    lab_number = folder.name.split("_")[0]
                    return LabFolder(f"{chapter_number}/{lab_number}", folder, tuple(lab.get("files", ())))
    return None
