"""Commands for authors."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from grader.cli import start
from grader.cli.start import Targets
from grader.errors import FAILED, OK

if TYPE_CHECKING:
    from rich.console import Console

    from grader.report import LabReport


commands = typer.Typer()


@commands.command()
def check(
    targets: Targets,
    write: Annotated[
        bool, typer.Option("--write", help="make the misconceptions' signatures.json anew from this run")
    ] = False,
    slow: Annotated[
        bool, typer.Option("--slow", help="the solution's run has the tests marked slow too")
    ] = False,
) -> None:
    """For authors: prove that skeletons fail, solutions pass and misconceptions are caught."""
    import time

    from grader.check import check as check_labs
    from grader.terminal_check import print_checks

    catalog, started = start.catalog(), time.monotonic()
    with _CheckProgress(start.console_for_progress(None)) as progress:
        found = check_labs(
            catalog,
            catalog.select(targets),
            cache=start.cache(catalog),
            write_signatures=write,
            slow=slow,
            on_run=progress.run,
        )
    print_checks(start.console(), found, time.monotonic() - started)
    raise typer.Exit(FAILED if any(lab.problems for lab in found) else OK)


class _CheckProgress:
    def __init__(self, console: "Console | None") -> None:
        self._console = console
        self._runs = 0

    def __enter__(self) -> "_CheckProgress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._console and self._runs:
            print("\r\033[K", end="", file=sys.stderr)

    def run(self, variant: object, report: "LabReport") -> None:
        self._runs += 1
        if self._console:
            print(f"\r\033[K{self._runs} runs; {report.lab}", end="", file=sys.stderr, flush=True)


@commands.command()
def syllabus(
    write: Annotated[bool, typer.Option("--write", help="write SYLLABUS.md")] = False,
    check: Annotated[bool, typer.Option("--check", help="exit 1 if SYLLABUS.md is out of date")] = False,
) -> None:
    """Print the syllabus as the catalogue gives it, write SYLLABUS.md, or check it."""
    from grader import syllabus as pages

    catalog = start.catalog()
    if write:
        pages.write(catalog.root)
    elif check:
        if pages.is_stale(catalog.root):
            start.fail("SYLLABUS.md is out of date: run `topeka syllabus --write`", FAILED)
    else:
        print(pages.render(catalog), end="")
