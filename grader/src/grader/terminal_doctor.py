"""Renders what `topeka doctor` found."""

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from grader.doctor import Finding, Findings, StackReadiness, State

_SIGNS: dict[State, tuple[str, str]] = {
    "ok": ("ok", "green"),
    "warning": ("note", "yellow"),
    "missing": ("missing", "red"),
}
_PROFILES = {"cpu": "cpu", "cuda": "gpu", "multi-gpu": "multi-gpu"}  # compose.yaml's names


def print_findings(console: Console, findings: Findings) -> None:
    """Print what was looked at, then what each stack lacks here and in Docker."""
    _print_table(console, findings.findings)
    console.print("\nStacks, and what each lacks on this machine:", style="bold")
    for stack in findings.stacks:
        console.print(_stack(stack), soft_wrap=not console.is_terminal)
    console.print("\n`topeka doctor --stack cuda` says what to do about each.", style="dim")


def print_stack(console: Console, stack: StackReadiness) -> None:
    """Print what one stack needs, with a remedy for all it lacks, and whether it is ready."""
    shared = [finding for finding in stack.here if finding in stack.in_docker]
    if shared:
        console.print("Both ways need", style="bold")
        _print_table(console, shared)
        console.print()
    for where, findings, lacks in (
        ("In this environment", stack.here, stack.lacks_here),
        ("In its container", stack.in_docker, stack.lacks_in_docker),
    ):
        sign = ("not ready", "red") if lacks else ("ready", "green")
        console.print(Text.assemble((f"{where}: ", "bold"), sign))
        _print_table(console, (finding for finding in findings if finding not in shared))
        console.print()
    console.print(_conclusion(stack), markup=False, soft_wrap=True)


def _conclusion(stack: StackReadiness) -> str:
    name = stack.stack
    if not stack.ready:
        how = "Every line above that says missing has its remedy below it; one of the two ways is enough."
        return f"The {name} stack is not ready on this machine. {how}"
    ways = []
    if not stack.lacks_here:
        ways.append("`topeka grade TARGET` verifies it in this environment")
    if not stack.lacks_in_docker:
        ways.append(f"`make up PROFILE={_PROFILES[name]}` starts its container")
    return f"The {name} stack is ready: {'; '.join(ways)}."


def _print_table(console: Console, findings: Iterable[Finding]) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    for finding in findings:
        word, style = _SIGNS[finding.state]
        detail = Text(finding.detail)
        if finding.remedy:
            detail.append(f"\n{finding.remedy}", style="dim")
        table.add_row(Text(finding.name), Text(word, style=style), detail)
    if table.row_count:
        console.print(table, soft_wrap=not console.is_terminal)


def _stack(stack: StackReadiness) -> Text:
    text = Text.assemble((f"  {stack.stack}", "bold"))
    if stack.chapters:
        text.append(f"  ({', '.join(stack.chapters)})", style="dim")
    for where, lacks in (("here", stack.lacks_here), ("in Docker", stack.lacks_in_docker)):
        text.append(f"\n    {where}: ")
        text.append(f"lacks {'; '.join(lacks)}" if lacks else "ready", style="" if lacks else "green")
    return text
