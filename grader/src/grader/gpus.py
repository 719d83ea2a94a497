"""The NVIDIA GPUs of this machine, as NVIDIA's management library (NVML) tells them.

A process sees the driver's own library, so this works in a container that was given a GPU. CUDA is never touched.
"""

import os
from collections.abc import Sequence
from enum import IntEnum

from pydantic import BaseModel, ConfigDict


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class NvmlCode(IntEnum):
    """The return codes of NVML that have a known cause (`nvmlReturn_t` in `nvml.h`; the numbers never change)."""

    NO_BINDING = -1  # ours: the Python package nvidia-ml-py is missing
    SUCCESS = 0
    NO_PERMISSION = 4
    DRIVER_NOT_LOADED = 9
    LIBRARY_NOT_FOUND = 12
    LIB_RM_VERSION_MISMATCH = 18
    UNKNOWN = 999


class Gpu(_Frozen):
    """One NVIDIA GPU.

    Attributes:
        index: the driver's number, which is not torch's where CUDA_VISIBLE_DEVICES hides or sorts.
        name: such as `NVIDIA H200`.
        memory_bytes: None where the GPU has no memory of its own.
        driver: the driver's version.
        cuda: the highest CUDA version the driver supports, such as `13.0`.
    """

    index: int
    name: str
    memory_bytes: int | None
    driver: str
    cuda: str


class Nvml(_Frozen):
    """What NVML answered.

    Attributes:
        code: its first error, 0 if there was none; `NvmlCode` names those with a known cause.
        error: that error in NVML's words.
        driver: the driver's version; empty if it could not be asked.
        cuda: the highest CUDA version the driver supports; empty likewise.
        gpus: those this process may use.
        present: how many GPUs answered, CUDA_VISIBLE_DEVICES or not.
        capability: the lowest compute capability among those present, such as `(9, 0)`.
        note: why there are no GPUs, or why some are left out; empty otherwise.
    """

    code: int = NvmlCode.SUCCESS
    error: str = ""
    driver: str = ""
    cuda: str = ""
    gpus: tuple[Gpu, ...] = ()
    present: int = 0
    capability: tuple[int, int] | None = None
    note: str = ""


def ask_nvml() -> Nvml:
    """Return the GPUs this process may use, and why there are none or fewer than the driver knows."""
    try:
        import pynvml
    except ImportError:
        note = "nvidia-ml-py is not installed, so no NVIDIA GPU can be seen"
        return Nvml(code=NvmlCode.NO_BINDING, error=note, note=note)
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        known = error.value == NvmlCode.LIBRARY_NOT_FOUND
        note = "no NVIDIA driver is installed" if known else f"the NVIDIA driver does not answer: {error}"
        return Nvml(code=error.value, error=str(error), note=note)
    found: list[tuple[Gpu, str]] = []
    capabilities: list[tuple[int, int]] = []
    code, first, broken = int(NvmlCode.SUCCESS), "", []
    try:
        driver = str(pynvml.nvmlSystemGetDriverVersion())
        number = pynvml.nvmlSystemGetCudaDriverVersion_v2()  # 13000 is 13.0
        cuda = f"{number // 1000}.{number % 1000 // 10}"
        for index in range(pynvml.nvmlDeviceGetCount()):
            try:
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                gpu = Gpu(
                    index=index,
                    name=pynvml.nvmlDeviceGetName(handle),
                    memory_bytes=_memory(handle),
                    driver=driver,
                    cuda=cuda,
                )
                found.append((gpu, pynvml.nvmlDeviceGetUUID(handle)))
                major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
                capabilities.append((major, minor))
            except pynvml.NVMLError as error:
                code, first = code or error.value, first or str(error)
                broken.append(f"GPU {index} does not answer: {error}")
    except pynvml.NVMLError as error:
        note = f"the NVIDIA driver does not answer: {error}"
        return Nvml(code=error.value, error=str(error), note=note)
    finally:
        pynvml.nvmlShutdown()
    if not found and not broken:
        broken.append("an NVIDIA driver is installed, but it has no GPU")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    shown = tuple(gpu for gpu, _ in found) if visible is None else visible_gpus(found, visible)
    if len(shown) < len(found):
        broken.append(f"CUDA_VISIBLE_DEVICES={visible} shows {len(shown)} of {len(found)} GPUs")
    return Nvml(
        code=code,
        error=first,
        driver=driver,
        cuda=cuda,
        gpus=shown,
        present=len(found),
        capability=min(capabilities, default=None),
        note="; ".join(broken),
    )


def _memory(handle: object) -> int | None:
    import pynvml

    try:
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
    except pynvml.NVMLError_NotSupported:
        return None


def visible_gpus(found: Sequence[tuple[Gpu, str]], visible: str) -> tuple[Gpu, ...]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES shows, in its order.

    Args:
        found: every GPU with its UUID.
        visible: the variable's value: numbers or beginnings of UUIDs. As for CUDA, the first word that
            does not name exactly one GPU hides all that follow.
    """
    if "MIG-" in visible:  # a part of a GPU; which one cannot be told from its name
        return tuple(gpu for gpu, _ in found)
    shown: list[Gpu] = []
    for word in (word.strip() for word in visible.split(",")):
        if word.isdecimal():
            named = [gpu for gpu, _ in found if gpu.index == int(word)]
        else:
            named = [gpu for gpu, uuid in found if word.startswith("GPU-") and uuid.startswith(word)]
        if len(named) != 1:
            break
        shown += named
    return tuple(shown)
