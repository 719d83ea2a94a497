"""Renders reports for people: a table in a terminal, plain lines elsewhere."""

from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from grader.catalog import Catalog, Chapter, Lab
from grader.report import LabReport, MilestoneResult, Outcome, Report, Status, TestResult

STYLES = {
    Status.VERIFIED: "bold green",
    Status.FAILED: "bold red",
    Status.NOT_ATTEMPTED: "yellow",
    Status.NOT_VERIFIED_HERE: "cyan",
    Status.ERROR: "bold red",
    Status.TIMEOUT: "bold red",
}
FAILURES_SHOWN = 3


def words(status: Status) -> str:
    """Return a status as words."""
    return status.value.replace("_", " ")


def print_report(console: Console, catalog: Catalog, report: Report) -> None:
    """Print a whole report: the table, then failures, diagnoses, and what to do next."""
    if console.is_terminal:
        console.print(_table(report))
    else:
        for lab in report.labs:
            console.print(_plain_line(lab), soft_wrap=True, markup=False, highlight=False)
    for lab in report.labs:
        for part in details(lab):
            console.print(part, soft_wrap=not console.is_terminal)
    console.print(_where(report), style="dim", highlight=False, soft_wrap=not console.is_terminal)
    console.print(next_step(catalog, report), highlight=False, soft_wrap=not console.is_terminal)


def _table(report: Report) -> Table:
    table = Table(title=None, box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("lab", no_wrap=True)
    table.add_column("title", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("tests", justify="right", no_wrap=True)
    table.add_column("seconds", justify="right", no_wrap=True)
    table.add_column("milestone")
    for lab in report.labs:
        table.add_row(
            lab.lab,
            lab.title,
            Text(words(lab.status), style=STYLES[lab.status]),
            f"{lab.passed}/{len(lab.tests)}",
            f"{lab.seconds:.1f}",
            Text("\n".join(_measured(lab))),
        )
    return table


def _plain_line(lab: LabReport) -> str:
    parts = [
        lab.lab,
        words(lab.status),
        f"{lab.passed}/{len(lab.tests)} tests",
        f"{lab.seconds:.1f} s",
        lab.title,
    ]
    return "  ".join(parts + _measured(lab))


def _measured(lab: LabReport) -> list[str]:
    lines = [_milestone(m) for m in lab.milestones]
    if lab.slow_left_out and lab.status is Status.VERIFIED:
        tests = "1 slow test" if lab.slow_left_out == 1 else f"{lab.slow_left_out} slow tests"
        lines.append(f"{tests} left out: --slow runs {'it' if lab.slow_left_out == 1 else 'them'}")
    return lines


def _milestone(m: MilestoneResult) -> str:
    bound = "at most" if m.better == "lower" else "at least"
    return f"{m.name}: {m.value:.3g} {m.unit} ({bound} {m.target:g} promised)"


def details(lab: LabReport) -> list[RenderableType]:
    """Return what a learner needs to read about one lab; nothing for a verified one."""
    if lab.status is Status.VERIFIED:
        return []
    style = STYLES[lab.status]
    parts: list[RenderableType] = [
        Text.assemble(
            "\n", (f"{lab.lab} {words(lab.status)}", style), f": {lab.reason}" if lab.reason else ""
        )
    ]
    if lab.status is Status.NOT_ATTEMPTED:
        return parts
    groups = _grouped([t for t in lab.tests if t.outcome in (Outcome.FAILED, Outcome.ERROR)])
    for name, tests in groups[:FAILURES_SHOWN]:
        of = sum(t.name.split("[")[0] == tests[0].name.split("[")[0] for t in lab.tests)
        count = f" ({len(tests)} of {of})" if of > 1 else ""
        parts.append(Text.assemble(("  ✗ ", "red"), (name, "bold"), count))
        body = tests[0].message
        if tests[0].output.strip():
            body += "\nprinted: " + "\n         ".join(tests[0].output.strip().splitlines()[-8:])
        parts.append(Padding(Text(body), (0, 0, 0, 4)))
    if len(groups) > FAILURES_SHOWN:
        parts.append(Text(f"  and {len(groups) - FAILURES_SHOWN} more failing tests"))
    if lab.diagnosis:
        parts.append(
            Group(
                Text.assemble(
                    ("\n  Looks like: ", "bold yellow"),
                    lab.diagnosis.misconception,
                    f" ({lab.diagnosis.likeness:.0%} alike)",
                ),
                Padding(Text(lab.diagnosis.hint), (0, 0, 0, 4)),
            )
        )
    if lab.status in (Status.ERROR, Status.TIMEOUT) and lab.output.strip():
        cut = "the end of " if lab.output_cut else ""
        tail = "\n".join(lab.output.strip().splitlines()[-15:])
        parts.append(Group(Text(f"  {cut}what it printed:"), Padding(Text(tail), (0, 0, 0, 4))))
    return parts


def _grouped(tests: Sequence[TestResult]) -> list[tuple[str, list[TestResult]]]:
    """Gather the parameter sets of one test function, in order."""
    groups: dict[str, list[TestResult]] = {}
    for test in tests:
        groups.setdefault(test.name.split("::")[-1].split("[")[0], []).append(test)
    return list(groups.items())


def _where(report: Report) -> str:
    libraries = report.machine.libraries
    parts = [f"stack {report.stack}", f"sandbox {report.isolation.sandbox}"]
    if not report.isolation.isolated:
        parts.append("not isolated")
    parts += sorted({f"trust {lab.trust.value.replace('_', ' ')}" for lab in report.labs})
    parts += [f"{name} {libraries[name]}" for name in ("torch", "numpy", "pytest") if name in libraries]
    parts += [gpu.name for gpu in report.machine.gpus]
    parts.append(f"{report.seconds:.1f} s")
    return "\n" + " · ".join(parts)


def next_step(catalog: Catalog, report: Report) -> str:
    """Return one line: the exact next thing to do."""
    for lab in report.labs:
        match lab.status:
            case Status.NOT_ATTEMPTED:
                source = catalog.select([lab.lab])[0]
                folder = f"labs/{source.path.parent.name}/{source.path.name}"
                return f"Next: write {folder}/src/{source.files[0]} with `topeka watch {lab.lab}` beside it"
            case Status.FAILED | Status.TIMEOUT:
                return f"Next: `topeka watch {lab.lab}` while you mend it; `topeka hint {lab.lab}` if you are stuck"
            case Status.ERROR:
                return (
                    "Next: see the reason above; `topeka doctor` examines this machine, "
                    f"`topeka reset {lab.lab}` starts over"
                )
    done = {lab.lab for lab in report.labs}
    if all(lab.status is Status.VERIFIED for lab in report.labs):
        following = _following(catalog, report.labs[-1].lab)
        if report.code != "src":
            return f"All {len(done)} verified."
        if following is None:
            return "That was the last lab."
        if following.planned:
            return f"Verified. The next lab, {following.id}, is planned and not yet written."
        return f"Next: `topeka watch {following.id}` ({following.title}, about {following.minutes} minutes)"
    return "What could be verified here is. The rest needs the hardware named above."


def _following(catalog: Catalog, lab_id: str) -> Lab | None:
    ids = [lab.id for lab in catalog.labs]
    after = ids.index(lab_id) + 1
    return catalog.labs[after] if after < len(ids) else None


def lab_table(catalog: Catalog, chapters: Sequence[Chapter], statuses: dict[str, Status]) -> Table:
    """Return chapters and labs with status, for `list`, `lab` and `progress`."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("lab", "title", "stack", "status"):
        table.add_column(name, no_wrap=name != "title")
    table.add_column("minutes", justify="right")
    for chapter in chapters:
        if len(chapters) > 1:
            table.add_row(
                Text(chapter.id, style="bold"), Text(chapter.title, style="bold"), chapter.stack, "", ""
            )
        for lab in chapter.labs:
            table.add_row(lab.id, escape(lab.title), lab.stack, status_text(lab, statuses), str(lab.minutes))
    return table


def status_text(lab: Lab, statuses: dict[str, Status]) -> Text:
    """Return a lab's status as coloured words: planned, to do, or how the last attempt came out."""
    if lab.planned:
        return Text("planned", style="dim")
    status = statuses.get(lab.id)
    if status is None:
        return Text("to do")
    return Text(words(status), style=STYLES[status])
