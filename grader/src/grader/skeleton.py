"""What makes a file a skeleton: the solution, with some bodies replaced by `raise NotImplementedError`.

The same comparison proves for authors that skeleton and solution have not drifted apart, and
finds for learners the file as it was shipped.
"""

import ast
import io
import subprocess
import tokenize
from dataclasses import dataclass
from pathlib import Path

from grader.catalog import Catalog, Lab
from grader.errors import TopekaError

MARKER = "YOUR CODE HERE"

Function = ast.FunctionDef | ast.AsyncFunctionDef


class NoSkeleton(TopekaError):
    """The file as shipped cannot be found; the message says why."""


@dataclass(frozen=True)
class Stub:
    """A function that the learner writes.

    Attributes:
        name: dotted, such as `MultiHeadAttention.forward`.
        line: of its `raise`, from 1.
        task: the text inside `NotImplementedError`.
    """

    name: str
    line: int
    task: str


def stubs(source: str) -> list[Stub]:
    """Return the functions in `source` that end in `raise NotImplementedError`, in order.

    Raises:
        SyntaxError: `source` is no Python.
    """
    found = []
    for name, function in functions(ast.parse(source)):
        last = function.body[-1]
        if _is_stub_raise(last):
            assert isinstance(last, ast.Raise)
            call = last.exc
            task = ast.literal_eval(call.args[0]) if isinstance(call, ast.Call) and call.args else ""
            found.append(Stub(name, last.lineno, task if isinstance(task, str) else ""))
    return found


def functions(node: ast.AST, prefix: str = "") -> list[tuple[str, Function]]:
    """Return the functions and methods below `node` by dotted name, in order."""
    found: list[tuple[str, Function]] = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            found.append((f"{prefix}{child.name}", child))
        elif isinstance(child, ast.ClassDef):
            found += functions(child, f"{prefix}{child.name}.")
    return found


def drift(skeleton: str, solution: str) -> list[str]:
    """Return a sentence for each way in which `skeleton` is not `solution` with bodies left out."""
    return _compare_bodies(ast.parse(skeleton).body, ast.parse(solution).body, "the module")


def missing_guidance(skeleton: str) -> list[str]:
    """Return a sentence for each stub without the marker and two to five lines of guidance above it."""
    comments = {
        token.start[0]: token.string
        for token in tokenize.generate_tokens(io.StringIO(skeleton).readline)
        if token.type == tokenize.COMMENT
    }
    problems = []
    for stub in stubs(skeleton):
        above = []
        line = stub.line - 1
        while line in comments:
            above.append(comments[line])
            line -= 1
        above.reverse()
        if not above or MARKER not in above[0]:
            problems.append(f"{stub.name}: no comment `# {MARKER}` above its raise")
        elif not 2 <= len(above) - 1 <= 5:
            problems.append(f"{stub.name}: {len(above) - 1} lines of guidance below the marker, not 2 to 5")
        if not stub.task:
            problems.append(f"{stub.name}: NotImplementedError says nothing")
    return problems


def as_shipped(catalog: Catalog, lab: Lab, name: str, snapshots: Path) -> str:
    """Return the skeleton file `name` of `lab` as the course ships it.

    It is looked for in the checkout itself, in the commits that touched it, and in the
    snapshots; the newest text is taken that differs from the solution in stubs only and has all
    of them. So neither a learner's edits nor their own commits are mistaken for it.

    Raises:
        NoSkeleton: none of these places has it.
    """
    solution = (lab.path / "solutions" / name).read_text(encoding="utf-8")
    file = lab.path / "src" / name
    candidates: list[str] = []
    if file.is_file():
        candidates.append(file.read_text(encoding="utf-8", errors="replace"))
    candidates += _committed(catalog.root, file)
    snapshot = snapshots / lab.path.parent.name / lab.path.name / name
    if snapshot.is_file():
        candidates.append(snapshot.read_text(encoding="utf-8"))
    pristine = [text for text in candidates if _is_skeleton(text, solution)]
    if not pristine:
        raise NoSkeleton(
            f"the skeleton of {lab.id} ({name}) is neither in git nor in {snapshots}: "
            "take the file from a fresh copy of the course"
        )
    return max(pristine, key=lambda text: len(stubs(text)))  # max keeps the first, the newest


def snapshot(catalog: Catalog, folder: Path) -> None:
    """Keep a copy of every skeleton still untouched, for a checkout that is not in git."""
    for lab in catalog.labs:
        for name in () if lab.planned else lab.files:
            copy = folder / lab.path.parent.name / lab.path.name / name
            file = lab.path / "src" / name
            if copy.exists() or not file.is_file():
                continue
            text = file.read_text(encoding="utf-8", errors="replace")
            if _is_skeleton(text, (lab.path / "solutions" / name).read_text(encoding="utf-8")):
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_text(text, encoding="utf-8")


def _is_skeleton(text: str, solution: str) -> bool:
    try:
        return bool(stubs(text)) and not drift(text, solution) and not missing_guidance(text)
    except (SyntaxError, tokenize.TokenError):
        return False


def _committed(root: Path, file: Path) -> list[str]:
    """Return the versions of `file` in git, newest first; none where there is no git."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout

    path = file.relative_to(root).as_posix()
    commits = (git("log", "--all", "--format=%H", "-n", "50", "--", path) or "").split()
    versions = (git("show", f"{commit}:{path}") for commit in commits)
    return [text for text in versions if text is not None]


def _compare_bodies(ours: list[ast.stmt], theirs: list[ast.stmt], where: str) -> list[str]:
    problems: list[str] = []
    names = [[_name(node) for node in body] for body in (ours, theirs)]
    if names[0] != names[1]:
        for name in names[0]:
            if name not in names[1]:
                problems.append(f"{where}: `{name}` stands in the skeleton only")
        for name in names[1]:
            if name not in names[0]:
                problems.append(f"{where}: `{name}` stands in the solution only")
        return problems or [f"{where}: the order of definitions differs"]
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(a, ast.ClassDef) and isinstance(b, ast.ClassDef):
            if _dump_class_head(a) != _dump_class_head(b):
                problems.append(f"class {a.name}: bases or decorators differ")
            problems += _compare_bodies(a.body, b.body, f"class {a.name}")
        elif isinstance(a, Function) and isinstance(b, Function):
            problems += _comparefunctions(a, b)
        elif ast.dump(a) != ast.dump(b):
            problems.append(f"{where}: `{_name(a)}` differs (skeleton line {a.lineno})")
    return problems


def _comparefunctions(ours: Function, theirs: Function) -> list[str]:
    problems = []
    for part in ("args", "returns", "decorator_list"):
        if _dump_all(getattr(ours, part)) != _dump_all(getattr(theirs, part)):
            problems.append(f"{ours.name}: {part.replace('_', ' ')} differ")
    if ast.get_docstring(ours) != ast.get_docstring(theirs):
        problems.append(f"{ours.name}: the docstrings differ")
    if _dump(ours.body) == _dump(theirs.body):
        return problems
    if not _is_stub_raise(ours.body[-1]):
        problems.append(f"{ours.name}: the body is neither the solution's nor a stub")
    elif _dump(ours.body[:-1]) != _dump(theirs.body[: len(ours.body) - 1]):
        problems.append(f"{ours.name}: the code given above the stub is not the solution's beginning")
    return problems


def _is_stub_raise(node: ast.stmt) -> bool:
    if not isinstance(node, ast.Raise):
        return False
    exception = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
    return isinstance(exception, ast.Name) and exception.id == "NotImplementedError"


def _name(node: ast.stmt) -> str:
    if isinstance(node, Function | ast.ClassDef):
        return node.name
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return "docstring"
    return ast.unparse(node).splitlines()[0]


def _dump(body: list[ast.stmt]) -> str:
    return ast.dump(ast.Module(body, []))


def _dump_all(value: ast.AST | list[ast.expr] | None) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [ast.dump(v) for v in values if v is not None]


def _dump_class_head(node: ast.ClassDef) -> str:
    return str([[ast.dump(x) for x in part] for part in (node.bases, node.keywords, node.decorator_list)])
