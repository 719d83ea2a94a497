"""Finds out whether what judges the code under test is still what it was before that code came.

A snapshot holds, of the modules that run and compare, every function and class by the name it has, and of classes
their methods. What is inside a function (its code and defaults) is watched by `grader.runner.audit`; what closures
hold is compared here.
"""

import builtins
import contextlib
import importlib
import operator
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

# What judges a test, looked at after each; and what runs tests or is taken as an oracle, looked at when all were
# imported, at the end, and between as time allows. All of torch would take half a second.
_CORE = {"builtins", "pytest", "sys", "time", "torch", "torch.nn.functional", "numpy", "_pytest.runner",
         "_pytest.outcomes", "_pytest.python", "_pytest.python_api", "_pytest.raises", "_pytest.reports",
         "_pytest.assertion.util", "pluggy._callers", "shared.compare", "shared.plugin", "shared.timing",
         "shared.forbid", "shared.code_under_test"}  # fmt: skip
_FAMILIES = ("_pytest.", "pluggy.", "shared.", "numpy.testing.", "torch.testing.", "grader.runner.", "unittest.",
             "json.", "torch.nn.modules.")  # fmt: skip
_MODULES = {
    "_pytest", "pluggy", "shared", "numpy.testing", "torch.testing", "torch._tensor",
    "os", "io", "math", "cmath", "random", "functools", "itertools", "operator", "contextlib", "inspect", "traceback",
    "types", "copy", "dis", "zlib", "statistics", "fnmatch", "hashlib", "hmac", "dataclasses", "pathlib", "weakref",
    "json", "numpy.linalg", "numpy._core.fromnumeric", "numpy._core.numeric", "numpy._core.multiarray",
    "numpy._core.umath", "numpy.random", "torch._C", "torch._ops", "torch.functional", "torch.nn", "torch.nn.init",
    "torch.nn.parameter", "torch.linalg", "torch.overrides", "torch.autograd", "torch.autograd.function",
    "torch.autograd.gradcheck", "torch.random", "torch.special", "torch.fft", "torch.utils._python_dispatch",
}  # fmt: skip
# What programs are meant to set.
_FREE = {"sys.stdout", "sys.stderr", "sys.stdin", "sys.displayhook", "sys.excepthook", "sys.unraisablehook",
         "sys.breakpointhook", "builtins._"}  # fmt: skip
_FUNCTIONS = (FunctionType, BuiltinFunctionType, staticmethod, classmethod, property)


# What tests import and is not there from the start.
_LIBRARIES = {"hypothesis", "matplotlib", "transformers", "tokenizers", "safetensors", "scipy"}
_IMPORT = re.compile(r"^[ \t]*(?:from|import)[ \t]+([A-Za-z_][\w.]*)", re.MULTILINE)
# A class made in C is immutable (Py_TPFLAGS_HEAPTYPE, Py_TPFLAGS_IMMUTABLETYPE).
_HEAP, _IMMUTABLE = 1 << 9, 1 << 8


@dataclass(slots=True)
class _Namespace:
    values: Mapping[str, Any]
    names: list[str]
    before: list[Any]
    prefix: str
    get: Callable[[Any], tuple[Any, ...]]
    # What a new name hides: the bases of a class, or the builtins.
    behind: tuple[Mapping[str, Any], ...]
    all_names: frozenset[str]

    def changes(self) -> Iterator[str]:
        for number, (name, before) in enumerate(zip(self.names, self.before, strict=True)):
            now = self.values.get(name)
            if now is before:
                continue
            if self.prefix == "torch" and name == "manual_seed" and _wrapped_by_dynamo(before, now):
                self.before[number] = now
                continue
            yield f"{self.prefix}.{name}"
        for name in self.values.keys() - self.all_names:
            if callable(self.values[name]) and any(name in namespace for namespace in self.behind):
                yield f"{self.prefix}.{name}"


def _wrapped_by_dynamo(before: Any, now: Any) -> bool:
    """Whether `now` is what `import torch._dynamo` makes of `before`: `torch._disable_dynamo(before)`.

    Much of torch imports it late: checkpointing, forward-mode derivatives, optimizers.
    """
    from torch._compile import _disable_dynamo

    inner = _disable_dynamo(_wrapped_by_dynamo).__code__  # any function: the code is the same
    return (
        type(now) is FunctionType
        and now.__code__ is inner
        and any(cell.cell_contents is before for cell in now.__closure__ or ())
    )


class Snapshot:
    """What is bound to which names."""

    def __init__(self) -> None:
        self._core: list[_Namespace] = []
        self._rest: list[_Namespace] = []
        self._cells: list[tuple[Any, Any, str]] = []
        self._globals: set[int] = set()
        self._known: set[int] = set()

    def take(self) -> None:
        """Take all that runs and compares into the snapshot as it is now; again, too."""
        same = operator.is_
        for namespace in (*self._core, *self._rest):
            now = [namespace.values.get(name) for name in namespace.names]
            if not all(map(same, now, namespace.before)):
                namespace.before = now
            if len(namespace.values) != len(namespace.all_names):
                namespace.all_names = frozenset(namespace.values)
        for name, module in list(sys.modules.items()):
            if name in _CORE:
                self.add(module, self._core)
            elif name in _MODULES or name.startswith(_FAMILIES):
                self.add(module, self._rest)

    def add(self, module: ModuleType, to: list[_Namespace] | None = None) -> None:
        """Take `module` into the snapshot as it is now."""
        to = self._core if to is None else to
        namespace = getattr(module, "__dict__", None)
        if type(namespace) is not dict or id(namespace) in self._known:
            return
        self._known.add(id(namespace))
        self._globals.add(id(namespace))
        self._add(namespace, module.__name__, to, (vars(builtins),))
        for value in list(namespace.values()):
            if (
                isinstance(value, type)
                and value.__flags__ & (_HEAP | _IMMUTABLE) == _HEAP
                and value.__module__ == module.__name__
                and id(value) not in self._known
            ):
                self._known.add(id(value))
                behind = tuple(base.__dict__ for base in value.__mro__[1:])
                self._add(value.__dict__, f"{module.__name__}.{value.__qualname__}", to, behind)

    def add_object(self, values: Mapping[str, Any], name: str, fields: Sequence[str]) -> None:
        """Take `fields` of `values` into the snapshot, of whatever kind they are."""
        self._put(values, list(fields), name, self._core, ())

    def is_protected(self, function: FunctionType) -> bool:
        """Whether `function` belongs to a module of the snapshot."""
        return id(function.__globals__) in self._globals

    def changes(self, *, everything: bool) -> Iterator[str]:
        """Yield the name of what is bound otherwise now, or not at all.

        Args:
            everything: look at all of it, which takes one to two milliseconds; else at what judges a test.
        """
        same, holds = operator.is_, all
        for namespace in (*self._core, *self._rest) if everything else self._core:
            try:
                values = namespace.values
                if holds(map(same, namespace.get(values), namespace.before)) and (
                    not namespace.behind or len(values) == len(namespace.all_names)
                ):
                    continue
            except KeyError:
                pass
            yield from namespace.changes()
        for cell, before, name in self._cells if everything else ():
            try:
                if cell.cell_contents is before:
                    continue
            except ValueError:
                pass  # emptied
            yield f"what the closure of {name} holds"

    # torch.optim.Optimizer wraps `step` of its subclasses itself, when the first instance is made.
    def _add(
        self,
        namespace: Mapping[str, Any],
        name: str,
        to: list[_Namespace],
        behind: tuple[Mapping[str, Any], ...],
    ) -> None:
        names = [
            key
            for key, value in namespace.items()
            if (callable(value) or isinstance(value, _FUNCTIONS))
            and f"{name}.{key}" not in _FREE
            and not (key == "step" and any("_patch_step_function" in base for base in behind))
        ]
        self._put(namespace, names, name, to, behind)
        for key in names:
            value = namespace[key]
            function = value.__func__ if isinstance(value, staticmethod | classmethod) else value
            if type(function) is FunctionType and not name.startswith("torch."):
                for cell in function.__closure__ or ():
                    try:
                        content = cell.cell_contents
                    except ValueError:
                        continue
                    if callable(content):
                        self._cells.append((cell, content, f"{name}.{key}"))

    def _put(
        self,
        values: Mapping[str, Any],
        names: list[str],
        prefix: str,
        to: list[_Namespace],
        behind: tuple[Mapping[str, Any], ...],
    ) -> None:
        if names:
            # With two keys or more it returns a tuple.
            get = operator.itemgetter(names[0], *names)
            before = [values[names[0]], *(values[n] for n in names)]
            to.append(_Namespace(values, [names[0], *names], before, prefix, get, behind, frozenset(values)))


def import_libraries(sources: Sequence[str]) -> None:
    """Import what test files import and is installed, so that the code under test cannot be there first.

    Args:
        sources: of the test files. Names that are no libraries (the code under test is one) are left alone.
    """
    names = dict.fromkeys(name for source in sources for name in _IMPORT.findall(source))
    for name in names:
        if name.partition(".")[0] in sys.modules or name.partition(".")[0] in _LIBRARIES:
            # What it lacks here is the tests' business; they name it in their own error.
            with contextlib.suppress(ImportError):
                importlib.import_module(name)


def hooks(config: Any) -> dict[str, Callable[..., Any]]:
    """Return what pytest calls at which hook, in order, by a name for each."""
    return {
        f"{name}[{i}] ({implementation.plugin_name})": implementation.function
        for name, caller in vars(config.hook).items()
        if hasattr(caller, "get_hookimpls")
        for i, implementation in enumerate(caller.get_hookimpls())
    }


def hooked(config: Any) -> list[Callable[..., Any]]:
    """Return the functions of `hooks` alone, which is quicker."""
    return [
        implementation.function
        for caller in vars(config.hook).values()
        if hasattr(caller, "get_hookimpls")
        for implementation in caller.get_hookimpls()
    ]


def modes_left_on() -> list[str]:
    """Return the torch modes that are switched on now; a default device is none that answers for others."""
    if "torch" not in sys.modules:
        return []
    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._device import DeviceContext
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    stack = [*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()]  # type: ignore[no-untyped-call]
    return [f"torch mode {type(mode).__name__}" for mode in stack if builtins.type(mode) is not DeviceContext]
