"""What a report says about the machine it ran on: hardware and the versions that matter.

Never imports torch: everything comes from the system, from NVML and from packages' metadata, in a few
milliseconds.
"""

import math
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath

import psutil
from pydantic import BaseModel, ConfigDict

from grader.gpus import Gpu, Nvml, ask_nvml

LIBRARIES = ("torch", "triton", "numpy", "transformers", "pytest", "jax", "flash-linear-attention", "vllm")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Machine(_Frozen):
    """A machine, as far as results depend on it.

    Attributes:
        system: operating system and kernel.
        cpu_model: the processor's name.
        cores: this process may use: affinity and the cgroup's CPU quota, rounded up.
        memory_bytes: this process may use: the machine's, or the cgroup's limit if that is lower.
        python: version.
        gpus: this process may use.
        gpu_note: why there are no GPUs, or why some are left out; empty otherwise.
        libraries: versions by package name, of those installed; torch's shows its build, `2.13.0+cpu`.
    """

    system: str
    cpu_model: str
    cores: int
    memory_bytes: int
    python: str
    gpus: tuple[Gpu, ...] = ()
    gpu_note: str = ""
    libraries: dict[str, str] = {}


def describe(nvml: Nvml | None = None) -> Machine:
    """Return this machine as this process sees it now.

    Args:
        nvml: what NVML answered, for a caller that has asked it already.
    """
    system = os.uname()  # platform.platform() would start a process
    nvml = nvml or ask_nvml()
    limit_bytes, limit_cores = cgroup_limits()
    memory, cores = psutil.virtual_memory().total, _cores()
    return Machine(
        system=f"{system.sysname} {system.release} {system.machine}",
        cpu_model=_cpu_model(),
        cores=max(1, min(cores, math.ceil(limit_cores))) if limit_cores else cores,
        memory_bytes=min(memory, limit_bytes) if limit_bytes else memory,
        python=platform.python_version(),
        gpus=nvml.gpus,
        gpu_note=nvml.note,
        libraries=_libraries(),
    )


def _libraries() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _cores() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1, check=False)
        if done.returncode == 0:
            return done.stdout.strip()
    return platform.processor() or platform.machine()


# --- cgroups -------------------------------------------------------------------------------------


def cgroup_limits(
    membership: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")
) -> tuple[int | None, float | None]:
    """Return the lowest limits that hold for a process, versions 1 and 2 of cgroups.

    Args:
        membership: the process's groups, one a line: `0::/path` or `4:memory:/path`.
        mount: where the hierarchies are mounted.

    Returns:
        Memory in bytes and CPU in cores, None where there is no limit.
    """
    memory: list[float] = []
    cores: list[float] = []
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None, None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        names = controllers.split(",")  # version 2 has one hierarchy, without a name
        for folder in _with_parents(mount, {controllers, *names}, path):
            if not controllers:
                memory += _numbers(folder / "memory.max")
                if len(quota := _numbers(folder / "cpu.max")) == 2:
                    cores.append(quota[0] / quota[1])
            if "memory" in names:
                memory += _numbers(folder / "memory.limit_in_bytes")
            if "cpu" in names:
                quota = _numbers(folder / "cpu.cfs_quota_us") + _numbers(folder / "cpu.cfs_period_us")
                if len(quota) == 2:
                    cores.append(quota[0] / quota[1])
    # Version 1 says "no limit" with a number close to 2**63.
    memory = [limit for limit in memory if limit < 2**60]
    return int(min(memory)) if memory else None, min(cores, default=None)


def _with_parents(mount: Path, names: set[str], path: str) -> list[Path]:
    """Return the folders of a group and its parents up to the mount, which a container may see instead."""
    parts = PurePosixPath(path.lstrip("/"))
    below = [parts, *parts.parents]
    return [mount / name / part for name in names for part in below]


def _numbers(file: Path) -> list[float]:
    """Return the positive numbers in a file; none if it says `max` or `-1` or is not there."""
    try:
        words = file.read_text(encoding="utf-8").split()
    except OSError:
        return []
    return [float(word) for word in words if word.isdecimal()] if "max" not in words else []
