"""Imports the code under test, and nothing else, under the names the tests use.

Every lab may have an `attention.py`. While a lab's tests are imported or run, its
files, and only its files, answer to their names; between labs they are taken out of
`sys.modules` again. So one pytest run can hold all labs, and a namesake elsewhere on
`sys.path` is never picked up.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, ModuleType

from shared.course import LabFolder


class CannotImport(ImportError):
    """The code under test could not be imported; the message is written for the learner."""


def locate_code(lab: LabFolder, code: str, invocation_dir: Path) -> Path:
    """Return the folder that holds the code under test of `lab`.

    Args:
        lab: the lab whose tests run.
        code: the value of `--code`: `src`, `solutions`, or a folder. A folder holds the
            lab's files directly, or mirrors `labs/` (`FOLDER/ch01_attention/lab01_dot_product/`).
        invocation_dir: what a relative folder is relative to.
    """
    if code in ("src", "solutions"):
        return lab.path / code
    folder = invocation_dir / Path(code).expanduser()
    mirrored = folder / lab.path.parent.name / lab.path.name
    return (mirrored if mirrored.is_dir() else folder).resolve()


class _SourceLoader(importlib.machinery.SourceFileLoader):
    """Loads from source always.

    A `.pyc` is matched by size and by mtime in whole seconds, so an edit that changes
    `+` to `-` right after a run would otherwise test the old code.
    """

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)

    def exec_module(self, module: ModuleType) -> None:
        try:
            super().exec_module(module)
        except CannotImport:
            raise
        except Exception as error:
            raise CannotImport(explain(error, Path(self.path).parent)) from error


class CodeUnderTest(importlib.abc.MetaPathFinder):
    """The files of one lab as importable modules, switched on and off as a whole."""

    def __init__(self, lab: LabFolder, folder: Path) -> None:
        self.lab = lab
        self.folder = folder
        self._modules: dict[str, ModuleType] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the spec of one of the lab's files; None for every other module."""
        if name not in self.lab.module_names:
            return None
        file = self.folder / f"{name}.py"
        if not file.is_file():
            raise CannotImport(
                f"{relative(file)} is missing. `topeka reset {self.lab.id}` brings back the file as shipped."
            )
        return importlib.util.spec_from_file_location(name, file, loader=_SourceLoader(name, str(file)))

    @contextmanager
    def active(self) -> Iterator[None]:
        """While this context is open, the lab's module names mean the code under test."""
        names = self.lab.module_names
        outside = {name: sys.modules.pop(name) for name in names if name in sys.modules}
        sys.modules.update(self._modules)
        sys.meta_path.insert(0, self)
        try:
            yield
        finally:
            sys.meta_path.remove(self)
            self._modules = {name: sys.modules.pop(name) for name in names if name in sys.modules}
            sys.modules.update(outside)

    def strangers(self) -> list[str]:
        """Return a sentence for each of the lab's modules that came from anywhere but `folder`."""
        found = []
        for name, module in self._modules.items():
            file = getattr(module, "__file__", None)
            if file is None or Path(file).resolve().parent != self.folder.resolve():
                found.append(f"`{name}` was imported from {file}, not from {relative(self.folder)}")
        return found

    def owns(self, filename: str) -> bool:
        """Whether `filename` (of a stack frame, say) is one of the files under test."""
        return filename.startswith(str(self.folder) + os.sep)


def relative(path: Path) -> str:
    """Return `path` as seen from the current folder if it is below it, else unchanged."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def explain(error: BaseException, folder: Path) -> str:
    """Say what went wrong in the files in `folder`, without the frames of anybody else.

    A syntax error shows file, line and caret. Any other error shows the learner's own
    frames and the error.
    """
    lines: list[str] = []
    if not isinstance(error, SyntaxError):
        own = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).parent == folder]
        lines += [f'  File "{relative(Path(f.filename))}", line {f.lineno}\n    {f.line}' for f in own]
    elif error.filename:
        error.filename = relative(Path(error.filename))
    lines.append("".join(traceback.format_exception_only(error)).rstrip())
    return "\n".join(lines)
