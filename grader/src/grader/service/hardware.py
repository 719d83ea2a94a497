"""Which work a machine can verify: what labs need, and what GPUs and memory are here.

Work waits in one queue for each kind of need, and its name says the need: `cpu`, `cpu-8g` (8 GiB of memory), `cuda`,
`cuda-40vram` (a GPU of 40 GiB), `multi-gpu-x4` (four GPUs). A worker listens to the queues whose needs its machine
meets.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from grader.catalog import Catalog, Lab
from grader.errors import TopekaError
from grader.gpus import Gpu

STACKS = ("cpu", "cuda", "multi-gpu")
_GPUS = {"cpu": 0, "cuda": 1, "multi-gpu": 2}
# What every machine that grades has; a lab that may use more waits in a queue of its own.
_USUAL_GB = 4.0
# Drivers and firmware keep a little of what is printed on the box: 80 GB are 79.6 GiB to NVML, 24 GB are 23.5 GiB.
_NEARLY = 0.94


class UnfitMachine(TopekaError):
    """This machine cannot verify what it was asked to; the message says why."""


@dataclass(frozen=True)
class Needs:
    """What grading a lab needs.

    Attributes:
        stack: `cpu`, `cuda` or `multi-gpu`.
        gpus: how many.
        gpu_memory_gb: GiB that each has.
        memory_gb: GiB of the machine's memory.
    """

    stack: str
    gpus: int
    gpu_memory_gb: float
    memory_gb: float

    @property
    def queue(self) -> str:
        """Name of the queue for this need."""
        name = self.stack
        if self.gpus != _GPUS[self.stack]:
            name += f"-x{self.gpus}"
        if self.gpu_memory_gb:
            name += f"-{self.gpu_memory_gb:g}vram"
        if self.memory_gb > _USUAL_GB:
            name += f"-{self.memory_gb:g}g"
        return name

    @property
    def words(self) -> str:
        """What a machine must have, such as `a GPU of 40 GiB`; empty if every machine has it."""
        found = []
        if self.gpus:
            found.append("a GPU" if self.gpus == 1 else f"{self.gpus} GPUs")
            found[0] += f" of {self.gpu_memory_gb:g} GiB" if self.gpu_memory_gb else ""
        if self.memory_gb > _USUAL_GB:
            found.append(f"{self.memory_gb:g} GiB of memory")
        return " and ".join(found)

    def met_by(self, stack: str, gpus: Sequence[Gpu], memory_bytes: int) -> bool:
        """Whether a machine of this stack, with these GPUs and this memory, can verify the lab."""
        large = [g for g in gpus if (g.memory_bytes or 0) >= self.gpu_memory_gb * _NEARLY * (1 << 30)]
        return (
            STACKS.index(self.stack) <= STACKS.index(stack)
            and len(large) >= self.gpus
            and (self.memory_gb <= _USUAL_GB or memory_bytes >= self.memory_gb * _NEARLY * (1 << 30))
        )


def needs_of(lab: Lab) -> Needs:
    """Return what the lab's `chapter.toml` says it needs."""
    gpus = _GPUS[lab.stack] if lab.gpus is None else lab.gpus
    return Needs(lab.stack, gpus, lab.gpu_memory_gb, lab.memory_gb)


def queue_of(lab: Lab) -> str:
    """Return the queue that a lab's submissions wait in."""
    return needs_of(lab).queue


def all_queues(catalog: Catalog) -> tuple[str, ...]:
    """Return every queue that the course's labs wait in."""
    return tuple(sorted({queue_of(lab) for lab in catalog.labs}))


def queues_here(catalog: Catalog, stack: str, gpus: Sequence[Gpu], memory_bytes: int) -> tuple[str, ...]:
    """Return the queues that a machine can take work from.

    Args:
        catalog: the course.
        stack: the largest to take work for.
        gpus: that a grading sees.
        memory_bytes: of the machine.
    """
    found = {needs_of(lab) for lab in catalog.labs}
    return tuple(sorted({n.queue for n in found if n.met_by(stack, gpus, memory_bytes)}))


def stack_here(wanted: str | None, gpus: Sequence[Gpu], why_not: str = "") -> str:
    """Return the largest stack that these GPUs can verify, or the wanted one.

    Args:
        wanted: None for the largest.
        gpus: that a grading sees.
        why_not: why there are no more, as NVML says it.

    Raises:
        UnfitMachine: the wanted one needs more GPUs.
    """
    if wanted is None:
        return "cpu" if not gpus else "cuda" if len(gpus) == 1 else "multi-gpu"
    if len(gpus) < _GPUS[wanted]:
        have = "no GPU" if not gpus else f"{len(gpus)} GPU"
        reason = f" ({why_not})" if why_not else ""
        raise UnfitMachine(
            f"--stacks {wanted}: gradings here see {have}{reason}, and {wanted} needs {_GPUS[wanted]}: start this "
            "worker on a machine that has them, or leave --stacks out to take what this machine can verify"
        )
    return wanted
