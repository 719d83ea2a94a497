"""What this process runs in: a machine or a container, its shared memory, the NVIDIA hardware it can see.

Everything is read from files, below a root that tests choose.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import psutil

from grader.doctor.finding import GB, Finding, Frozen, in_gb, missing, ok, warning
from grader.sandbox.neighbour import SOCKET_VARIABLE

ENOUGH_SHARED_MEMORY = GB
"""What NVIDIA's own images ask for (`--shm-size=1g`); Docker's default is 64 MiB."""

NVIDIA_VENDOR, DISPLAY_CLASS = "0x10de", "0x03"  # PCI numbers: NVIDIA; VGA and 3D controllers


class Surroundings(Frozen):
    """What files say about where this process runs.

    Attributes:
        container: what shows that this is a container, such as `/.dockerenv`; empty on a machine.
        shared_memory: size of /dev/shm in bytes; None where there is none.
        kernel_driver: version of the NVIDIA kernel module that is loaded; empty if none is visible.
        device_node: /dev/nvidiactl is here.
        nvidia_hardware: NVIDIA GPUs on the PCI bus; None where the bus cannot be read.
        grader_socket: a grader's container listens beside this one, as in a workspace of compose.yaml.
        image: this course's image that this is, by its stack; empty elsewhere.
    """

    container: str = ""
    shared_memory: int | None = None
    kernel_driver: str = ""
    device_node: bool = False
    nvidia_hardware: int | None = None
    grader_socket: bool = False
    image: str = ""


def look_around(root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> Surroundings:
    """Return what the files below `root` and the environment say."""
    shared, socket = root / "dev/shm", environment.get(SOCKET_VARIABLE, "")
    return Surroundings(
        container=_container(root, environment),
        shared_memory=psutil.disk_usage(str(shared)).total if shared.is_dir() else None,
        kernel_driver=kernel_driver(_text(root / "proc/driver/nvidia/version")),
        device_node=(root / "dev/nvidiactl").exists(),
        nvidia_hardware=_nvidia_hardware(root / "sys/bus/pci/devices"),
        grader_socket=bool(socket) and (root / socket.lstrip("/")).is_socket(),
        image=environment.get("TOPEKA_STACK", ""),
    )


def _container(root: Path, environment: Mapping[str, str]) -> str:
    for mark in (".dockerenv", "run/.containerenv"):  # Docker's; Podman's
        if (root / mark).exists():
            return f"/{mark}"
    if kind := environment.get("container"):  # systemd-nspawn, LXC and Podman say it this way
        return f"container={kind}"
    if "KUBERNETES_SERVICE_HOST" in environment:
        return "KUBERNETES_SERVICE_HOST"
    group = re.search(r"docker|kubepods|containerd|libpod|lxc", _text(root / "proc/1/cgroup"))
    return f"{group[0]} in /proc/1/cgroup" if group else ""


def kernel_driver(text: str) -> str:
    """Return the version in the text of /proc/driver/nvidia/version, empty if there is none."""
    found = re.search(r"^NVRM version:.*?\b(\d{3,}\.\d+(?:\.\d+)?)\b", text, re.MULTILINE)
    return found[1] if found else ""


def _nvidia_hardware(bus: Path) -> int | None:
    if not bus.is_dir():
        return None
    return sum(
        _text(device / "vendor").strip() == NVIDIA_VENDOR
        and _text(device / "class").startswith(DISPLAY_CLASS)
        for device in bus.iterdir()
    )


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def shared_memory_finding(surroundings: Surroundings, needed: bool = False) -> list[Finding]:
    """Judge what NCCL and data loaders share memory through; only Linux has it.

    Args:
        surroundings: where this process runs.
        needed: several GPUs work together here, and NCCL fails without it.
    """
    size, name = surroundings.shared_memory, "/dev/shm"
    if size is None:
        return []
    if size >= ENOUGH_SHARED_MEMORY:
        return [ok(name, in_gb(size))]
    how = (
        "start this container with --shm-size=1g or --ipc=host (`shm_size: 1gb` in a compose file)"
        if surroundings.container
        else "enlarge it: sudo mount -o remount,size=1G /dev/shm"
    )
    judge = missing if needed else warning
    detail = f"{in_gb(size)}; NCCL and data loaders with workers want {in_gb(ENOUGH_SHARED_MEMORY)}"
    return [judge(name, detail, how)]
