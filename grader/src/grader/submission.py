"""Packs what a runner needs into a tar: a small checkout with the code under test as `src/`.

Tests, configuration and catalogue come from the course, always; of the learner's folder only
the lab's listed files are read.
"""

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

from grader.catalog import Catalog, Lab
from grader.errors import UsageError

MAX_FILE_BYTES = 1 << 20


class SubmissionError(UsageError):
    """The code under test cannot be taken; the message says why and what to do."""


def read_code(lab: Lab, folder: Path) -> dict[str, bytes]:
    """Read the lab's listed files from `folder`; a file that is not there is left out.

    Raises:
        SubmissionError: `folder` does not exist, or a file is too large or cannot be read.
    """
    if not folder.is_dir():
        raise SubmissionError(
            f"{folder} is no folder: --code takes src, solutions or a folder of source files"
        )
    code: dict[str, bytes] = {}
    for name in lab.files:
        file = folder / name
        if not file.exists():
            continue
        try:
            if not file.is_file():
                raise SubmissionError(f"{file} is not a regular file")
            if file.stat().st_size > MAX_FILE_BYTES:
                raise SubmissionError(
                    f"{file} has {file.stat().st_size:,} bytes; a source file may have {MAX_FILE_BYTES:,}"
                )
            code[name] = file.read_bytes()
        except OSError as error:
            raise SubmissionError(f"{file} cannot be read: {error.strerror}") from error
    return code


def code_folder(lab: Lab, code: str) -> Path:
    """Return the folder that `--code` means for `lab`.

    Args:
        lab: the lab.
        code: `src`, `solutions`, or a folder that holds the lab's files or mirrors `labs/`.
    """
    if code in ("src", "solutions"):
        return lab.path / code
    folder = Path(code).expanduser()
    mirrored = folder / lab.path.parent.name / lab.path.name
    return (mirrored if mirrored.is_dir() else folder).resolve()


def pack(
    catalog: Catalog, lab: Lab, code: Mapping[str, bytes], data: Mapping[str, bytes] | None = None
) -> bytes:
    """Return the tar of one job.

    Args:
        catalog: the course, for the labs this one uses.
        lab: the lab to run.
        code: its source files by name.
        data: files for the folder that TOPEKA_DATA names in the job, by name.
    """
    buffer = io.BytesIO()
    root = catalog.root
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for file in (root / "pyproject.toml", root / "conftest.py", lab.path.parent / "chapter.toml"):
            _add(tar, str(file.relative_to(root)), file.read_bytes())
        folders = [lab.path / "tests"]
        for other in catalog.select(lab.uses) if lab.uses else ():
            folders.append(other.path / "solutions")
            if other.path.parent != lab.path.parent:
                chapter_file = other.path.parent / "chapter.toml"
                _add(tar, str(chapter_file.relative_to(root)), chapter_file.read_bytes())
        for folder in folders:
            for file in sorted(folder.rglob("*")):
                if file.is_file() and "__pycache__" not in file.parts:
                    _add(tar, str(file.relative_to(root)), file.read_bytes())
        source = (lab.path / "src").relative_to(root)
        for name, content in sorted(code.items()):
            _add(tar, str(source / name), content)
        for name, content in (data or {}).items():
            _add(tar, f"data/{name}", content)
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), 0o644
    tar.addfile(entry, io.BytesIO(content))
