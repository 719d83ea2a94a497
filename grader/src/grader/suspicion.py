"""Reads a learner's source for what no lab asks for. A hint for people: it decides nothing.

Whoever means to deceive can write it so that this sees nothing; and right code may have a reason.
"""

import ast
from collections.abc import Iterator, Mapping

_MODULES = {"atexit", "builtins", "ctypes", "gc", "grader", "inspect", "marshal", "multiprocessing", "pickle", "pluggy",
            "pytest", "_pytest", "shared", "signal", "socket", "subprocess", "threading", "unittest"}  # fmt: skip
_NAMES = {"exec", "eval", "compile", "__import__", "globals", "open"}
_ATTRIBUTES = {"_getframe", "_exit", "settrace", "setprofile", "meta_path", "modules", "addaudithook", "fork",
               "__code__", "__globals__", "__closure__", "__subclasses__", "tb_frame", "f_back", "f_globals",
               "f_locals", "as_subclass"}  # fmt: skip
_METHODS = {
    "__eq__",
    "__torch_function__",
    "__torch_dispatch__",
    "__array_ufunc__",
    "__array_function__",
    "__class__",
}


def suspicious(code: Mapping[str, bytes]) -> tuple[str, ...]:
    """Return a sentence for each suspicious thing in `code`, source files by name."""
    return tuple(
        dict.fromkeys(
            f"{name}, line {line}: {what}"
            for name, source in sorted(code.items())
            if name.endswith(".py")
            for line, what in sorted(_in(source))
        )
    )


def _in(source: bytes) -> Iterator[tuple[int, str]]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return  # the tests will say so
    # `import torch.nn.modules` is no look at sys.modules.
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                for alias in names:
                    if alias.name.partition(".")[0] in _MODULES:
                        yield node.lineno, f"imports {alias.name}"
            case ast.ImportFrom(module=str(module)) if module.partition(".")[0] in _MODULES:
                yield node.lineno, f"imports {module}"
            case ast.Attribute(value=ast.Name(id="sys"), attr="modules"):
                yield node.lineno, "uses sys.modules"
            case ast.Attribute(attr=attribute) if attribute in _ATTRIBUTES and attribute != "modules":
                yield node.lineno, f"uses {attribute}"
            case ast.Call(func=ast.Name(id=called)) if called in _NAMES:
                yield node.lineno, f"calls {called}"
            case ast.FunctionDef(name=defined) if defined in _METHODS:
                yield node.lineno, f"defines {defined}"
