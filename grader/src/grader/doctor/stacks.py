"""Whether a stack is ready on this machine: in this environment, and in its container."""

import shutil

from grader.catalog import Catalog, Stack
from grader.doctor.engine import WORKSPACE_IMAGE, Engine, stack_findings
from grader.doctor.finding import Finding, Frozen, missing, ok, warning
from grader.doctor.nvidia import GPUS, nvidia_findings
from grader.doctor.surroundings import Surroundings, shared_memory_finding
from grader.gpus import Nvml, NvmlCode
from grader.machine import Machine

GPUS_OF: dict[Stack, int] = {"cpu": 0, "cuda": 1, "multi-gpu": 2}
"""How many NVIDIA GPUs each stack needs at least, smallest stack first."""


class Facts(Frozen):
    """Everything a stack is judged by.

    Attributes:
        machine: hardware and versions.
        nvml: what NVIDIA's management library answered.
        around: where this process runs.
        engine: what the Docker Engine said.
        compiler: the C compiler's path; empty if there is none.
    """

    machine: Machine
    nvml: Nvml
    around: Surroundings
    engine: Engine
    compiler: str = ""


class StackReadiness(Frozen):
    """What was found out about a stack on this machine.

    Attributes:
        stack: `cpu`, `cuda` or `multi-gpu`.
        chapters: ids of the chapters written for it, such as `ch01`.
        here: what it needs in this environment.
        in_docker: what it needs to run in its container.
    """

    stack: Stack
    chapters: tuple[str, ...] = ()
    here: tuple[Finding, ...]
    in_docker: tuple[Finding, ...]

    @property
    def lacks_here(self) -> tuple[str, ...]:
        """What keeps its tests from being verified in this environment."""
        return _lacks(self.here)

    @property
    def lacks_in_docker(self) -> tuple[str, ...]:
        """What keeps them from being verified in the stack's image."""
        return _lacks(self.in_docker)

    @property
    def ready(self) -> bool:
        """Whether one of the two ways is open."""
        return not self.lacks_here or not self.lacks_in_docker


def _lacks(findings: tuple[Finding, ...]) -> tuple[str, ...]:
    return tuple(f"{f.name} ({f.detail})" for f in findings if f.state == "missing")


def readiness(stack: Stack, facts: Facts, catalog: Catalog | None = None) -> StackReadiness:
    """Judge a stack.

    Args:
        stack: which.
        facts: what was found out.
        catalog: the course, to tell which chapters need the stack.
    """
    chapters = catalog.chapters if catalog else ()
    return StackReadiness(
        stack=stack,
        chapters=tuple(f"ch{c.number:02d}" for c in chapters if c.stack == stack),
        here=tuple(_here(stack, facts)),
        in_docker=tuple(_in_docker(stack, facts)),
    )


def _here(stack: Stack, facts: Facts) -> list[Finding]:
    wanted = GPUS_OF[stack]
    findings = [_torch(stack, facts)]
    if wanted:
        findings += nvidia_findings(facts.nvml, facts.around, wanted, count_hidden=False)
        findings.append(
            ok("C compiler", facts.compiler)
            if facts.compiler
            else missing("C compiler", "none; Triton calls one", "sudo apt-get install gcc")
        )
    findings += shared_memory_finding(facts.around, needed=wanted > 1)
    if facts.around.grader_socket:
        findings.append(ok("sandbox", "tests run in the grader's container beside this one"))
    elif facts.around.container and not facts.engine.version:
        findings.append(
            warning(
                "sandbox",
                f"this machine is itself a container ({facts.around.container}): tests run in the local sandbox, "
                "which is not isolated",
                "nothing to repair; grade code of others only where a Docker Engine answers",
            )
        )
    return findings


def _torch(stack: Stack, facts: Facts) -> Finding:
    found, image = facts.machine.libraries.get("torch"), facts.around.image
    if found is None:
        return missing("torch", "not installed", "make setup")
    if GPUS_OF[stack] and found.endswith("+cpu"):
        remedy = f"use the image {WORKSPACE_IMAGE}:{stack}" if image else "TOPEKA_TORCH=pypi make setup"
        return missing("CUDA build of torch", f"this is {found}", remedy)
    return ok("torch", found)


def _in_docker(stack: Stack, facts: Facts) -> list[Finding]:
    around, wanted = facts.around, GPUS_OF[stack]
    return [
        *(_gpus_of_engine(facts, wanted) if wanted else []),
        *stack_findings(facts.engine, stack, in_container=bool(around.container)),
    ]


def _gpus_of_engine(facts: Facts, wanted: int) -> list[Finding]:
    """Judge the GPUs beside the engine, which need not be this machine's."""
    engine, around, nvml = facts.engine, facts.around, facts.nvml
    if engine.version and engine.is_remote:
        return [
            warning(
                GPUS,
                f"cannot be examined from here: the engine is at {engine.endpoint}",
                "run this command on that machine too",
            )
        ]
    if engine.version and around.container and around.nvidia_hardware and nvml.code != NvmlCode.SUCCESS:
        return [
            warning(
                GPUS,
                "cannot be examined from here: this container has none, the engine outside may",
                "run this command outside the container too",
            )
        ]
    return nvidia_findings(nvml, around, wanted, count_hidden=True)


def find_compiler() -> str:
    """Return the path of a C compiler, empty if there is none."""
    return next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), "")
