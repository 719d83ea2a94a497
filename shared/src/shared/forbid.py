"""Makes a test fail when the code under test takes a shortcut the lab forbids.

PyTorch functions are intercepted below their names, by a `TorchFunctionMode`, so an
alias taken at import time, a tensor method, or `torch.ops.aten` is seen as well, and so is
a call inside another PyTorch function or a backward pass. Python functions are exchanged
inside the function object, which every alias shares; classes get guarded methods; other
callables, such as NumPy's, are replaced where they can be reached.

A call counts if, from the call outwards, code under test is met before a test: a test may
use the same function as its oracle, also in a callback. So does an object of a class
that the code under test derived from a banned class, and a banned function or class that
tests import from the code under test. Not seen: calls in threads the code starts, and
in compiled code (`torch.jit`, `torch.compile`).
"""

import ast
import contextlib
import functools
import inspect
import os
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    _pop_mode,
    _push_mode,
)

from shared.code_under_test import CodeUnderTest

_Setter = Callable[[Any], None]

# Private relatives whose names do not begin with the function's own name.
_RELATIVES = {
    "scaled_dot_product_attention": (
        "_scaled_dot_product_*",
        "_flash_attention_forward",
        "_efficient_attention_forward",
        "_native_multi_head_attention",
    )
}


class Forbidden:
    """Watches for banned calls until `close`.

    Args:
        code: whose calls count.
        tests: the test module, to see what it imports from the code under test.
        taken: in place of `tests`, (module, name) of what it imports.
    """

    def __init__(
        self,
        code: CodeUnderTest,
        tests: types.ModuleType | None = None,
        taken: Sequence[tuple[str, str]] | None = None,
    ) -> None:
        self._code = code
        self._tests_folder = str(code.lab.path / "tests") + os.sep
        modules = code.modules
        if taken is None:
            taken = taken_names(tests) if tests is not None else ()
        self._exports = {f: vars(modules[m]).get(f) for m, f in taken if m in modules}
        self._undo = contextlib.ExitStack()
        self._torch_calls: _TorchCalls | None = None
        self.violations: list[str] = []

    def __call__(self, *targets: str | type | Callable[..., Any], why: str = "") -> None:
        """Ban `targets` for the rest of the test.

        Args:
            targets: for PyTorch functions a name or a pattern with `*`, such as
                `"scaled_dot_product_attention"` or `"*scaled_dot_product*"`, or the function
                itself (`_name...`, `name_` and `special_name` are then banned too); for
                anything else the class or function.
            why: what to do instead; ends the message of the failure.

        Raises:
            ValueError: a target cannot be intercepted.
        """
        for target in targets:
            if isinstance(target, str):
                self._ban_torch_names((target,), why)
                continue
            self._refuse_exports(_same_or_instance_of(target), why)
            if inspect.isclass(target):
                self._ban_class(target, why)
                continue
            if is_torch := _is_torch_function(target):
                name = _name(target)
                relatives = _RELATIVES.get(name, ())
                self._ban_torch_names((name, f"_{name}*", f"{name}_", f"special_{name}", *relatives), why)
            if isinstance(target, types.FunctionType):
                # Not every Python function in torch goes through `__torch_function__`.
                self._ban_function(target, why)
            elif not is_torch:
                self._ban_object(target, why)

    def close(self) -> None:
        """Put everything back, in reverse order."""
        if self._torch_calls is not None:
            self._torch_calls.bans.clear()
        self._undo.close()

    # --- what counts -----------------------------------------------------------------------

    def _called(self, name: str, why: str, receiver: object = None) -> None:
        frame = sys._getframe(1)
        ours = type(receiver).__module__ in self._code.lab.module_names
        while not ours and frame is not None:
            if frame.f_code.co_filename.startswith(self._tests_folder):
                return
            ours = self._code.owns_frame(frame)
            frame = frame.f_back  # type: ignore[assignment]
        if ours:
            self._fail(f"{name} is forbidden in this lab", why)

    def _fail(self, message: str, why: str) -> None:
        __tracebackhide__ = True
        message += f": {why}" if why else ""
        self.violations.append(message)
        # pytest's Failed is no Exception, so `except Exception` does not swallow it;
        # and the plugin looks at `violations` after the test in any case.
        pytest.fail(message, pytrace=False)

    def _refuse_exports(self, is_banned: Callable[[Any], bool], why: str) -> None:
        """Fail if what the tests import from the code under test is itself banned.

        Such a call has only the test on its stack.
        """
        for name, value in self._exports.items():
            while isinstance(value, functools.partial):
                value = value.func
            if is_banned(value):
                banned = _name(value if callable(value) and hasattr(value, "__name__") else type(value))
                self._fail(f"`{name}` is {banned}, which is forbidden in this lab", why)

    # --- how calls are intercepted ---------------------------------------------------------

    def _ban_torch_names(self, patterns: tuple[str, ...], why: str) -> None:
        self._refuse_exports(
            lambda value: _is_torch_function(value) and any(fnmatchcase(_name(value), p) for p in patterns),
            why,
        )
        if self._torch_calls is None:
            self._torch_calls = self._undo.enter_context(_TorchCalls(self._called))
        self._torch_calls.bans += [(pattern, why) for pattern in patterns]

    def _ban_class(self, cls: type, why: str) -> None:
        """Guard construction and calls, of instances made before as well."""
        own = [base for base in cls.__mro__ if base is not object]
        names = [n for n in ("__new__", "__init__", "forward", "__call__") if any(n in vars(b) for b in own)]
        try:
            for name in names or ["__init__"]:
                method = inspect.getattr_static(cls, name)
                if name == "__new__":
                    function = method.__func__ if isinstance(method, staticmethod) else method
                    self._set_attribute(cls, name, staticmethod(self._guarded(function, cls.__name__, why)))
                else:
                    guard = self._guarded(method, cls.__name__, why, is_method=True)
                    self._set_attribute(cls, name, guard)
        except TypeError:  # written in C and immutable
            self._ban_object(cls, why)

    def _ban_function(self, function: types.FunctionType, why: str) -> None:
        """Exchange the code inside the function object, which all aliases, closures and partials share."""
        original = types.FunctionType(
            function.__code__,
            function.__globals__,
            function.__name__,
            function.__defaults__,
            function.__closure__,
        )
        original.__kwdefaults__ = function.__kwdefaults__

        def trampoline(*args: Any, _forbid_guard: Callable[..., Any], **kwargs: Any) -> Any:
            return _forbid_guard(*args, **kwargs)

        free = function.__code__.co_freevars  # a function's code must keep their number
        self._undo.callback(
            _set_code, function, original.__code__, original.__defaults__, original.__kwdefaults__
        )
        guard = self._guarded(original, _name(function), why)
        _set_code(function, trampoline.__code__.replace(co_freevars=free), None, {"_forbid_guard": guard})

    def _ban_object(self, target: Callable[..., Any], why: str) -> None:
        """Replace `target` in every module, and in what the modules under test hold it by."""
        guard = self._guarded(target, _name(target), why)
        setters = [setter for value, setter in self._learner_slots() if value is target]
        setters += _module_slots(target)
        if not setters:
            raise ValueError(f"forbid cannot intercept {target!r}: no module holds it by a name")
        for setter in setters:
            self._undo.callback(setter, target)
            setter(guard)

    def _guarded(
        self, function: Callable[..., Any], name: str, why: str, *, is_method: bool = False
    ) -> Callable[..., Any]:
        @functools.wraps(function)
        def guard(*args: Any, **kwargs: Any) -> Any:
            self._called(name, why, args[0] if is_method and args else None)
            return function(*args, **kwargs)

        return guard

    def _set_attribute(self, owner: type, name: str, value: Any) -> None:
        missing = object()
        original = vars(owner).get(name, missing)
        setattr(owner, name, value)
        if original is missing:
            self._undo.callback(delattr, owner, name)
        else:
            self._undo.callback(setattr, owner, name, original)

    def _learner_slots(self) -> Iterator[tuple[Any, _Setter]]:
        """Yield what the modules under test reach, each value with what replaces it."""
        pending: list[Any] = [vars(module) for module in self._code.modules.values()]
        seen: set[int] = set()
        while pending:
            holder = pending.pop()
            if id(holder) in seen:
                continue
            seen.add(id(holder))
            for value, setter in self._slots(holder):
                yield value, setter
                pending.append(value)

    def _slots(self, holder: Any) -> Iterator[tuple[Any, _Setter]]:
        names = self._code.lab.module_names
        if isinstance(holder, dict):
            for key, value in list(holder.items()):
                yield value, functools.partial(holder.__setitem__, key)
        elif isinstance(holder, list):
            for i, value in enumerate(holder):
                yield value, functools.partial(holder.__setitem__, i)
        elif isinstance(holder, functools.partial):
            yield holder.func, functools.partial(_set_partial, holder)
        elif isinstance(holder, types.FunctionType) and self._code.owns(holder.__code__.co_filename):
            for cell in holder.__closure__ or ():
                with contextlib.suppress(ValueError):  # an empty cell
                    yield cell.cell_contents, functools.partial(setattr, cell, "cell_contents")
            for i, value in enumerate(holder.__defaults__ or ()):
                yield value, functools.partial(_set_default, holder, i)
            yield from self._slots(holder.__kwdefaults__ or {})
        elif inspect.isclass(holder) and holder.__module__ in names:
            for key, value in list(vars(holder).items()):
                if isinstance(value, staticmethod):
                    yield value.__func__, functools.partial(_set_static, holder, key)
                else:
                    yield value, functools.partial(setattr, holder, key)
        elif type(holder).__module__ in names:
            yield from self._slots(getattr(holder, "__dict__", {}))


class _TorchCalls(TorchFunctionMode):
    """Calls `called(name, why)` before every PyTorch function whose name is in `bans`."""

    def __init__(self, called: Callable[[str, str], None]) -> None:
        super().__init__()
        self.bans: list[tuple[str, str]] = []
        self._called = called
        self._open: list[Any] = []  # functions whose bodies are running under this mode

    def __exit__(self, *_: object) -> None:
        # Not simply the topmost mode: the code under test may have left its own switched on.
        above: list[TorchFunctionMode] = []
        while any(mode is self for mode in _get_current_function_mode_stack()):  # type: ignore[no-untyped-call]
            if (mode := _pop_mode()) is self:  # type: ignore[no-untyped-call]
                break
            above.append(mode)
        for mode in reversed(above):
            _push_mode(mode)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = _name(func)
        for pattern, why in self.bans:
            if fnmatchcase(name, pattern):
                self._called(name, why)
        # `Tensor.unflatten` calls the C method it overrides, which asks for `Tensor.unflatten` again.
        again = any(func is opened for opened in self._open)
        if self.bans and not again and (body := _body(func, types)) is not None:
            self._open.append(func)
            try:
                with self:  # a mode is off while it answers; what happens inside `func` counts too
                    return body(*args, **(kwargs or {}))
            finally:
                self._open.pop()
        return func(*args, **(kwargs or {}))


def _body(func: Any, overloaded: Any) -> Callable[..., Any] | None:
    """Return `func` without its first question whether a mode wants to answer instead, or None.

    Functions like `Tensor.backward` and `F.multi_head_attention_forward` are Python: they ask,
    then do their work by calling others.
    """
    if not isinstance(func, types.FunctionType) or any(
        cls is not torch.Tensor and cls is not torch.nn.Parameter for cls in overloaded
    ):
        return None
    questions = [name for name in func.__code__.co_names if name.startswith("has_torch_function")]
    if not questions or any(name not in func.__globals__ for name in questions):
        return None
    namespace = {**func.__globals__, **dict.fromkeys(questions, lambda *_: False)}
    body = types.FunctionType(func.__code__, namespace, func.__name__, func.__defaults__, func.__closure__)
    body.__kwdefaults__ = func.__kwdefaults__
    return body


def _same_or_instance_of(target: Any) -> Callable[[Any], bool]:
    return lambda value: value is target or (inspect.isclass(target) and type(value) is target)


def taken_names(tests: types.ModuleType) -> tuple[tuple[str, str], ...]:
    """Return (module, name) for every `from module import name` and `module.name` in the tests' source."""
    return names_taken_in(inspect.getsource(tests))


@functools.lru_cache(maxsize=8)
def names_taken_in(source: str) -> tuple[tuple[str, str], ...]:
    """Return (module, name) for every `from module import name` and `module.name` in `source`."""
    names: dict[tuple[str, str], None] = {}
    aliases: dict[str, str] = {}
    nodes = list(ast.walk(ast.parse(source)))
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {(node.module, alias.name): None for alias in node.names}
        elif isinstance(node, ast.Import):
            aliases |= {alias.asname or alias.name: alias.name for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            names[aliases[node.value.id], node.attr] = None
    return tuple(names)


def _module_slots(target: object) -> list[_Setter]:
    return [
        functools.partial(setattr, module, name)
        for module in list(sys.modules.values())
        if isinstance(module, types.ModuleType)
        for name, value in list(vars(module).items())
        if value is target
    ]


def _set_code(function: types.FunctionType, code: types.CodeType, defaults: Any, kwdefaults: Any) -> None:
    function.__code__, function.__defaults__, function.__kwdefaults__ = code, defaults, kwdefaults


def _set_partial(holder: Any, function: Any) -> None:
    holder.__setstate__((function, holder.args, holder.keywords, vars(holder)))


def _set_default(holder: types.FunctionType, index: int, value: Any) -> None:
    defaults = list(holder.__defaults__ or ())
    defaults[index] = value
    holder.__defaults__ = tuple(defaults)


def _set_static(holder: type, name: str, function: Any) -> None:
    setattr(holder, name, staticmethod(function))


def _name(target: Any) -> str:
    # `aten.softmax.int` is named "softmax.int": the overload is no part of the name.
    name = getattr(target, "__name__", None)
    return name.split(".")[0] if isinstance(name, str) else repr(target)


def _is_torch_function(target: Any) -> bool:
    if inspect.isclass(target) or not callable(target):
        return False
    module = str(getattr(target, "__module__", None) or type(target).__module__)
    owner = getattr(target, "__objclass__", None)
    return (
        module == "torch"
        or module.startswith("torch.")
        or (owner is not None and issubclass(owner, torch._C.TensorBase))
    )
