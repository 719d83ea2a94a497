"""Draws how far a learner is: the 54 labs by chapter, and the 12 milestones."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from grader.catalog import Catalog, Chapter
from grader.report import MilestoneResult, Status
from grader.state import State

# One cell a lab: shape and colour both tell, so that it reads without colour.
_CELLS = {
    Status.VERIFIED: ("■", "green"),
    Status.FAILED: ("▨", "red"),
    Status.ERROR: ("▨", "red"),
    Status.TIMEOUT: ("▨", "red"),
    Status.NOT_VERIFIED_HERE: ("◧", "cyan"),
    Status.NOT_ATTEMPTED: ("□", "default"),
}


def print_progress(console: Console, catalog: Catalog, state: State) -> None:
    """Print the map of labs, the milestones reached, and totals."""
    attempts = state.last_by_lab()
    verified = state.verified()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("", "chapter", "labs", "milestone", "promised", "yours"):
        table.add_column(name, no_wrap=name in ("", "labs", "promised", "yours"))
    reached = 0
    for chapter in catalog.chapters:
        cells = Text()
        for lab in chapter.labs:
            attempt = attempts.get(lab.id)
            status = Status.VERIFIED if lab.id in verified else attempt.report.status if attempt else None
            if lab.planned:
                cells.append("· ", style="dim")
            else:
                shape, style = _CELLS[status or Status.NOT_ATTEMPTED]
                cells.append(f"{shape} ", style=style)
        claim = chapter.milestone
        lab_id = next(lab.id for lab in chapter.labs if lab.path.name == claim.lab)
        mine = attempts[lab_id].report.milestones if lab_id in attempts else ()
        reached += bool(mine) and mine[0].reached
        bound = "≤" if claim.better == "lower" else "≥"
        table.add_row(
            chapter.id,
            chapter.title,
            cells,
            claim.claim,
            f"{bound} {claim.promised:g}",
            _value(chapter, mine),
        )
    console.print(table, soft_wrap=not console.is_terminal)
    written = [lab for lab in catalog.labs if not lab.planned]
    console.print(
        f"\n{len(verified)} of {len(catalog.labs)} labs verified, {reached} of {len(catalog.chapters)} "
        f"milestones reached ({len(written)} labs are written so far)."
    )
    console.print("■ verified  ▨ failed  ◧ not verified here  □ to do  · planned", style="dim")


def _value(chapter: Chapter, mine: tuple[MilestoneResult, ...]) -> Text:
    if not mine:
        return Text("")
    return Text(f"{mine[0].value:.3g} {mine[0].unit}", style="green" if mine[0].reached else "red")
