"""Makes a test fail when the code under test takes a shortcut the lab forbids.

PyTorch functions are intercepted below their names, by a `TorchFunctionMode`, so an
alias taken at import time, a tensor method, or `torch.ops.aten` is seen as well.
Classes and other Python callables are replaced where they can be reached. A call counts
only if a frame of the code under test is on the stack: a test may use the same function
as its oracle.
"""

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from shared.code_under_test import CodeUnderTest


class Forbidden:
    """Watches for banned calls until `close`."""

    def __init__(self, code: CodeUnderTest) -> None:
        self._code = code
        self._undo: list[Callable[[], None]] = []
        self.violations: list[str] = []

    def __call__(self, *targets: str | type | Callable[..., Any], why: str = "") -> None:
        """Ban `targets` for the rest of the test.

        Args:
            targets: for PyTorch functions a name or a pattern with `*`, such as
                `"scaled_dot_product_attention"` or `"*scaled_dot_product*"`, or the function
                itself (private variants `_name...` are then banned too); for anything else
                the class or function.
            why: what to do instead; ends the message of the failure.
        """
        patterns: list[str] = []
        for target in targets:
            if isinstance(target, str):
                patterns.append(target)
            elif inspect.isclass(target):
                self._ban_class(target, why)
            elif _is_torch_function(target):
                patterns += [target.__name__, f"_{target.__name__}*"]
            else:
                self._ban_callable(target, why)
        if patterns:
            mode = _TorchCalls(patterns, lambda name: self._called(name, why))
            stack = contextlib.ExitStack()
            stack.enter_context(mode)
            self._undo.append(stack.close)

    def close(self) -> None:
        """Put everything back, in reverse order."""
        while self._undo:
            self._undo.pop()()

    def _called(self, name: str, why: str) -> None:
        frame = sys._getframe(1)
        while frame is not None:
            if self._code.owns(frame.f_code.co_filename):
                message = f"{name} is forbidden in this lab" + (f": {why}" if why else "")
                self.violations.append(message)
                # pytest's Failed is no Exception, so `except Exception` does not swallow it;
                # and the plugin looks at `violations` after the test in any case.
                pytest.fail(message, pytrace=False)
            frame = frame.f_back  # type: ignore[assignment]

    def _ban_class(self, cls: type, why: str) -> None:
        for name in {"__init__", "forward", "__call__"} & set(vars(cls)):
            self._replace(cls, name, self._guarded(vars(cls)[name], cls.__name__, why))

    def _ban_callable(self, function: Callable[..., Any], why: str) -> None:
        guarded = self._guarded(function, getattr(function, "__qualname__", repr(function)), why)
        owners: Iterable[Any] = [m for m in list(sys.modules.values()) if m is not None]
        for owner in owners:
            for name, value in list(getattr(owner, "__dict__", {}).items()):
                if value is function:
                    self._replace(owner, name, guarded)

    def _guarded(self, function: Callable[..., Any], name: str, why: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def guard(*args: Any, **kwargs: Any) -> Any:
            self._called(name, why)
            return function(*args, **kwargs)

        return guard

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        original = vars(owner)[name]
        setattr(owner, name, value)
        self._undo.append(lambda: setattr(owner, name, original))


class _TorchCalls(TorchFunctionMode):
    def __init__(self, patterns: list[str], called: Callable[[str], None]) -> None:
        super().__init__()
        self._patterns = patterns
        self._called = called

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # `aten.softmax.int` is named "softmax.int": the overload is no part of the name.
        name = getattr(func, "__name__", "").split(".")[0]
        if any(fnmatchcase(name, pattern) for pattern in self._patterns):
            self._called(name)
        return func(*args, **(kwargs or {}))


def _is_torch_function(target: Any) -> bool:
    module = str(getattr(target, "__module__", None) or type(target).__module__)
    owner = getattr(target, "__objclass__", None)
    return module.startswith("torch") or (owner is not None and issubclass(owner, torch._C.TensorBase))
