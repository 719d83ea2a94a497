"""What this machine has, and what each stack lacks here. Returns data; the command line shows it."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from grader.catalog import Catalog
from grader.doctor import environment
from grader.doctor.answer import ask
from grader.doctor.engine import WORKSPACE_IMAGE, Engine, ask_engine
from grader.doctor.finding import Finding, Frozen, State, ok, warning
from grader.doctor.stacks import GPUS_OF, Facts, StackReadiness, find_compiler, readiness
from grader.doctor.surroundings import Surroundings, look_around, shared_memory_finding
from grader.gpus import ask_nvml
from grader.machine import Machine, describe
from grader.sandbox import SANDBOX_IMAGE

__all__ = ["SANDBOX_IMAGE", "WORKSPACE_IMAGE", "Finding", "Findings", "StackReadiness", "State", "examine"]


class Findings(Frozen):
    """Everything an examination found.

    Attributes:
        machine: hardware and versions.
        findings: one by one.
        stacks: what each needs and lacks, smallest stack first.
    """

    machine: Machine
    findings: tuple[Finding, ...]
    stacks: tuple[StackReadiness, ...]


def examine(root: Path, catalog: Catalog | None = None) -> Findings:
    """Examine this machine, in about a second at most.

    Args:
        root: the checkout.
        catalog: the course, to tell which chapters need which stack.
    """
    with ThreadPoolExecutor() as pool:
        engine_later = pool.submit(ask_engine)
        setup_later = pool.submit(environment.setup, root)
        node_later = pool.submit(ask, "node", "--version")
        nvml = ask_nvml()
        machine, around = describe(nvml), look_around()
        engine = engine_later.result()
        findings = (
            environment.python(machine),
            setup_later.result(),
            environment.torch(machine),
            environment.package("JupyterLab", "jupyterlab"),
            environment.node(node_later.result()),
            environment.cores(machine),
            environment.memory(machine),
            *environment.disks(root),
            environment.gpus(machine),
            *shared_memory_finding(around),
            *_docker(engine, around),
        )
    facts = Facts(machine=machine, nvml=nvml, around=around, engine=engine, compiler=find_compiler())
    stacks = tuple(readiness(stack, facts, catalog) for stack in GPUS_OF)
    return Findings(machine=machine, findings=findings, stacks=stacks)


def _docker(engine: Engine, around: Surroundings) -> list[Finding]:
    """Say what Docker adds; a learner can do without."""
    if around.grader_socket:
        return [ok("sandbox", "the grader's container beside this one")]
    without = "without {} tests run on this machine as your own user, which is not isolated"
    if not engine.version:
        return [warning("Docker Engine", engine.trouble, f"not needed: {without.format('it')}")]
    found = ok("Docker Engine", engine.version)
    name, built = "sandbox images", sorted(i for i in engine.images if i.startswith(f"{SANDBOX_IMAGE}:"))
    if built:
        return [found, ok(name, ", ".join(built))]
    return [
        found,
        warning(name, f"none ({SANDBOX_IMAGE}:cpu, :cuda, :multi-gpu)", without.format("them")),
    ]
