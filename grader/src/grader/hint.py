"""Hints, one step at a time: where to begin, what fails, then the solution piece by piece."""

import ast
from dataclasses import dataclass
from pathlib import Path

from grader import skeleton
from grader.catalog import Lab
from grader.report import LabReport, Outcome


@dataclass(frozen=True)
class Topic:
    """What the learner is stuck on, and the steps to reveal.

    Attributes:
        name: what the count of revealed steps is kept under.
        title: one line.
        steps: texts, from a nudge to the solution's own lines.
    """

    name: str
    title: str
    steps: tuple[str, ...]


def topic(lab: Lab, last: LabReport | None) -> Topic | None:
    """Return what to give hints on: the first function not yet written, else the first failure.

    Args:
        lab: the lab.
        last: the newest report on the learner's code.

    Returns:
        None if nothing is left to write and nothing failed.
    """
    for name in lab.files:
        file = lab.path / "src" / name
        solution = lab.path / "solutions" / name
        try:
            unwritten = skeleton.stubs(file.read_text(encoding="utf-8"))
        except SyntaxError as error:
            return Topic("syntax", f"{file.name} is no Python yet", (f"Line {error.lineno}: {error.msg}.",))
        except FileNotFoundError:
            return Topic("missing", f"{file.name} is missing", (f"`topeka reset {lab.id}` brings it back.",))
        if unwritten:
            return _function_topic(lab, name, unwritten[0].name, unwritten[0].task, solution)
    if last is None:
        return None
    failing = [t for t in last.tests if t.outcome in (Outcome.FAILED, Outcome.ERROR)]
    if not failing:
        return None
    first = failing[0]
    steps = [f"Begin with one test: pytest {_path(lab)}/{first.name}\n{first.message}"]
    if last.diagnosis:
        steps.append(last.diagnosis.hint)
    steps.append(
        f"Read that test: {_path(lab)}/{first.name.split('::')[0]}. Work its smallest case out by hand "
        "and print every intermediate of your code beside it, with shapes."
    )
    return Topic(first.name, f"{first.name.split('::')[-1]} fails", tuple(steps))


def _function_topic(lab: Lab, file: str, name: str, task: str, solution: Path) -> Topic:
    steps = [
        f"Next to write: `{name}` in {_path(lab)}/src/{file}: {task}.\nIts docstring gives the shapes; "
        f"the comments below `# {skeleton.MARKER}` give the order of work.",
        f"The README's Background and Steps cover it: {_path(lab)}/README.md",
    ]
    source = solution.read_text(encoding="utf-8")
    for found, function in skeleton.functions(ast.parse(source)):
        if found == name:
            body = [n for n in function.body if not _is_docstring(n)]
            lines = source.splitlines()
            for count, node in enumerate(body, 1):
                text = "\n".join(lines[node.lineno - 1 : node.end_lineno])
                steps.append(f"The solution's statement {count} of {len(body)}:\n{text}")
    return Topic(name, f"`{name}` is not written yet", tuple(steps))


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _path(lab: Lab) -> str:
    return f"labs/{lab.path.parent.name}/{lab.path.name}"
