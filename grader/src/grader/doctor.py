"""What this machine has, and what each stack lacks here. Returns data; the command line shows it."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psutil
from pydantic import BaseModel, ConfigDict

from grader.catalog import Catalog, Stack
from grader.machine import Machine, describe

SANDBOX_IMAGE = "topeka-sandbox"
"""The repository of the sandbox images; the stack's name is the tag."""

# Every question to another program is given up after this, so that the examination stays short.
PATIENCE_S = 1.0
GB = 1_000_000_000
ENOUGH_DISK, LITTLE_DISK = 2 * GB, GB // 2
ENOUGH_MEMORY = 4 * GB
ENOUGH_SHARED_MEMORY = GB

State = Literal["ok", "warning", "missing"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Finding(_Frozen):
    """One thing that was looked at.

    Attributes:
        name: what it is.
        state: `ok`; `warning`, works but may get in the way; `missing`, something needs it.
        detail: what was found.
        remedy: what to do; empty for `ok`.
    """

    name: str
    state: State
    detail: str
    remedy: str = ""


class StackReadiness(_Frozen):
    """What a stack lacks on this machine.

    Attributes:
        stack: `cpu`, `cuda` or `multi-gpu`.
        chapters: ids of the chapters written for it, such as `ch01`.
        lacks_here: what keeps its tests from being verified in this environment.
        lacks_in_docker: what keeps them from being verified in the stack's image.
    """

    stack: Stack
    chapters: tuple[str, ...]
    lacks_here: tuple[str, ...]
    lacks_in_docker: tuple[str, ...]


class Findings(_Frozen):
    """Everything an examination found.

    Attributes:
        machine: hardware and versions.
        findings: one by one.
        stacks: what each lacks, smallest stack first.
    """

    machine: Machine
    findings: tuple[Finding, ...]
    stacks: tuple[StackReadiness, ...]


class _Engine(NamedTuple):
    version: str  # empty if none answers
    trouble: str
    has_nvidia: bool
    images: frozenset[str]


def examine(root: Path, catalog: Catalog | None = None) -> Findings:
    """Examine this machine, in about a second at most.

    Args:
        root: the checkout.
        catalog: the course, to tell which chapters need which stack.
    """
    with ThreadPoolExecutor() as pool:
        engine_later = pool.submit(_engine)
        setup_later = pool.submit(_environment, root)
        node_later = pool.submit(_output, ["node", "--version"])
        machine = describe()
        engine = engine_later.result()
        findings = (
            _python(machine),
            setup_later.result(),
            _torch(machine),
            _package("JupyterLab", "jupyterlab"),
            _node(node_later.result()),
            _cores(machine),
            _memory(machine),
            *_disks(root),
            _gpus(machine),
            *_shared_memory(),
            *_docker(engine),
        )
    return Findings(machine=machine, findings=findings, stacks=_stacks(machine, engine, findings, catalog))


# --- stacks --------------------------------------------------------------------------------------


def _stacks(
    machine: Machine, engine: _Engine, findings: Sequence[Finding], catalog: Catalog | None
) -> tuple[StackReadiness, ...]:
    every = [f"{f.name}: {f.detail}" for f in findings if f.state == "missing" and f.name == "torch"]
    note = f" ({machine.gpu_note})" if machine.gpu_note else ""
    one = [] if machine.gpus else [f"an NVIDIA GPU{note}"]
    two = (
        []
        if len(machine.gpus) > 1
        else [f"a second GPU{note}"]
        if machine.gpus
        else [f"two NVIDIA GPUs{note}"]
    )
    here: dict[Stack, list[str]] = {
        "cpu": every,
        "cuda": [*every, *one, *_lacks_for_cuda(machine)],
        "multi-gpu": [*every, *two, *_lacks_for_cuda(machine)],
    }
    hardware: dict[Stack, list[str]] = {"cpu": [], "cuda": one, "multi-gpu": two}
    stacks = []
    for stack, lacks in here.items():
        in_docker = list(hardware[stack])
        if not engine.version:
            in_docker.append("a Docker Engine that answers")
        else:
            if f"{SANDBOX_IMAGE}:{stack}" not in engine.images:
                in_docker.append(f"the image {SANDBOX_IMAGE}:{stack}")
            if stack != "cpu" and not engine.has_nvidia:
                in_docker.append("the NVIDIA Container Toolkit in the Docker Engine")
        stacks.append(
            StackReadiness(
                stack=stack,
                chapters=tuple(f"ch{c.number:02d}" for c in catalog.chapters if c.stack == stack)
                if catalog
                else (),
                lacks_here=tuple(lacks),
                lacks_in_docker=tuple(in_docker),
            )
        )
    return tuple(stacks)


def _lacks_for_cuda(machine: Machine) -> list[str]:
    lacks = []
    torch = machine.libraries.get("torch", "")
    if torch.endswith("+cpu"):
        lacks.append(f"a CUDA build of torch (this is {torch}; `TOPEKA_TORCH=pypi make setup` installs one)")
    built_for = _version("nvidia-cuda-runtime")  # a CUDA build of torch brings it
    if built_for and machine.gpus:
        supported = machine.gpus[0].cuda
        if int(built_for.split(".")[0]) > int(supported.split(".")[0]):
            lacks.append(f"a driver for CUDA {built_for} (this one supports up to {supported})")
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        lacks.append("a C compiler, which Triton calls")
    return lacks


# --- this environment ----------------------------------------------------------------------------


def _python(machine: Machine) -> Finding:
    # An older Python cannot import this file, so there is nothing to be missing.
    return Finding(name="Python", state="ok", detail=f"{machine.python} ({sys.executable})")


def _environment(root: Path) -> Finding:
    script = root / "scripts" / "setup_env.py"
    name = ".venv"
    if not script.is_file():
        return Finding(
            name=name, state="ok", detail="this course has no set-up script; using what is installed"
        )
    if not (root / ".venv").exists():
        return Finding(name=name, state="warning", detail="not there", remedy="make setup")
    try:
        done = subprocess.run(
            [sys.executable, "-IS", str(script), "--check"],
            capture_output=True,
            timeout=PATIENCE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Finding(name=name, state="warning", detail="could not be checked in time", remedy="make setup")
    if done.returncode == 0:
        return Finding(name=name, state="ok", detail="complete and up to date with docker/requirements")
    return Finding(
        name=name,
        state="warning",
        detail="incomplete, out of date, or not made by `make setup`",
        remedy="make setup",
    )


def _torch(machine: Machine) -> Finding:
    found = machine.libraries.get("torch")
    if found is None:
        return Finding(name="torch", state="missing", detail="not installed", remedy="make setup")
    if found.endswith("+cpu") and machine.gpus:
        return Finding(
            name="torch",
            state="warning",
            detail=f"{found}, a CPU build, on a machine with a GPU",
            remedy="TOPEKA_TORCH=pypi make setup",
        )
    kind = "a CPU build" if found.endswith("+cpu") or sys.platform == "darwin" else "a CUDA build"
    return Finding(name="torch", state="ok", detail=f"{found}, {kind}")


def _package(name: str, package: str) -> Finding:
    found = _version(package)
    if found is None:
        return Finding(name=name, state="missing", detail="not installed", remedy="make setup")
    return Finding(name=name, state="ok", detail=found)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _node(answer: "_Answer") -> Finding:
    detail = answer.text or "not found; only the Dev Containers command line needs it"
    return Finding(name="Node.js", state="ok", detail=detail)


# --- hardware ------------------------------------------------------------------------------------


def _cores(machine: Machine) -> Finding:
    detail = f"{machine.cores} ({machine.cpu_model})"
    if machine.cores < 2:
        remedy = "nothing to repair; training labs take longer, and timing milestones may be missed"
        return Finding(name="cores", state="warning", detail=detail, remedy=remedy)
    return Finding(name="cores", state="ok", detail=detail)


def _memory(machine: Machine) -> Finding:
    detail = f"{_gb(machine.memory_bytes)} may be used"
    if machine.memory_bytes < ENOUGH_MEMORY:
        remedy = f"{_gb(ENOUGH_MEMORY)} are comfortable; close other programs, or raise the container's limit"
        return Finding(name="memory", state="warning", detail=detail, remedy=remedy)
    return Finding(name="memory", state="ok", detail=detail)


def _disks(root: Path) -> list[Finding]:
    """Return a finding for each disk that holds the checkout, temporary files or uv's cache."""
    cache = os.environ.get("UV_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    places = {"checkout": root, "temporary files": Path(tempfile.gettempdir()), "cache": Path(cache)}
    disks: dict[int, tuple[Path, list[str]]] = {}
    for use, folder in places.items():
        while not folder.exists():
            folder = folder.parent
        disks.setdefault(folder.stat().st_dev, (folder, []))[1].append(use)
    findings = []
    for folder, uses in disks.values():
        free = shutil.disk_usage(folder).free
        state: State = "ok" if free >= ENOUGH_DISK else "warning" if free >= LITTLE_DISK else "missing"
        remedy = (
            "" if state == "ok" else f"make room on the disk of {folder}; {_gb(ENOUGH_DISK)} are comfortable"
        )
        findings.append(
            Finding(
                name=f"disk for {', '.join(uses)}", state=state, detail=f"{_gb(free)} free", remedy=remedy
            )
        )
    return findings


def _gpus(machine: Machine) -> Finding:
    if not machine.gpus:
        remedy = "none is needed to learn: the CPU part of every lab runs here, the rest is not verified here"
        return Finding(name="GPU", state="missing", detail=machine.gpu_note, remedy=remedy)
    first = machine.gpus[0]
    names = ", ".join(
        f"{gpu.name} ({_gb(gpu.memory_bytes)})" if gpu.memory_bytes else gpu.name for gpu in machine.gpus
    )
    detail = f"{names}; driver {first.driver}, up to CUDA {first.cuda}"
    if machine.gpu_note:
        remedy = "unset CUDA_VISIBLE_DEVICES, or see what nvidia-smi says"
        return Finding(name="GPU", state="warning", detail=f"{detail}; {machine.gpu_note}", remedy=remedy)
    return Finding(name="GPU", state="ok", detail=detail)


def _shared_memory() -> list[Finding]:
    """Return what NCCL and data loaders share memory through; only Linux has it."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return []
    total = psutil.disk_usage(str(folder)).total
    if total < ENOUGH_SHARED_MEMORY:
        remedy = "several GPUs in one container need more: start it with --shm-size=1g or --ipc=host"
        return [Finding(name="/dev/shm", state="warning", detail=_gb(total), remedy=remedy)]
    return [Finding(name="/dev/shm", state="ok", detail=_gb(total))]


# --- Docker --------------------------------------------------------------------------------------


class _Answer(NamedTuple):
    text: str  # empty if there was none
    trouble: str


def _output(command: list[str]) -> _Answer:
    """Return the first words of a program, or why there are none."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
    except FileNotFoundError:
        return _Answer("", f"the program {command[0]} is not installed")
    except subprocess.TimeoutExpired:
        return _Answer("", f"no answer within {PATIENCE_S:.0f} s")
    except OSError as error:
        return _Answer("", f"{command[0]}: {error.strerror}")
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return _Answer(done.stdout.strip(), lines[-1] if lines else f"exit status {done.returncode}")
    return _Answer(done.stdout.strip(), "")


def _engine() -> _Engine:
    """Ask the Docker Engine that the command `docker` uses, so contexts and DOCKER_HOST hold."""
    with ThreadPoolExecutor() as pool:
        info_later = pool.submit(_output, ["docker", "info", "--format", "{{json .}}"])
        images = _output(["docker", "image", "ls", "--format", "{{.Repository}}:{{.Tag}}", SANDBOX_IMAGE])
        info = info_later.result()
    try:
        known: dict[str, Any] = json.loads(info.text or "{}")
    except ValueError:
        known = {}
    server = str(known.get("ServerVersion") or "")
    trouble = info.trouble or "; ".join(known.get("ServerErrors") or []) or "no answer"
    # Either the old runtime or the newer device files (CDI) can attach GPUs.
    devices = json.dumps([known.get("Runtimes"), known.get("DiscoveredDevices")])
    return _Engine(server, "" if server else trouble, "nvidia" in devices, frozenset(images.text.split()))


def _docker(engine: _Engine) -> list[Finding]:
    if not engine.version:
        remedy = "not needed: without it tests run on this machine as your own user, which is not isolated"
        return [Finding(name="Docker Engine", state="warning", detail=engine.trouble, remedy=remedy)]
    images = ", ".join(sorted(engine.images))
    return [
        Finding(name="Docker Engine", state="ok", detail=engine.version),
        Finding(name="sandbox images", state="ok", detail=images)
        if images
        else Finding(
            name="sandbox images",
            state="warning",
            detail=f"none ({SANDBOX_IMAGE}:cpu, :cuda, :multi-gpu)",
            remedy="without them tests run on this machine as your own user, which is not isolated",
        ),
    ]


def _gb(size: int) -> str:
    return f"{size / GB:.1f} GB"
