"""Renders what `topeka doctor` found."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from grader.doctor import Findings, StackReadiness, State

_SIGNS: dict[State, tuple[str, str]] = {
    "ok": ("ok", "green"),
    "warning": ("note", "yellow"),
    "missing": ("missing", "red"),
}


def print_findings(console: Console, findings: Findings) -> None:
    """Print what was looked at, then what each stack lacks here and in Docker."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    for finding in findings.findings:
        word, style = _SIGNS[finding.state]
        detail = Text(finding.detail)
        if finding.remedy:
            detail.append(f"\n{finding.remedy}", style="dim")
        table.add_row(Text(finding.name), Text(word, style=style), detail)
    console.print(table, soft_wrap=not console.is_terminal)
    console.print("\nStacks, and what each lacks on this machine:", style="bold")
    for stack in findings.stacks:
        console.print(_stack(stack), soft_wrap=not console.is_terminal)


def _stack(stack: StackReadiness) -> Text:
    text = Text.assemble((f"  {stack.stack}", "bold"))
    if stack.chapters:
        text.append(f"  ({', '.join(stack.chapters)})", style="dim")
    for where, lacks in (("here", stack.lacks_here), ("in Docker", stack.lacks_in_docker)):
        text.append(f"\n    {where}: ")
        text.append(f"lacks {'; '.join(lacks)}" if lacks else "ready", style="" if lacks else "green")
    return text
