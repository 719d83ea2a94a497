"""Judges the NVIDIA driver and the GPUs: one sentence and one remedy for each known failure."""

from grader.doctor.finding import Finding, in_gb, missing, ok
from grader.doctor.surroundings import Surroundings
from grader.gpus import Nvml, NvmlCode

MINIMUM_DRIVER = 580
"""The oldest driver for CUDA 13, which the stacks `cuda` and `multi-gpu` are built with.

Source: NVIDIA, CUDA Compatibility, table "CUDA Toolkit 11.x, 12.x, and 13.x Driver Version Ranges": CUDA 13.x needs
>= 580. https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html (read 2026-11-25)
"""

MINIMUM_CAPABILITY = (7, 5)
"""The oldest GPUs that CUDA 13 compiles for: Turing. Maxwell, Pascal and Volta (such as the V100) were dropped.

Source: NVIDIA, CUDA Toolkit release notes, "Deprecated Architectures", as quoted in
https://github.com/pytorch/pytorch/issues/157517 (read 2026-11-25)
"""

LOST_GPU = (
    "https://docs.nvidia.com/datacenter/cloud-native/container-toolkit/latest/troubleshooting.html"
    "#containers-losing-access-to-gpus-with-error-failed-to-initialize-nvml-unknown-error"
)

DRIVER, GPUS = "NVIDIA driver", "NVIDIA GPU"
NONE_NEEDED = "none is needed to learn: the CPU part of every lab runs here, the rest is not verified here"
GUIDE = "docs/remote-gpu.md"
NO_GPU = f"{NONE_NEEDED}; {GUIDE} says how to rent one"
INSTALL = f"install driver {MINIMUM_DRIVER} or newer and reboot ({GUIDE}, section 1)"


def nvidia_findings(nvml: Nvml, around: Surroundings, wanted: int, *, count_hidden: bool) -> list[Finding]:
    """Judge the driver, then the GPUs.

    Args:
        nvml: what NVML answered.
        around: where this process runs.
        wanted: how many GPUs are needed.
        count_hidden: whether GPUs count that CUDA_VISIBLE_DEVICES hides from this process; a container of the
            Docker Engine gets them all the same.
    """
    if nvml.driver:
        return [driver_finding(nvml, around), gpu_finding(nvml, around, wanted, count_hidden=count_hidden)]
    traces = around.kernel_driver or around.device_node or around.nvidia_hardware
    absent = nvml.code == NvmlCode.LIBRARY_NOT_FOUND
    absent |= nvml.code == NvmlCode.DRIVER_NOT_LOADED and around.nvidia_hardware == 0
    if absent and not traces:
        return [missing(GPUS, "none found on this machine", NO_GPU)]
    return [driver_finding(nvml, around)]


def driver_finding(nvml: Nvml, around: Surroundings) -> Finding:
    """Judge the driver."""
    if nvml.driver:
        if _major(nvml.driver) < MINIMUM_DRIVER:
            where = " on the machine outside; a container uses that one" if around.container else ""
            detail = f"{nvml.driver} is too old: CUDA 13 needs {MINIMUM_DRIVER} or newer"
            return missing(DRIVER, detail, f"{INSTALL}{where}")
        return ok(DRIVER, f"{nvml.driver}, up to CUDA {nvml.cuda}")
    if nvml.code == NvmlCode.NO_BINDING:
        return missing(DRIVER, nvml.note, "make setup")
    if nvml.code == NvmlCode.LIBRARY_NOT_FOUND:
        return _no_library(around)
    if nvml.code == NvmlCode.LIB_RM_VERSION_MISMATCH:
        loaded = f" (loaded: {around.kernel_driver})" if around.kernel_driver else ""
        return missing(
            DRIVER,
            f"Driver/library version mismatch: an upgrade replaced the driver while the old one was running{loaded}",
            "reboot the machine" + (", then start this container again" if around.container else ""),
        )
    if nvml.code == NvmlCode.DRIVER_NOT_LOADED:
        return missing(
            DRIVER,
            "installed, but its kernel module is not loaded",
            "sudo modprobe nvidia, or reboot; if that fails, `dkms status` says whether the module was built "
            "for this kernel, and Secure Boot refuses one that is not signed",
        )
    if around.container and around.device_node:
        return missing(
            DRIVER,
            f"this container has lost its GPU: /dev/nvidiactl is here, but NVML says '{nvml.error}'",
            "restart the container. The cause is usually a `systemctl daemon-reload` on the machine outside, which "
            "takes GPUs away where Docker lets systemd manage cgroups; to keep it from happening again, set "
            f'"exec-opts": ["native.cgroupdriver=cgroupfs"] in /etc/docker/daemon.json, or use CDI: {LOST_GPU}',
        )
    if nvml.code == NvmlCode.NO_PERMISSION:
        return missing(
            DRIVER,
            f"this user may not use it: {nvml.error}",
            "`ls -l /dev/nvidia*` says who may; usually everybody can read and write them",
        )
    return missing(
        DRIVER,
        f"does not answer: {nvml.error}",
        "`sudo dmesg | grep -i -e nvrm -e xid` names the cause; a reboot often cures it",
    )


def _no_library(around: Surroundings) -> Finding:
    if around.container:
        found = around.kernel_driver and f"driver {around.kernel_driver}"
        detail = (
            f"the machine outside has {found or 'an NVIDIA GPU'}, but this container was started without it"
        )
        return missing(
            DRIVER,
            detail,
            "start it with `docker run --gpus all`, or by `make up PROFILE=gpu`; on a rented container, "
            "choose an instance with a GPU",
        )
    if around.kernel_driver:
        return missing(
            DRIVER,
            f"the kernel module {around.kernel_driver} is loaded, but the library libnvidia-ml.so.1 is not found",
            f"install the driver's libraries of the same version, or all of it again: {GUIDE}, section 1",
        )
    return missing(DRIVER, "none is installed, though the machine has an NVIDIA GPU", INSTALL)


def gpu_finding(nvml: Nvml, around: Surroundings, wanted: int, *, count_hidden: bool) -> Finding:
    """Judge the GPUs of a driver that answers."""
    count = nvml.present if count_hidden else len(nvml.gpus)
    names = ", ".join(
        f"{gpu.name} ({in_gb(gpu.memory_bytes)})" if gpu.memory_bytes else gpu.name for gpu in nvml.gpus
    )
    if count < wanted:
        needed = "an NVIDIA GPU" if wanted == 1 else f"{wanted} NVIDIA GPUs"
        has = f"{count} of the {wanted} needed" if count else "none"
        detail = f"{has}{': ' + names if names else ''}{'; ' + nvml.note if nvml.note else ''}"
        if not count_hidden and nvml.present >= wanted:
            return missing(GPUS, detail, "unset CUDA_VISIBLE_DEVICES")
        if nvml.code:
            return missing(GPUS, detail, "`sudo dmesg | grep -i -e nvrm -e xid` names the cause; reboot")
        if around.container:
            return missing(GPUS, detail, f"start this container with {needed}: --gpus all gives it every one")
        return missing(GPUS, detail, f"use a machine with {needed}")
    if nvml.capability and nvml.capability < MINIMUM_CAPABILITY:
        has, least = (".".join(map(str, pair)) for pair in (nvml.capability, MINIMUM_CAPABILITY))
        return missing(
            GPUS,
            f"{names or count}: compute capability {has} is too old, CUDA 13 begins with {least} (Turing)",
            "use a newer GPU: T4, RTX 20 or later, A100, L4, H100 and so on",
        )
    return ok(GPUS, names or f"{count}")


def _major(version: str) -> int:
    first = version.split(".")[0]
    return int(first) if first.isdecimal() else 0
