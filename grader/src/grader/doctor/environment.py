"""What this environment has: Python, the packages, cores, memory, disks, GPUs."""

import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from grader.doctor.answer import PATIENCE_S, Answer
from grader.doctor.finding import GB, Finding, State, in_gb
from grader.machine import Machine

ENOUGH_DISK, LITTLE_DISK = 2 * GB, GB // 2
ENOUGH_MEMORY = 4 * GB


def python(machine: Machine) -> Finding:
    """Say which Python this is."""
    # An older Python cannot import this file, so there is nothing to be missing.
    return Finding(name="Python", state="ok", detail=f"{machine.python} ({sys.executable})")


def setup(root: Path) -> Finding:
    """Judge `.venv`, which `make setup` makes."""
    script = root / "scripts" / "setup_env.py"
    name = ".venv"
    if image := os.environ.get("TOPEKA_VENV"):
        return Finding(name=name, state="ok", detail=f"not needed: the image brings {image}")
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


def torch(machine: Machine) -> Finding:
    """Judge torch: there at all, and the build that fits the machine."""
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


def package(name: str, package: str) -> Finding:
    """Judge whether a Python package is installed."""
    found = _version(package)
    if found is None:
        return Finding(name=name, state="missing", detail="not installed", remedy="make setup")
    return Finding(name=name, state="ok", detail=found)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def node(answer: Answer) -> Finding:
    """Say which Node.js there is; nothing needs it."""
    detail = answer.text or "not found; only the Dev Containers command line needs it"
    return Finding(name="Node.js", state="ok", detail=detail)


# --- hardware ------------------------------------------------------------------------------------


def cores(machine: Machine) -> Finding:
    """Judge the cores this process may use."""
    detail = f"{machine.cores} ({machine.cpu_model})"
    if machine.cores < 2:
        remedy = "nothing to repair; training labs take longer, and timing milestones may be missed"
        return Finding(name="cores", state="warning", detail=detail, remedy=remedy)
    return Finding(name="cores", state="ok", detail=detail)


def memory(machine: Machine) -> Finding:
    """Judge the memory this process may use."""
    detail = f"{in_gb(machine.memory_bytes)} may be used"
    if machine.memory_bytes < ENOUGH_MEMORY:
        remedy = (
            f"{in_gb(ENOUGH_MEMORY)} are comfortable; close other programs, or raise the container's limit"
        )
        return Finding(name="memory", state="warning", detail=detail, remedy=remedy)
    return Finding(name="memory", state="ok", detail=detail)


def disks(root: Path) -> list[Finding]:
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
            ""
            if state == "ok"
            else f"make room on the disk of {folder}; {in_gb(ENOUGH_DISK)} are comfortable"
        )
        findings.append(
            Finding(
                name=f"disk for {', '.join(uses)}", state=state, detail=f"{in_gb(free)} free", remedy=remedy
            )
        )
    return findings


def gpus(machine: Machine) -> Finding:
    """Say which GPUs this process may use, or why there are none."""
    if not machine.gpus:
        remedy = "none is needed to learn: the CPU part of every lab runs here, the rest is not verified here"
        return Finding(name="GPU", state="missing", detail=machine.gpu_note, remedy=remedy)
    first = machine.gpus[0]
    names = ", ".join(
        f"{gpu.name} ({in_gb(gpu.memory_bytes)})" if gpu.memory_bytes else gpu.name for gpu in machine.gpus
    )
    detail = f"{names}; driver {first.driver}, up to CUDA {first.cuda}"
    if machine.gpu_note:
        remedy = "unset CUDA_VISIBLE_DEVICES, or see what nvidia-smi says"
        return Finding(name="GPU", state="warning", detail=f"{detail}; {machine.gpu_note}", remedy=remedy)
    return Finding(name="GPU", state="ok", detail=detail)
