"""Sees, through Python's audit events, what code under test does that no right solution needs.

The hook is called before the act and cannot be removed, so the finding is with the parent before the code can do
anything about it. Whose act it was is read from the stack: the nearest frame, apart from the standard library's
helpers, belongs to the code under test. Code it makes at run time (exec, function and code objects) is its own too.
"""

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path, PosixPath
from types import CodeType, FrameType, FunctionType
from typing import Any

_ACTS = {
    "sys._getframe": "looks at the frames of its callers",
    "sys._current_frames": "looks at the frames of all threads",
    "sys.settrace": "installs a trace function",
    "sys.setprofile": "installs a profile function",
    "sys.monitoring.register_callback": "installs a monitoring callback",
    "sys.addaudithook": "installs an audit hook",
    "gc.get_objects": "searches the objects of the process",
    "gc.get_referrers": "searches the objects of the process",
    "gc.get_referents": "searches the objects of the process",
    "code.__new__": "makes or changes code objects",
    "ctypes.dlopen": "calls C functions by ctypes",
    "ctypes.dlsym": "calls C functions by ctypes",
    "ctypes.cdata": "reads or writes memory by ctypes",
    "ctypes.string_at": "reads or writes memory by ctypes",
    "ctypes.call_function": "calls C functions by ctypes",
}
_FRAMES = {"tb_frame", "gi_frame", "cr_frame", "ag_frame"}
_INSIDE_FUNCTIONS = {"__code__", "__defaults__", "__kwdefaults__"}
# Frames of these modules act for whoever called them.
_HELPERS = {"inspect", "gc", "ctypes", "threading", "pathlib", "os", "io", "glob", "shutil", "codecs", "ntpath",
            "posixpath", "fnmatch", "zipimport", "runpy", "functools", "operator", "contextlib"}  # fmt: skip
# What draws a traceback opens source files, of the tests as well.
_DRAWING = {"linecache", "traceback", "tokenize", "warnings", "logging"}


class Owner:
    """Says of frames whether they run code under test.

    Args:
        folder: of the code under test; absolute.
        scratch: where it may write, and import what it wrote.
    """

    def __init__(self, folder: Path, scratch: Path) -> None:
        self._prefixes = (f"{folder}/", f"{scratch}/")
        self._made: dict[int, CodeType] = {}  # the value keeps the key's object alive

    def owns(self, frame: FrameType) -> bool:
        """Whether `frame` runs code under test."""
        code = frame.f_code
        return code.co_filename.startswith(self._prefixes) or id(code) in self._made

    def takes_part(self, frame: FrameType | None) -> bool:
        """Whether code under test is anywhere on the stack from `frame` outwards."""
        while frame is not None:
            if self.owns(frame):
                return True
            frame = frame.f_back
        return False

    def acts(self, frame: FrameType | None) -> bool:
        """Whether `frame`, or who it acts for, is code under test."""
        while frame is not None:
            if self.owns(frame):
                return True
            if frame.f_globals.get("__name__") not in _HELPERS:
                return False
            frame = frame.f_back
        return False

    def add(self, code: CodeType) -> None:
        """Count `code` and what is defined in it as code under test."""
        self._made[id(code)] = code
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                self.add(constant)


def watch(
    owner: Owner, tests: Path, is_protected: Callable[[FunctionType], bool], found: Callable[[str], None]
) -> None:
    """Install the hook, for the rest of this process.

    Args:
        owner: knows the code under test.
        tests: the folder of the tests.
        is_protected: whether the insides of this function are none of the code's business.
        found: called with each finding, a sentence without its subject.
    """
    tests_prefix = f"{tests}/"
    secret_prefixes = ("/proc/self/", "/proc/thread-self/", "/proc/1/", f"/proc/{os.getpid()}/", "/dev/fd")
    getframe, fspath, ident = sys._getframe, _path, threading.get_ident
    busy: set[int] = set()

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "object.__getattr__":
            if arguments[1] in _FRAMES and owner.acts(getframe(2)):
                found("looks at the frames of its callers")
        elif event == "object.__setattr__":
            target, name = arguments[:2]
            if name in _INSIDE_FUNCTIONS and isinstance(target, FunctionType):  # noqa: SIM102
                if owner.takes_part(getframe(2)) and is_protected(target):
                    found(f"changed {name} of {target.__module__}.{target.__qualname__}")
        elif event in _ACTS:
            if owner.acts(getframe(2)):
                found(_ACTS[event])
        elif event in ("exec", "function.__new__"):
            if isinstance(arguments[0], CodeType) and owner.acts(getframe(2)):
                owner.add(arguments[0])
        elif event in ("open", "os.listdir", "os.scandir"):
            path = fspath(arguments[0])
            if path.startswith(secret_prefixes) or path in ("/proc/self", "/proc"):
                if owner.acts(getframe(2)):
                    found("reads about this process in /proc")
            elif path.startswith(tests_prefix) and owner.takes_part(getframe(2)):
                frame = getframe(2)
                while frame is not None and not owner.owns(frame):
                    if frame.f_globals.get("__name__") in _DRAWING:
                        return
                    frame = frame.f_back  # type: ignore[assignment]
                found("reads the lab's tests")

    watched = {*_ACTS, "object.__getattr__", "object.__setattr__", "exec", "function.__new__", "open"}
    watched |= {"os.listdir", "os.scandir"}

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in watched:
            return
        me = ident()
        if me in busy:  # what the hook itself does is audited too
            return
        busy.add(me)
        try:
            look(event, arguments)  # an error here, such as too deep a recursion, prevents the act
        finally:
            busy.discard(me)

    sys.addaudithook(hook)


def _path(value: object) -> str:
    # Exact classes only: a class of the code under test has no say in here.
    if type(value) is bytes:
        return value.decode(errors="replace")
    return value if type(value) is str else str(value) if type(value) is PosixPath else ""
