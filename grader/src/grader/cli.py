"""The command `topeka`.

Heavy modules are imported inside the commands that need them: every command must start in less
than 0.3 s, and torch is imported by the runner's own process only.
"""

import json
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from grader.errors import COULD_NOT_RUN, FAILED, OK, TopekaError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from rich.progress import TaskID

    from grader.catalog import Catalog, Lab
    from grader.report import LabReport, Report, Status
    from grader.sandbox import Sandbox
    from grader.service.settings import Settings
    from grader.state import State

app = typer.Typer(
    name="topeka",
    help="A course on transformers, from dot-product attention to Triton kernels.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help: drawing boxes would double the start-up time
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Targets = Annotated[list[str], typer.Argument(metavar="TARGET...", help="ch01/lab01, ch01 or all")]
Target = Annotated[str, typer.Argument(metavar="TARGET", help="a lab, such as ch01/lab01")]
Code = Annotated[str, typer.Option("--code", help="code under test: src, solutions or a folder")]


class SandboxName(StrEnum):
    """Where a grading runs."""

    AUTO = "auto"
    LOCAL = "local"
    DOCKER = "docker"


class TrustName(StrEnum):
    """Whether the code under test shares a process with its tests."""

    SAME_PROCESS = "same_process"
    STRICT = "strict"


class StackName(StrEnum):
    """The environment a grading must run in."""

    CPU = "cpu"
    CUDA = "cuda"
    MULTI_GPU = "multi-gpu"


def main() -> None:
    """Run the command; every expected error is one sentence on standard error."""
    try:
        app()
    except TopekaError as error:
        _fail(str(error), error.exit_code)
    except BrokenPipeError:
        # The reader went away (`topeka list | head`); nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILED)
    except KeyboardInterrupt:
        _fail("stopped", 130)
    except OSError as error:
        _fail(f"{error.filename or 'the system'}: {error.strerror or error}", COULD_NOT_RUN)


def _fail(message: str, code: int) -> NoReturn:
    print(f"topeka: {message}", file=sys.stderr)
    sys.exit(code)


# --- what every command starts from ---------------------------------------------------------


def _console() -> "Console":
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200  # nobody wraps a file or a pipe at 80 columns
    return console


def _catalog() -> "Catalog":
    from grader.catalog import CourseNotFound, find_root, load

    try:
        root = find_root(Path.cwd())
    except CourseNotFound:
        root = find_root(Path(__file__).resolve())  # installed from a checkout: use that one
    return load(root)


def _state(catalog: "Catalog") -> "State":
    from grader.state import State

    return State(_state_folder(catalog))


def _state_folder(catalog: "Catalog") -> Path:
    return catalog.root / ".topeka"


def _cache(catalog: "Catalog") -> Path:
    return _state_folder(catalog) / "cache"


def _one_lab(catalog: "Catalog", target: str) -> "Lab":
    labs = catalog.select([target])
    if len(labs) != 1:
        raise UsageError(f"{target} names {len(labs)} labs; this command takes one, such as {labs[0].id}")
    return labs[0]


def _one_written_lab(catalog: "Catalog", target: str) -> "Lab":
    lab = _one_lab(catalog, target)
    if lab.planned:
        raise TopekaError(f"{lab.id} ({lab.title}) is planned and not yet written")
    return lab


def _statuses(state: "State") -> "dict[str, Status]":
    return {lab: attempt.report.status for lab, attempt in state.last_by_lab().items()}


def _local_sandbox() -> "Sandbox":
    from grader.sandbox.local import LocalSandbox

    sandbox = LocalSandbox()
    sandbox.start()
    return sandbox


def _sandbox(name: SandboxName, stack: StackName | None, labs: "Sequence[Lab]") -> "tuple[Sandbox, str]":
    """Return the sandbox to grade `labs` in, started, and its stack.

    Docker takes the largest stack among the labs' whose image the engine has, or exactly `stack`.
    """
    from grader.sandbox import neighbour

    if name is not SandboxName.LOCAL and (path := neighbour.socket_path()):
        return neighbour.NeighbourSandbox(path), _local_stack(stack)
    order = list(StackName)
    largest = max((StackName(lab.stack) for lab in labs), key=order.index, default=StackName.CPU)
    wanted = [stack] if stack else list(dict.fromkeys([largest, StackName.CPU]))
    if name is not SandboxName.LOCAL and _may_have_engine(name):
        from grader.sandbox import docker

        there = [s for s in wanted if docker.is_available(s)]
        if there or name is SandboxName.DOCKER:
            sandbox = docker.DockerSandbox(
                (there or wanted)[0], preload=labs[0].preload if labs else ("torch",)
            )
            sandbox.start()
            return sandbox, (there or wanted)[0]
    return _local_sandbox(), _local_stack(stack)


def _may_have_engine(name: SandboxName) -> bool:
    # Asking for an engine takes longer than a lab's tests; where there can be none, nobody waits.
    return name is SandboxName.DOCKER or "DOCKER_HOST" in os.environ or Path("/var/run/docker.sock").exists()


def _local_stack(wanted: StackName | None) -> str:
    """Return the stack of this environment, which must be the wanted one if one is."""
    from grader.machine import describe

    machine = describe()
    cuda_build = "+cpu" not in machine.libraries.get("torch", "+cpu")
    here = "cpu" if not (cuda_build and machine.gpus) else "cuda" if len(machine.gpus) == 1 else "multi-gpu"
    order = list(StackName)
    if wanted is not None and order.index(wanted) > order.index(StackName(here)):
        raise TopekaError(
            f"--stack {wanted}: this environment is the {here} stack "
            f"(torch {machine.libraries.get('torch', 'not installed')}, {len(machine.gpus)} GPUs); "
            "`topeka doctor` says what is missing",
            COULD_NOT_RUN,
        )
    return wanted or here


# --- working on labs ---------------------------------------------------------------------------


@app.command("list")
def list_labs(
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """List all chapters and labs with their status."""
    catalog = _catalog()
    statuses = _statuses(_state(catalog))
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

    console = _console()
    console.print(lab_table(catalog, catalog.chapters, statuses), soft_wrap=not console.is_terminal)


@app.command("next")
def next_lab() -> None:
    """Say which lab comes next and how to begin."""
    catalog = _catalog()
    _print_next(_console(), catalog, _state(catalog))


def _print_next(console: "Console", catalog: "Catalog", state: "State") -> None:
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


@app.command()
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

    catalog = _catalog()
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
    where, here = _sandbox(sandbox, stack, labs)
    try:
        with _Progress(_console_for_progress(json_to)) as progress:
            report = grade_labs(
                catalog,
                labs,
                where,
                code=code,
                stack=here,
                slow=slow,
                trust=Trust(trust.value),
                timeout_s=timeout,
                cache=_cache(catalog),
                on_event=progress.event,
                on_lab=progress.lab,
            )
    finally:
        where.close()
    if code == "src":
        _remember(_state(catalog), report)
    if json_to == "-":
        print(report.model_dump_json(indent=2))
    else:
        if json_to is not None:
            _write_whole(Path(json_to), report.model_dump_json(indent=2) + "\n")
        from grader.terminal import print_report

        print_report(_console(), catalog, report)
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


def _console_for_progress(json_to: str | None) -> "Console | None":
    from rich.console import Console

    console = Console(stderr=True)
    return console if console.is_terminal and json_to != "-" else None


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


@app.command()
def watch(targets: Targets) -> None:
    """Grade again on every save, until Ctrl-C."""
    import time

    from grader.grading import grade as grade_labs
    from grader.terminal import print_report
    from grader.watch import on_save

    catalog = _catalog()
    labs = tuple(lab for lab in catalog.select(targets) if not lab.planned)
    if not labs:
        raise TopekaError(f"{' '.join(targets)}: planned and not yet written")
    state, console = _state(catalog), _console()
    here, sandbox = _local_stack(None), _local_sandbox()

    def again(changed: "Sequence[Lab]") -> None:
        started = time.monotonic()
        report = grade_labs(catalog, changed, sandbox, stack=here, cache=_cache(catalog))
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


@app.command()
def hint(
    target: Target,
    restart: Annotated[bool, typer.Option("--restart", help="begin again with the first hint")] = False,
) -> None:
    """Reveal one more hint, from a nudge to the solution's own lines."""
    from grader.hint import topic

    catalog = _catalog()
    lab, state, console = _one_written_lab(catalog, target), _state(catalog), _console()
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


@app.command()
def solution(
    target: Target,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="do not ask")] = False,
) -> None:
    """Show our solution; asks first if you have not verified the lab."""
    from rich.syntax import Syntax

    catalog = _catalog()
    lab, console = _one_written_lab(catalog, target), _console()
    if lab.id not in _state(catalog).verified() and not yes:
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


@app.command()
def reset(
    target: Target,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="do not ask")] = False,
) -> None:
    """Bring back the skeleton of a lab; your files are kept in .topeka/backups/."""
    from datetime import datetime

    from grader.skeleton import as_shipped

    catalog = _catalog()
    lab, console = _one_written_lab(catalog, target), _console()
    shipped = {
        name: as_shipped(catalog, lab, name, _state_folder(catalog) / "skeletons") for name in lab.files
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
    backup = _state_folder(catalog) / "backups" / lab.path.parent.name / lab.path.name / stamp
    if current:
        backup.mkdir(parents=True)
        for name in current:
            (backup / name).write_bytes((lab.path / "src" / name).read_bytes())
        console.print(f"Your files are in {backup.relative_to(catalog.root)}", soft_wrap=True, markup=False)
    for name, text in shipped.items():
        _write_whole(lab.path / "src" / name, text)
    console.print(f"{lab.id} is as shipped again.")


@app.command()
def progress() -> None:
    """Draw the 54 labs and 12 milestones."""
    from grader.progress import print_progress

    catalog = _catalog()
    print_progress(_console(), catalog, _state(catalog))


# --- the machine and the course ------------------------------------------------------------------


@app.command()
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

    catalog = _catalog()
    findings = examine(catalog.root, catalog)
    if stack is None:
        if as_json:
            print(findings.model_dump_json(indent=2))
        else:
            print_findings(_console(), findings)
        return
    found = next(each for each in findings.stacks if each.stack == stack.value)
    if as_json:
        print(found.model_dump_json(indent=2))
    else:
        print_stack(_console(), found)
    raise typer.Exit(OK if found.ready else FAILED)


@app.command()
def lab(
    target: Annotated[str, typer.Argument(metavar="CHAPTER", help="a chapter, such as ch01 or 1")],
    no_serve: Annotated[bool, typer.Option("--no-serve", help="do not start JupyterLab")] = False,
) -> None:
    """Begin work on a chapter: start JupyterLab, list the labs, say what to do next."""
    from grader.skeleton import snapshot
    from grader.terminal import lab_table

    catalog = _catalog()
    state, console = _state(catalog), _console()
    labs = catalog.select([target])
    chapters = [c for c in catalog.chapters if any(lab in c.labs for lab in labs)]
    try:
        snapshot(catalog, _state_folder(catalog) / "skeletons")
    except OSError as error:
        print(f"topeka: no copy of the skeletons is kept: {error}", file=sys.stderr)
    for chapter in chapters:
        console.print(f"Chapter {chapter.number}: {chapter.title}", style="bold", markup=False)
        console.print(f"Milestone: {chapter.milestone.claim}\n", markup=False, soft_wrap=True)
        console.print(lab_table(catalog, [chapter], _statuses(state)), soft_wrap=not console.is_terminal)
        if all(lab.planned for lab in chapter.labs):
            console.print("\nNo lab of this chapter is written yet.")
        else:
            _say_what_can_be_verified(console, chapter.stack)
    if not no_serve:
        from grader import notebook_server

        server = notebook_server.start(catalog.root, _state_folder(catalog))
        console.print(f"\nJupyterLab: {server.url}", markup=False, soft_wrap=True)
        console.print("`make stop` ends it.", style="dim")
    console.print()
    first = next((lab for lab in labs if not lab.planned and lab.id not in state.verified()), None)
    if first is None:
        _print_next(console, catalog, state)
        return
    folder = f"labs/{first.path.parent.name}/{first.path.name}"
    console.print(f"Read {folder}/README.md, then run", markup=False, soft_wrap=True)
    console.print(f"  .venv/bin/topeka watch {first.id}", markup=False)
    console.print(f"and write {folder}/src/{first.files[0]}.", markup=False, soft_wrap=True)


def _say_what_can_be_verified(console: "Console", stack: str) -> None:
    here = _local_stack(None)
    order = [name.value for name in StackName]
    if order.index(stack) <= order.index(here):
        return
    console.print(
        f"\nThis chapter is written for the {stack} stack; this machine has {here}. The CPU tier of every lab "
        "(interpreted kernels, gloo ranks, small sizes) is verified here. Tests that need a GPU are reported "
        "as not verified here, never as passed.",
        soft_wrap=True,
    )


@app.command()
def stop() -> None:
    """End the JupyterLab that `topeka lab` started."""
    from grader import notebook_server

    catalog = _catalog()
    ended = notebook_server.stop(_state_folder(catalog))
    _console().print("JupyterLab is stopped." if ended else "No JupyterLab of this checkout is running.")


# --- the service ---------------------------------------------------------------------------------

Database = Annotated[
    str | None,
    typer.Option(
        "--database", metavar="URL", help="sqlite:///FILE or postgresql://...; also TOPEKA_DATABASE_URL"
    ),
]


def _service_settings(catalog: "Catalog", **chosen: object) -> "Settings":
    try:
        from grader.service.settings import Settings
    except ImportError as error:
        raise TopekaError(
            f"the service is not installed here ({error.name} is missing): make setup"
        ) from error
    return Settings.from_environment(_state_folder(catalog), **chosen)


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="address to listen on; 127.0.0.1 unless chosen")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="8300 unless chosen")] = None,
    database: Database = None,
    sandbox: Annotated[SandboxName, typer.Option(envvar="TOPEKA_SANDBOX")] = SandboxName.AUTO,
) -> None:
    """Serve the grader's API; with SQLite, the default, grade on this machine too."""
    catalog = _catalog()
    settings = _service_settings(catalog, host=host, port=port, database_url=database)
    from grader.service.serve import serve as run

    written = [lab for lab in catalog.labs if not lab.planned]
    run(catalog, settings, lambda: _sandbox(sandbox, None, written), _cache(catalog))


@app.command()
def worker(
    stacks: Annotated[
        StackName | None, typer.Option("--stacks", help="the largest stack to take work for; what is here")
    ] = None,
    slot: Annotated[int, typer.Option(min=0, help="number of this worker on its machine")] = 0,
    database: Database = None,
    sandbox: Annotated[SandboxName, typer.Option(envvar="TOPEKA_SANDBOX")] = SandboxName.AUTO,
) -> None:
    """Grade what waits in the queue of TOPEKA_DATABASE_URL, as far as this machine can verify it."""
    catalog = _catalog()
    settings = _service_settings(catalog, database_url=database)
    from grader.service.serve import work as run

    written = [lab for lab in catalog.labs if not lab.planned]
    run(catalog, settings, lambda: _worker_sandbox(sandbox, stacks, written), stacks, slot, _cache(catalog))


def _worker_sandbox(
    name: SandboxName, stack: StackName | None, labs: "Sequence[Lab]"
) -> "tuple[Sandbox, str]":
    """Return the sandbox for the stack; whether the GPUs suffice is seen from within it."""
    if name is not SandboxName.LOCAL and _may_have_engine(name):
        return _sandbox(name, stack, labs)
    return _local_sandbox(), _local_stack(None)


@app.command()
def backup(
    file: Annotated[Path, typer.Argument(help="where the backup goes; it replaces what is there")],
    database: Database = None,
) -> None:
    """Back up the service's database to one file, while it runs; the queue is part of it."""
    settings = _service_settings(_catalog(), database_url=database)
    from grader.service import backup as backups
    from grader.service.serve import open_database

    made = backups.backup(open_database(settings), file)
    print(f"{file}: {sum(made.rows.values()):,} rows of {len(made.rows)} tables, checked; keep it private")


@app.command()
def restore(
    file: Annotated[Path, typer.Argument(help="made by `topeka backup`")],
    force: Annotated[bool, typer.Option("--force", help="replace a database that is not empty")] = False,
    database: Database = None,
) -> None:
    """Restore a backup, all of it or nothing. End servers and workers first; what waited then is graded after."""
    settings = _service_settings(_catalog(), database_url=database)
    from grader.service import backup as backups
    from grader.service.database import Database as Opened

    opened = Opened(settings.database_url)
    made = backups.restore(opened, file, force=force)
    opened.upgrade()  # a backup may be of an older version
    print(f"Restored {sum(made.rows.values()):,} rows of {len(made.rows)} tables as of {made.created}")


@app.command()
def retention(
    days: Annotated[
        float | None, typer.Option(min=0.001, help="instead of TOPEKA_KEEP_DAYS; older ones are deleted")
    ] = None,
    database: Database = None,
) -> None:
    """Delete final submissions older than so many days, now; the server does it every hour."""
    settings = _service_settings(_catalog(), database_url=database, keep_days=days)
    if settings.keep_days is None:
        raise UsageError("say how many days are kept: --days 365, or TOPEKA_KEEP_DAYS")
    from grader.service.serve import open_database
    from grader.service.upkeep import retain
    from grader.service.work_queue import WorkQueue

    opened = open_database(settings)
    print(f"Deleted {retain(opened, WorkQueue(opened), settings.keep_days):,} submissions.")


token_app = typer.Typer(help="Tokens of the service's users.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(token_app, name="token")


@token_app.command("create")
def token_create(
    name: Annotated[str, typer.Argument(help="of the user")],
    instructor: Annotated[bool, typer.Option("--instructor", help="who sees the class")] = False,
    database: Database = None,
) -> None:
    """Make a token and print it; it is shown this once."""
    from grader.service import accounts
    from grader.service.models import Role
    from grader.service.serve import open_database

    opened = open_database(_service_settings(_catalog(), database_url=database))
    with opened.session() as session:
        print(accounts.create_token(session, name, Role.INSTRUCTOR if instructor else Role.LEARNER))


@token_app.command("list")
def token_list(database: Database = None) -> None:
    """List tokens: id, user, role, when made, when revoked. The tokens themselves are nowhere."""
    from grader.service import accounts
    from grader.service.serve import open_database

    opened = open_database(_service_settings(_catalog(), database_url=database))
    with opened.session() as session:
        for token, user in accounts.tokens(session):
            ended = f"revoked {token.revoked:%Y-%m-%d %H:%M}" if token.revoked else "valid"
            print(f"{token.id}  {user.name}  {user.role}  {token.created:%Y-%m-%d %H:%M}  {ended}")


@token_app.command("revoke")
def token_revoke(
    token: Annotated[str, typer.Argument(help="its id, as in `topeka token list`, or the token")],
    database: Database = None,
) -> None:
    """End a token at once."""
    from grader.service import accounts
    from grader.service.serve import open_database

    opened = open_database(_service_settings(_catalog(), database_url=database))
    with opened.session() as session:
        accounts.revoke(session, token)
    print("Revoked.")


@app.command()
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

    catalog, started = _catalog(), time.monotonic()
    with _CheckProgress(_console_for_progress(None)) as progress:
        found = check_labs(
            catalog,
            catalog.select(targets),
            cache=_cache(catalog),
            write_signatures=write,
            slow=slow,
            on_run=progress.run,
        )
    print_checks(_console(), found, time.monotonic() - started)
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


@app.command()
def syllabus(
    write: Annotated[bool, typer.Option("--write", help="write SYLLABUS.md")] = False,
    check: Annotated[bool, typer.Option("--check", help="exit 1 if SYLLABUS.md is out of date")] = False,
) -> None:
    """Print the syllabus as the catalogue gives it, write SYLLABUS.md, or check it."""
    from grader import syllabus as pages

    catalog = _catalog()
    if write:
        pages.write(catalog.root)
    elif check:
        if pages.is_stale(catalog.root):
            _fail("SYLLABUS.md is out of date: run `topeka syllabus --write`", FAILED)
    else:
        print(pages.render(catalog), end="")


if __name__ == "__main__":
    main()
