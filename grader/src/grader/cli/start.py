"""What every command starts from: options, the course, its state and a sandbox."""

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from grader.errors import COULD_NOT_RUN, TopekaError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from grader.catalog import Catalog, Lab
    from grader.report import Status
    from grader.sandbox import Sandbox
    from grader.state import State

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


def fail(message: str, code: int) -> NoReturn:
    """Say why on standard error and exit."""
    print(f"topeka: {message}", file=sys.stderr)
    sys.exit(code)


def console() -> "Console":
    """Return a console that never wraps what goes to a file or a pipe."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200  # nobody wraps a file or a pipe at 80 columns
    return console


def catalog() -> "Catalog":
    """Return the course that the current folder is in, or else the one this program is in."""
    from grader.catalog import CourseNotFound, find_root, load

    try:
        root = find_root(Path.cwd())
    except CourseNotFound:
        root = find_root(Path(__file__).resolve())  # installed from a checkout: use that one
    return load(root)


def state(catalog: "Catalog") -> "State":
    """Return what the checkout remembers."""
    from grader.state import State

    return State(state_folder(catalog))


def state_folder(catalog: "Catalog") -> Path:
    """Return the folder for everything the checkout remembers."""
    return catalog.root / ".topeka"


def cache(catalog: "Catalog") -> Path:
    """Return the folder for what can be made again."""
    return state_folder(catalog) / "cache"


def one_lab(catalog: "Catalog", target: str) -> "Lab":
    """Return the one lab that `target` names."""
    labs = catalog.select([target])
    if len(labs) != 1:
        raise UsageError(f"{target} names {len(labs)} labs; this command takes one, such as {labs[0].id}")
    return labs[0]


def one_written_lab(catalog: "Catalog", target: str) -> "Lab":
    """Return the one lab that `target` names, which must be written."""
    lab = one_lab(catalog, target)
    if lab.planned:
        raise TopekaError(f"{lab.id} ({lab.title}) is planned and not yet written")
    return lab


def statuses(state: "State") -> "dict[str, Status]":
    """Return the status of the newest attempt of every lab that has one."""
    return {lab: attempt.report.status for lab, attempt in state.last_by_lab().items()}


def local_sandbox() -> "Sandbox":
    """Return a sandbox in this environment, started."""
    from grader.sandbox.local import LocalSandbox

    sandbox = LocalSandbox()
    sandbox.start()
    return sandbox


def sandbox(name: SandboxName, stack: StackName | None, labs: "Sequence[Lab]") -> "tuple[Sandbox, str]":
    """Return the sandbox to grade `labs` in, started, and its stack.

    Docker takes the largest stack among the labs' whose image the engine has, or exactly `stack`.
    """
    from grader.sandbox import neighbour

    if name is not SandboxName.LOCAL and (path := neighbour.socket_path()):
        return neighbour.NeighbourSandbox(path), local_stack(stack)
    order = list(StackName)
    largest = max((StackName(lab.stack) for lab in labs), key=order.index, default=StackName.CPU)
    wanted = [stack] if stack else list(dict.fromkeys([largest, StackName.CPU]))
    if name is not SandboxName.LOCAL and may_have_engine(name):
        from grader.sandbox import docker

        there = [s for s in wanted if docker.is_available(s)]
        if there or name is SandboxName.DOCKER:
            sandbox = docker.DockerSandbox(
                (there or wanted)[0], preload=labs[0].preload if labs else ("torch",)
            )
            sandbox.start()
            return sandbox, (there or wanted)[0]
    return local_sandbox(), local_stack(stack)


def may_have_engine(name: SandboxName) -> bool:
    """Whether to ask for a Docker Engine."""
    # Asking for an engine takes longer than a lab's tests; where there can be none, nobody waits.
    return name is SandboxName.DOCKER or "DOCKER_HOST" in os.environ or Path("/var/run/docker.sock").exists()


def local_stack(wanted: StackName | None) -> str:
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


def console_for_progress(json_to: str | None) -> "Console | None":
    """Return a console on standard error, unless nobody looks at it or standard output is a report."""
    from rich.console import Console

    console = Console(stderr=True)
    return console if console.is_terminal and json_to != "-" else None
