"""Commands for working on labs."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grader.cli import start
from grader.cli.start import Code, SandboxName, StackName, Target, Targets, TrustName
from grader.errors import OK, TopekaError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from rich.progress import TaskID

    from grader.catalog import Catalog, Lab
    from grader.report import LabReport, Report
    from grader.state import State


commands = typer.Typer()


@commands.command("list")
def list_labs(
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """List all chapters and labs with their status."""
    catalog = start.catalog()
    statuses = start.statuses(start.state(catalog))
    if as_json:
        rows = [
            {
                "lab": lab.id,
                "title": lab.title,
                "stack": lab.stack,
                "minutes": lab.minutes,
                "planned": lab.planned,
                "status": statuses.get(lab.id),
            }
            for lab in catalog.labs
        ]
        print(json.dumps(rows, indent=2))
        return
    from grader.terminal import lab_table

    console = start.console()
    console.print(lab_table(catalog, catalog.chapters, statuses), soft_wrap=not console.is_terminal)


@commands.command("next")
def next_lab() -> None:
    """Say which lab comes next and how to begin."""
    catalog = start.catalog()
    print_next(start.console(), catalog, start.state(catalog))


def print_next(console: "Console", catalog: "Catalog", state: "State") -> None:
    """Say which lab comes next, and how to begin it."""
    verified = state.verified()
    for lab in catalog.labs:
        if not lab.planned and lab.id not in verified:
            folder = f"labs/{lab.path.parent.name}/{lab.path.name}"
            console.print(f"Next: {lab.id} {lab.title} (about {lab.minutes} minutes)", markup=False)
            console.print(f"  read   {folder}/README.md", markup=False, soft_wrap=True)
            console.print(f"  write  {folder}/src/{lab.files[0]}", markup=False, soft_wrap=True)
            console.print(f"  run    topeka watch {lab.id}", markup=False)
            return
    console.print("Every lab that is written so far is verified.")


@commands.command()
def grade(
    targets: Targets,
    code: Code = "src",
    sandbox: Annotated[
        SandboxName,
        typer.Option(
            envvar="TOPEKA_SANDBOX", help="where to run the tests; auto: docker if its image is there"
        ),
    ] = SandboxName.AUTO,
    stack: Annotated[StackName | None, typer.Option(help="require this stack")] = None,
    json_to: Annotated[
        str | None,
        typer.Option("--json", metavar="FILE|-", help="write the report as JSON to FILE or stdout"),
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(min=0.1, help="seconds for each lab, instead of the lab's own limit")
    ] = None,
    slow: Annotated[
        bool, typer.Option("--slow", help="also run tests marked slow (full training runs)")
    ] = False,
    trust: Annotated[
        TrustName,
        typer.Option(
            envvar="TOPEKA_TRUST",
            help="strict: the code runs in a process of its own, without tests or results in reach; "
            "for labs that support it",
        ),
    ] = TrustName.SAME_PROCESS,
) -> None:
    """Run the tests of TARGETs and report. Exit 0: all verified; 1: not; 2: wrong usage; 3: could not run."""
    from grader.grading import grade as grade_labs
    from grader.grading import no_strict
    from grader.report import Trust
    from grader.submission import code_folder, read_code

    catalog = start.catalog()
    labs = catalog.select(targets)
    if unwritten := [lab for lab in labs if lab.planned]:
        labs = tuple(lab for lab in labs if not lab.planned)
        note = f"planned and not yet written, left out: {', '.join(lab.id for lab in unwritten)}"
        if not labs:
            raise TopekaError(note)
        print(note, file=sys.stderr)
    if trust is TrustName.STRICT and len(labs) == 1 and not labs[0].strict:
        raise UsageError(no_strict(labs[0]))
    for lab in labs:  # a wrong --code is said before anything starts
        read_code(lab, code_folder(lab, code))
    where, here = start.sandbox(sandbox, stack, labs)
    try:
        with _Progress(start.console_for_progress(json_to)) as progress:
            report = grade_labs(
                catalog,
                labs,
                where,
                code=code,
                stack=here,
                slow=slow,
                trust=Trust(trust.value),
                timeout_s=timeout,
                cache=start.cache(catalog),
                on_event=progress.event,
                on_lab=progress.lab,
            )
    finally:
        where.close()
    if code == "src":
        _remember(start.state(catalog), report)
    if json_to == "-":
        print(report.model_dump_json(indent=2))
    else:
        if json_to is not None:
            _write_whole(Path(json_to), report.model_dump_json(indent=2) + "\n")
        from grader.terminal import print_report

        print_report(start.console(), catalog, report)
    raise typer.Exit(report.exit_code)


def _remember(state: "State", report: "Report") -> None:
    from grader.state import StateUnusable

    try:
        state.remember(report)
    except (OSError, StateUnusable) as error:
        print(f"topeka: this attempt is not remembered: {error}", file=sys.stderr)


def _write_whole(file: Path, text: str) -> None:
    import tempfile

    try:
        handle, name = tempfile.mkstemp(dir=file.resolve().parent, prefix=f".{file.name}.")
    except OSError as error:
        raise UsageError(f"--json {file}: {error.strerror}") from error
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        stream.write(text)
    Path(name).chmod(0o644)
    Path(name).replace(file)


class _Progress:
    """Live progress on a terminal, nothing elsewhere."""

    def __init__(self, console: "Console | None") -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._bars: dict[str, TaskID] = {}
        self._progress = console and Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[test]}"),
            console=console,
            transient=True,
        )

    def __enter__(self) -> "_Progress":
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress:
            self._progress.stop()

    def event(self, lab: "Lab", event: dict[str, object]) -> None:
        if not self._progress:
            return
        match event["event"]:
            case "started":
                self._bars[lab.id] = self._progress.add_task(lab.id, total=None, test="")
            case "collected":
                tests = event["tests"]
                assert isinstance(tests, list)
                self._progress.update(self._bars[lab.id], total=len(tests))
            case "test_started":
                name = str(event["test"]).split("::")[-1]
                self._progress.update(self._bars[lab.id], test=name)
            case "test":
                self._progress.advance(self._bars[lab.id])

    def lab(self, report: "LabReport") -> None:
        if self._progress and report.lab in self._bars:
            self._progress.remove_task(self._bars.pop(report.lab))


@commands.command()
def watch(targets: Targets) -> None:
    """Grade again on every save, until Ctrl-C."""
    import time

    from grader.grading import grade as grade_labs
    from grader.terminal import print_report
    from grader.watch import on_save

    catalog = start.catalog()
    labs = tuple(lab for lab in catalog.select(targets) if not lab.planned)
    if not labs:
        raise TopekaError(f"{' '.join(targets)}: planned and not yet written")
    state, console = start.state(catalog), start.console()
    here, sandbox = start.local_stack(None), start.local_sandbox()

    def again(changed: "Sequence[Lab]") -> None:
        started = time.monotonic()
        report = grade_labs(catalog, changed, sandbox, stack=here, cache=start.cache(catalog))
        _remember(state, report)
        if console.is_terminal:
            console.clear()
        print_report(console, catalog, report)
        console.print(
            f"{time.strftime('%H:%M:%S')}  graded in {time.monotonic() - started:.2f} s; "
            "watching for the next save, Ctrl-C ends",
            style="dim",
        )

    try:
        on_save(labs, again)
    except KeyboardInterrupt:
        pass
    finally:
        sandbox.close()
    console.print("Stopped watching.")


@commands.command()
def hint(
    target: Target,
    restart: Annotated[bool, typer.Option("--restart", help="begin again with the first hint")] = False,
) -> None:
    """Reveal one more hint, from a nudge to the solution's own lines."""
    from grader.hint import topic

    catalog = start.catalog()
    lab, state, console = start.one_written_lab(catalog, target), start.state(catalog), start.console()
    if restart:
        state.forget_hints(lab.id)
    last = state.last(lab.id)
    found = topic(lab, last.report if last else None)
    if found is None:
        console.print(f"Nothing is left to write in {lab.id}. Run `topeka grade {lab.id}` to see what fails.")
        return
    shown = state.next_hint(lab.id, found.name)
    step = min(shown, len(found.steps) - 1)
    console.print(
        f"{lab.id}: {found.title}. Hint {step + 1} of {len(found.steps)}:", style="bold", markup=False
    )
    console.print(found.steps[step], markup=False, soft_wrap=True)
    if step + 1 < len(found.steps):
        console.print(f"\nAnother: `topeka hint {lab.id}`", style="dim")
    else:
        console.print(f"\nThat was the last one. The whole solution: `topeka solution {lab.id}`", style="dim")


@commands.command()
def solution(
    target: Target,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="do not ask")] = False,
) -> None:
    """Show our solution; asks first if you have not verified the lab."""
    from rich.syntax import Syntax

    catalog = start.catalog()
    lab, console = start.one_written_lab(catalog, target), start.console()
    if lab.id not in start.state(catalog).verified() and not yes:
        if not sys.stdin.isatty():
            raise UsageError(f"{lab.id} is not verified yet; --yes shows its solution all the same")
        if not typer.confirm(f"You have not verified {lab.id} yet. Show its solution all the same?"):
            raise typer.Exit(OK)
    for name in lab.files:
        text = (lab.path / "solutions" / name).read_text(encoding="utf-8")
        if console.is_terminal:
            console.rule(name)
            console.print(Syntax(text, "python", word_wrap=True, background_color="default"))
        else:
            print(text, end="")


@commands.command()
def reset(
    target: Target,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="do not ask")] = False,
) -> None:
    """Bring back the skeleton of a lab; your files are kept in .topeka/backups/."""
    from datetime import datetime

    from grader.skeleton import as_shipped

    catalog = start.catalog()
    lab, console = start.one_written_lab(catalog, target), start.console()
    shipped = {
        name: as_shipped(catalog, lab, name, start.state_folder(catalog) / "skeletons") for name in lab.files
    }
    current = {
        name: (lab.path / "src" / name).read_text(encoding="utf-8", errors="surrogateescape")
        for name in lab.files
        if (lab.path / "src" / name).is_file()
    }
    if current == shipped:
        console.print(f"{lab.id} is as shipped already; nothing to do.")
        return
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError(f"--yes resets {lab.id} without asking")
        if not typer.confirm(f"Put the skeleton of {lab.id} back? Your files are kept as a backup."):
            raise typer.Exit(OK)
    stamp = datetime.now().astimezone().strftime("%Y-%m-%d_%H-%M-%S.%f")
    backup = start.state_folder(catalog) / "backups" / lab.path.parent.name / lab.path.name / stamp
    if current:
        backup.mkdir(parents=True)
        for name in current:
            (backup / name).write_bytes((lab.path / "src" / name).read_bytes())
        console.print(f"Your files are in {backup.relative_to(catalog.root)}", soft_wrap=True, markup=False)
    for name, text in shipped.items():
        _write_whole(lab.path / "src" / name, text)
    console.print(f"{lab.id} is as shipped again.")


@commands.command()
def progress() -> None:
    """Draw the 54 labs and 12 milestones."""
    from grader.progress import print_progress

    catalog = start.catalog()
    print_progress(start.console(), catalog, start.state(catalog))
