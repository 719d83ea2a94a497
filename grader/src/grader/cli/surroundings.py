"""Commands about this machine, and for beginning and ending a chapter on it."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grader.cli import start
from grader.cli.start import StackName
from grader.errors import FAILED, OK

if TYPE_CHECKING:
    from rich.console import Console


from grader.cli.labs import print_next

commands = typer.Typer()


@commands.command()
def doctor(
    stack: Annotated[
        StackName | None, typer.Option("--stack", help="only this stack, each lack with its remedy")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Examine this machine: what each stack needs, has and lacks.

    With --stack, the exit status is 0 if that stack is ready in this environment or in its container, and 1 if
    in neither.
    """
    from grader.doctor import examine
    from grader.terminal_doctor import print_findings, print_stack

    catalog = start.catalog()
    findings = examine(catalog.root, catalog)
    if stack is None:
        if as_json:
            print(findings.model_dump_json(indent=2))
        else:
            print_findings(start.console(), findings)
        return
    found = next(each for each in findings.stacks if each.stack == stack.value)
    if as_json:
        print(found.model_dump_json(indent=2))
    else:
        print_stack(start.console(), found)
    raise typer.Exit(OK if found.ready else FAILED)


@commands.command()
def lab(
    target: Annotated[str, typer.Argument(metavar="CHAPTER", help="a chapter, such as ch01 or 1")],
    no_serve: Annotated[
        bool, typer.Option("--no-serve", help="start no JupyterLab and no dashboard")
    ] = False,
) -> None:
    """Begin work on a chapter: start JupyterLab and the dashboard, list the labs, say what to do next."""
    from grader.skeleton import snapshot
    from grader.terminal import lab_table

    catalog = start.catalog()
    state, console = start.state(catalog), start.console()
    labs = catalog.select([target])
    chapters = [c for c in catalog.chapters if any(lab in c.labs for lab in labs)]
    try:
        snapshot(catalog, start.state_folder(catalog) / "skeletons")
    except OSError as error:
        print(f"topeka: no copy of the skeletons is kept: {error}", file=sys.stderr)
    for chapter in chapters:
        console.print(f"Chapter {chapter.number}: {chapter.title}", style="bold", markup=False)
        console.print(f"Milestone: {chapter.milestone.claim}\n", markup=False, soft_wrap=True)
        console.print(lab_table(catalog, [chapter], start.statuses(state)), soft_wrap=not console.is_terminal)
        if all(lab.planned for lab in chapter.labs):
            console.print("\nNo lab of this chapter is written yet.")
        else:
            _say_what_can_be_verified(console, chapter.stack)
    if not no_serve:
        _serve(console, catalog.root, start.state_folder(catalog))
    console.print()
    first = next((lab for lab in labs if not lab.planned and lab.id not in state.verified()), None)
    if first is None:
        print_next(console, catalog, state)
        return
    folder = f"labs/{first.path.parent.name}/{first.path.name}"
    console.print(f"Read {folder}/README.md, then run", markup=False, soft_wrap=True)
    console.print(f"  .venv/bin/topeka watch {first.id}", markup=False)
    console.print(f"and write {folder}/src/{first.files[0]}.", markup=False, soft_wrap=True)


def _serve(console: "Console", root: Path, state_folder: Path) -> None:
    """Start JupyterLab and the dashboard, both at a time, and say where they are."""
    from concurrent.futures import ThreadPoolExecutor

    from grader import dashboard_server, notebook_server
    from grader.background import ServerFailed

    with ThreadPoolExecutor(1) as other:
        dashboard = other.submit(dashboard_server.start, root, state_folder)
        notebooks = notebook_server.start(root, state_folder)
        console.print(f"\nJupyterLab: {notebooks.url}", markup=False, soft_wrap=True)
        try:
            console.print(f"Dashboard:  {dashboard.result()}", markup=False, soft_wrap=True)
        except ServerFailed as error:  # the labs can be done without
            print(f"topeka: {error}", file=sys.stderr)
    console.print(
        "`make stop` ends both. The link signs one browser in; `topeka dashboard` prints the next.",
        style="dim",
    )


def _say_what_can_be_verified(console: "Console", stack: str) -> None:
    here = start.local_stack(None)
    order = [name.value for name in StackName]
    if order.index(stack) <= order.index(here):
        return
    console.print(
        f"\nThis chapter is written for the {stack} stack; this machine has {here}. The CPU tier of every lab "
        "(interpreted kernels, gloo ranks, small sizes) is verified here. Tests that need a GPU are reported "
        "as not verified here, never as passed.",
        soft_wrap=True,
    )


@commands.command()
def dashboard() -> None:
    """Start the dashboard in the background, unless it runs, and print the link that signs a browser in."""
    from grader import dashboard_server

    catalog = start.catalog()
    print(dashboard_server.start(catalog.root, start.state_folder(catalog)))


@commands.command()
def stop() -> None:
    """End the JupyterLab and the dashboard that `topeka lab` started."""
    from grader import dashboard_server, notebook_server

    state_folder = start.state_folder(start.catalog())
    for name, server in (("JupyterLab", notebook_server), ("The dashboard", dashboard_server)):
        ended = server.stop(state_folder)
        start.console().print(f"{name} is stopped." if ended else f"{name} of this checkout is not running.")
