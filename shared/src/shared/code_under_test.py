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
from types import CodeType, FrameType, ModuleType

from shared.course import LabFolder

# Of a deep recursion, the first and the last frames tell the story.
_FIRST_FRAMES, _LAST_FRAMES = 3, 5


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
    """Loads from source always, and notes which module it made.

    A `.pyc` is matched by size and by mtime in whole seconds, so an edit that changes
    `+` to `-` right after a run would otherwise test the old code.
    """

    def __init__(self, name: str, path: Path, loaded: dict[str, ModuleType]) -> None:
        super().__init__(name, str(path))
        self._loaded = loaded

    def get_code(self, fullname: str) -> CodeType:
        try:
            return self.source_to_code(self.get_data(self.path), self.path)
        except ValueError as error:  # how Python before 3.11.4 refuses a null byte
            raise SyntaxError(str(error), (self.path, 1, None, None)) from error

    def exec_module(self, module: ModuleType) -> None:
        __tracebackhide__ = True
        try:
            super().exec_module(module)
        except (CannotImport, KeyboardInterrupt):
            raise
        except BaseException as error:  # exit() and pytest.skip() in a learner's file are errors too
            file = Path(self.path)
            message = explain(error, file.parent)
            if file.name not in message:  # such as a null byte, which Python reports without its file
                message = f"{relative(file)}: {message}"
            raise CannotImport(message, name=self.name) from error
        self._loaded[self.name] = module


class CodeUnderTest(importlib.abc.MetaPathFinder):
    """The files of one lab as importable modules, switched on and off as a whole.

    Attributes:
        elsewhere: whether another process runs them.
    """

    elsewhere = False

    def __init__(self, lab: LabFolder, folder: Path) -> None:
        self.lab = lab
        self.folder = folder
        self._files = {name: folder / file for name, file in lab.module_files.items()}
        self._loaded: dict[str, ModuleType] = {}

    @property
    def modules(self) -> dict[str, ModuleType]:
        """The modules that were made from the files, by name."""
        return dict(self._loaded)

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the spec of one of the lab's files; None for every other module."""
        file = self._files.get(name)
        if file is None:
            if path is None and (self.folder / f"{name}.py").is_file():
                self._refuse_unlisted(name)
            return None
        if not file.is_file():
            advice = ""
            if self.folder == self.lab.path / "src":
                advice = f" `topeka reset {self.lab.id}` brings back the file as shipped."
            raise CannotImport(f"{relative(file)} is missing.{advice}", name=name)
        return importlib.util.spec_from_file_location(
            name, file, loader=_SourceLoader(name, file, self._loaded)
        )

    def _refuse_unlisted(self, name: str) -> None:
        """Raise if `name` can only mean a file beside the lab's files that is none of them."""
        others = (finder.find_spec(name, None) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in others if spec is not None), None)
        file = self.folder / f"{name}.py"
        if spec is None or (spec.origin is not None and Path(spec.origin).resolve() == file.resolve()):
            listed = ", ".join(self.lab.files)
            raise ModuleNotFoundError(
                f"{relative(file)} is not one of the files of {self.lab.id} ({listed}). Only those are "
                f"tested and graded: move what you need from {file.name} into one of them.",
                name=name,
            )

    @contextmanager
    def active(self) -> Iterator[None]:
        """While this context is open, the lab's module names mean the code under test."""
        names = self.lab.module_names
        outside = {name: sys.modules.pop(name) for name in names if name in sys.modules}
        sys.modules.update(self._loaded)
        sys.meta_path.insert(0, self)
        try:
            yield
        finally:
            sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
            for name in names:
                sys.modules.pop(name, None)
            sys.modules.update(outside)

    def strangers(self) -> list[str]:
        """Return a sentence for each of the lab's names that now means anything but its file.

        Ask while the context `active` is open. A module is known by its identity: what it
        says about itself (`__file__`) it could have written itself.
        """
        found = []
        for name, file in self._files.items():
            module, ours = sys.modules.get(name), self._loaded.get(name)
            if module is not ours:
                origin = getattr(module, "__file__", None) if isinstance(module, ModuleType) else None
                what = (
                    "was taken out of sys.modules"
                    if module is None
                    else f"is the module {origin}"
                    if isinstance(origin, str)
                    else f"is an object of class {type(module).__name__}"
                )
                found.append(
                    f"the tests did not run against {relative(file)}: `{name}` {what}. "
                    "Does the code change sys.modules?"
                )
        return found

    def owns(self, filename: str) -> bool:
        """Whether `filename` (of a stack frame, say) is one of the files under test."""
        return filename.startswith(str(self.folder) + os.sep)

    def owns_frame(self, frame: FrameType) -> bool:
        """Whether `frame` runs code of the files under test, or code they made with exec or eval."""
        return self.owns(frame.f_code.co_filename) or any(
            frame.f_globals is vars(module) for module in self._loaded.values()
        )

    def took_part_in(self, error: BaseException) -> bool:
        """Whether `error` passed through the files under test."""
        return any(self.owns_frame(frame) for frame, _ in traceback.walk_tb(error.__traceback__))


def relative(path: Path) -> str:
    """Return `path` as seen from the current folder if it is below it, else unchanged."""
    try:
        return str(path.relative_to(Path.cwd()))
    except (ValueError, OSError):  # OSError: the current folder is gone
        return str(path)


def explain(error: BaseException, folder: Path) -> str:
    """Say what went wrong in the files in `folder`, without the frames of anybody else.

    Shows the frames in those files and the error; a syntax error brings file, line and caret.
    """
    own = [f for f in traceback.extract_tb(error.__traceback__) if folder in Path(f.filename).parents]
    lines = [
        f'  File "{relative(Path(f.filename))}", line {f.lineno}' + (f"\n    {f.line}" if f.line else "")
        for f in own
    ]
    if (left_out := len(lines) - _FIRST_FRAMES - _LAST_FRAMES) > 0:
        lines[_FIRST_FRAMES:-_LAST_FRAMES] = [f"  ... {left_out} more calls ..."]
    if isinstance(error, SyntaxError) and isinstance(error.filename, str):
        error.filename = relative(Path(error.filename))
    lines.append("".join(traceback.format_exception_only(error)).rstrip())
    return "\n".join(lines)
