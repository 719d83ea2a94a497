"""What a `chapter.toml` says: a chapter, its milestone and its labs."""

import keyword
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Phase = Literal["foundation", "attention variants", "production", "hardware"]
Stack = Literal["cpu", "cuda", "multi-gpu"]

# Modules that labs and their tests import from elsewhere; a learner's file must not hide them. The
# last line has modules of Python 3.14 and 3.15, which an older interpreter does not list.
_LIBRARIES = """
    bitsandbytes datasets einops evaluate fla flash_attn flax gguf hypothesis jax jaxlib kernels llama_cpp
    matplotlib numpy openai outlines outlines_core peft pytest safetensors tokenizers torch torchao
    transformers triton vllm xgrammar
    conftest grader setup shared solutions src tests
    annotationlib compression profiling
"""
_TAKEN = sys.stdlib_module_names | frozenset(_LIBRARIES.split())


def _importable(name: str) -> str:
    stem = name.removesuffix(".py")
    if stem in _TAKEN:
        raise ValueError(f"which would hide the module `{stem}`")
    if keyword.iskeyword(stem):
        raise ValueError("which tests could not import")
    if stem.startswith("test_"):
        raise ValueError("which pytest would take for tests")
    return name


Line = Annotated[str, Field(pattern=r"^\S(.*\S)?$")]
LabFolder = Annotated[str, Field(pattern=r"^lab\d\d(_[a-z0-9]+)+$")]
LabId = Annotated[str, Field(pattern=r"^ch\d\d/lab\d\d$")]
FileName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*\.py$"), AfterValidator(_importable)]
Module = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$")]


def _list(allowed: str, *, fewest: int = 0, default: Any = ...) -> Any:
    """A field whose TOML list becomes a tuple."""
    return Field(default, strict=False, min_length=fewest, description=allowed)


class _Table(BaseModel):
    """A table of the file. A field's `description` is what error messages call allowed."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Milestone(_Table):
    """A chapter's measured claim.

    Attributes:
        lab: folder of the lab whose tests measure it.
        claim: what the chapter promises, in words.
        measure: what exactly is measured.
        unit: of `promised` and `ours`.
        better: whether a `lower` or a `higher` measurement is better.
        promised: what a learner's code reaches.
        ours: what the course's solutions reach.
        notes: further numbers the solutions reach, in words.
    """

    lab: LabFolder = Field(description="the folder of one of this chapter's labs")
    claim: Line = Field(description="one line of text")
    measure: Line = Field(description="one line of text")
    unit: Line = Field(description="one line of text")
    better: Literal["lower", "higher"] = Field(description='"lower" or "higher"')
    promised: float = Field(description="a finite number")
    ours: float = Field(description="a finite number")
    notes: tuple[Line, ...] = _list("a list of lines of text", default=())


class Lab(_Table):
    """One lab.

    Attributes:
        path: its folder, absolute.
        folder: the folder's name.
        title: a few words.
        summary: one line.
        minutes: how long a learner takes.
        files: names of the files a learner writes, relative to `src/`.
        planned: whether it is announced but not yet written.
        stack: the environment it is written for; the chapter's unless given.
        also: stacks where more of it can be verified; the chapter's unless `stack` or `also` is given.
        preload: modules the grading process imports before it forks.
        uses: ids of earlier labs whose solutions the tests may import.
        data: texts that its tests marked slow train on; a sandbox without network is handed them.
        strict: whether its code can run in another process than its tests (`topeka grade --trust strict`).
        timeout: seconds one grading may take.
        memory_gb: GiB of memory one grading may use.
        gpus: how many GPUs its tests want; the service gives it to workers that have as many. Unless given, as many
            as the stack means: none, one or two.
        gpu_memory_gb: GiB that each of those GPUs must have.
    """

    path: Path = Field(repr=False, description="nothing, this key is not for the file")
    folder: LabFolder = Field(description="lab, two digits and a name, such as lab01_dot_product")
    title: Line = Field(description="one line of text")
    summary: Line = Field(description="one line of text")
    minutes: int = Field(ge=5, le=600, description="a whole number from 5 to 600")
    files: tuple[FileName, ...] = _list(
        "a list of Python files, lower-case, none named like a module the labs import", fewest=1
    )
    planned: bool = Field(default=False, description="true or false")
    stack: Stack = Field(description='"cpu", "cuda" or "multi-gpu"')
    also: tuple[Stack, ...] = _list('a list of "cpu", "cuda", "multi-gpu"')
    preload: tuple[Module, ...] = _list("a list of module names", default=("torch",))
    uses: tuple[LabId, ...] = _list("a list of ids of earlier labs, such as ch03/lab03", default=())
    data: tuple[Literal["tiny_shakespeare"], ...] = _list('a list of "tiny_shakespeare"', default=())
    strict: bool = Field(default=False, description="true or false")
    timeout: float = Field(default=300.0, gt=0, le=7200, description="seconds, above 0, at most 7200")
    memory_gb: float = Field(default=4.0, gt=0, le=1024, description="GiB, above 0, at most 1024")
    gpus: int | None = Field(default=None, ge=0, le=64, description="a whole number from 0 to 64")
    gpu_memory_gb: float = Field(default=0.0, ge=0, le=1024, description="GiB, from 0 to 1024")

    @property
    def id(self) -> str:
        """Such as `ch01/lab01`."""
        return f"{self.chapter_id}/{self.folder[:5]}"

    @property
    def chapter_id(self) -> str:
        """Such as `ch01`."""
        return self.path.parent.name[:4]

    @property
    def source_paths(self) -> tuple[Path, ...]:
        """The files a learner writes, absolute."""
        return tuple(self.path / "src" / name for name in self.files)


class Chapter(_Table):
    """One chapter.

    Attributes:
        path: its folder, absolute.
        title: a few words.
        phase: the part of the course it belongs to.
        stack: the environment it is written for.
        also: stacks where more of it can be verified.
        summary: one line.
        milestone: its measured claim.
        labs: in order.
    """

    path: Path = Field(repr=False, description="nothing, this key is not for the file")
    title: Line = Field(description="one line of text")
    phase: Phase = Field(description='"foundation", "attention variants", "production" or "hardware"')
    stack: Stack = Field(description='"cpu", "cuda" or "multi-gpu"')
    also: tuple[Stack, ...] = _list('a list of "cpu", "cuda", "multi-gpu"', default=())
    summary: Line = Field(description="one line of text")
    milestone: Milestone = Field(description="a table [milestone]")
    labs: tuple[Lab, ...] = Field(alias="lab", strict=False, min_length=1, description="tables [[lab]]")

    @property
    def id(self) -> str:
        """Such as `ch01`."""
        return self.path.name[:4]

    @property
    def number(self) -> int:
        """From 1."""
        return int(self.id[2:])
