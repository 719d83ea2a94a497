"""Keeps a process to the files it needs, by the kernel's Landlock (Linux 5.13); no rights are needed for it."""

import ctypes
import os
import struct
import sys
from collections.abc import Iterable
from pathlib import Path

# Numbers of all architectures.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION, _PATH_BENEATH = 1, 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14
_READ = _EXECUTE | _READ_FILE | _READ_DIR
# How many kinds of access each version of the interface knows, from the first.
_KINDS = (13, 14, 15, 15, 16)
_ALL_TCP, _ALL_SCOPES = 3, 3


def version() -> int:
    """Return the version of the kernel's interface; 0 if there is none."""
    if sys.platform != "linux":
        return 0
    return max(_syscall(_CREATE_RULESET, None, 0, _VERSION, check=False), 0)


def restrict(read: Iterable[Path], write: Iterable[Path]) -> None:
    """Take from this process, for good, all access to files but what is below the given paths.

    Where the kernel knows how, TCP, abstract sockets of others and signals to others go as well.

    Args:
        read: to read, list and execute.
        write: to do anything with.

    Raises:
        OSError: the kernel refused.
    """
    known = version()
    handled = (1 << _KINDS[min(known, len(_KINDS)) - 1]) - 1
    attributes = struct.pack("QQQ", handled, _ALL_TCP if known >= 4 else 0, _ALL_SCOPES if known >= 6 else 0)
    size = 24 if known >= 6 else 16 if known >= 4 else 8
    rules = _syscall(_CREATE_RULESET, attributes, size, 0)
    try:
        for paths, wanted in ((read, _READ), (write, handled)):
            for path in paths:
                if path.exists():
                    of_files = _EXECUTE | _WRITE_FILE | _READ_FILE | (_TRUNCATE if known >= 3 else 0)
                    _allow(rules, path, wanted if path.is_dir() else wanted & of_files)
        _syscall(_RESTRICT_SELF, rules, 0)
    finally:
        os.close(rules)


def _allow(rules: int, path: Path, access: int) -> None:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        _syscall(_ADD_RULE, rules, _PATH_BENEATH, struct.pack("=Qi", access, descriptor), 0)
    finally:
        os.close(descriptor)


def _syscall(number: int, *arguments: int | bytes | None, check: bool = True) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = int(libc.syscall(ctypes.c_long(number), *wide))
    if result < 0 and check:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
