"""Renders what `topeka check` found."""

from collections.abc import Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from grader.check import LabCheck


def print_checks(console: Console, found: Sequence[LabCheck], seconds: float) -> None:
    """Print a row per lab, its problems below, and the diagnosis accuracy over all labs."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("lab", no_wrap=True)
    for name in ("tests", "misconceptions caught", "diagnosed", "alternatives accepted", "solution s"):
        table.add_column(name, justify="right")
    table.add_column("")
    for lab in found:
        table.add_row(
            lab.lab.id,
            str(lab.tests),
            f"{lab.caught}/{lab.misconceptions}",
            f"{lab.diagnosed}/{lab.misconceptions}",
            f"{lab.accepted}/{lab.alternatives}",
            f"{lab.solution_seconds:.1f}",
            Text("ok", style="green")
            if not lab.problems
            else Text(f"{len(lab.problems)} problems", style="red"),
        )
    console.print(table, soft_wrap=not console.is_terminal)
    for lab in found:
        if lab.problems:
            console.print(f"\n{lab.lab.id}", style="bold red")
        for problem in lab.problems:
            console.print(Padding(Text(problem), (0, 0, 0, 2)))
    total = sum(lab.misconceptions for lab in found)
    right = sum(lab.diagnosed for lab in found)
    if total:
        console.print(
            f"\nDiagnosis: {right} of {total} misconceptions named as themselves ({right / total:.0%})."
        )
    console.print(f"{len(found)} labs in {seconds:.0f} s.", style="dim")
