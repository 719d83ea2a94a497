"""What is said about each known failure of driver and GPUs.

No broken driver can be had here, so what NVML and the files would say is written down, and judged for real.
"""

import pytest
from grader.doctor.finding import Finding
from grader.doctor.nvidia import LOST_GPU, MINIMUM_DRIVER, nvidia_findings
from grader.doctor.surroundings import Surroundings
from grader.gpus import Gpu, Nvml, NvmlCode

ON_A_MACHINE = Surroundings(nvidia_hardware=1, kernel_driver="580.95.05", device_node=True)
IN_A_CONTAINER = ON_A_MACHINE.model_copy(update={"container": "/.dockerenv"})


def _working(
    driver: str = "580.95.05", cuda: str = "13.0", count: int = 1, name: str = "NVIDIA H200"
) -> Nvml:
    gpus = tuple(
        Gpu(index=i, name=name, memory_bytes=150 * 10**9, driver=driver, cuda=cuda) for i in range(count)
    )
    return Nvml(driver=driver, cuda=cuda, gpus=gpus, present=count, capability=(9, 0))


def _failing(code: int, error: str = "") -> Nvml:
    return Nvml(code=code, error=error, note=f"the NVIDIA driver does not answer: {error}")


def _judge(nvml: Nvml, around: Surroundings = ON_A_MACHINE, wanted: int = 1) -> list[Finding]:
    return nvidia_findings(nvml, around, wanted, count_hidden=False)


def _trouble(nvml: Nvml, around: Surroundings = ON_A_MACHINE, wanted: int = 1) -> Finding:
    """The only thing that is missing."""
    (found,) = [f for f in _judge(nvml, around, wanted) if f.state != "ok"]
    assert found.state == "missing"
    assert found.remedy
    return found


def test_nothing_is_wrong() -> None:
    driver, gpu = _judge(_working())
    assert (driver.state, driver.detail) == ("ok", "580.95.05, up to CUDA 13.0")
    assert (gpu.state, gpu.detail) == ("ok", "NVIDIA H200 (150.0 GB)")


@pytest.mark.parametrize(
    ("version", "state"),
    [("580.65.06", "ok"), ("615.71.09", "ok"), ("579.99", "missing"), ("535.183.01", "missing")],
)
def test_the_drivers_age(version: str, state: str) -> None:
    driver = _judge(_working(version, "12.2"))[0]
    assert driver.state == state
    if state == "missing":
        assert driver.detail == f"{version} is too old: CUDA 13 needs {MINIMUM_DRIVER} or newer"
        assert "install driver 580 or newer" in driver.remedy


def test_an_old_driver_is_changed_outside_the_container() -> None:
    assert "on the machine outside" in _trouble(_working("570.86.15", "12.8"), IN_A_CONTAINER).remedy
    assert "outside" not in _trouble(_working("570.86.15", "12.8")).remedy


def test_no_gpu_at_all() -> None:
    nvml = _failing(NvmlCode.LIBRARY_NOT_FOUND)
    for hardware in (0, None):  # none on the bus; no bus to look at
        found = _trouble(nvml, Surroundings(nvidia_hardware=hardware))
        assert (found.name, found.detail) == ("NVIDIA GPU", "none found on this machine")
        assert "none is needed to learn" in found.remedy
    unused = _failing(NvmlCode.DRIVER_NOT_LOADED)  # the driver's packages on a machine without a GPU
    assert _trouble(unused, Surroundings(nvidia_hardware=0)).name == "NVIDIA GPU"


def test_a_gpu_without_a_driver() -> None:
    found = _trouble(_failing(NvmlCode.LIBRARY_NOT_FOUND), Surroundings(nvidia_hardware=1))
    assert found.detail == "none is installed, though the machine has an NVIDIA GPU"
    assert "install driver 580" in found.remedy


def test_a_kernel_module_without_its_library() -> None:
    found = _trouble(_failing(NvmlCode.LIBRARY_NOT_FOUND))
    assert "580.95.05 is loaded" in found.detail
    assert "libnvidia-ml.so.1" in found.detail


@pytest.mark.parametrize("kernel_driver", ["580.95.05", ""])
def test_a_container_started_without_its_gpu(kernel_driver: str) -> None:
    around = Surroundings(container="/.dockerenv", nvidia_hardware=1, kernel_driver=kernel_driver)
    found = _trouble(_failing(NvmlCode.LIBRARY_NOT_FOUND), around)
    assert "started without it" in found.detail
    assert "--gpus all" in found.remedy


def test_a_driver_upgraded_while_it_ran() -> None:
    nvml = _failing(NvmlCode.LIB_RM_VERSION_MISMATCH, "RM has detected an NVML/RM version mismatch.")
    found = _trouble(nvml)
    assert found.detail.startswith("Driver/library version mismatch")
    assert "580.95.05" in found.detail
    assert found.remedy == "reboot the machine"
    assert "start this container again" in _trouble(nvml, IN_A_CONTAINER).remedy


def test_a_module_that_is_not_loaded() -> None:
    found = _trouble(_failing(NvmlCode.DRIVER_NOT_LOADED), Surroundings(nvidia_hardware=1))
    assert "not loaded" in found.detail
    assert "modprobe nvidia" in found.remedy


@pytest.mark.parametrize(
    ("code", "error"),
    [(NvmlCode.UNKNOWN, "Unknown Error"), (NvmlCode.NO_PERMISSION, "Insufficient Permissions")],
)
def test_a_container_that_lost_its_gpu(code: int, error: str) -> None:
    found = _trouble(_failing(code, error), IN_A_CONTAINER)
    assert "has lost its GPU" in found.detail
    assert error in found.detail
    assert found.remedy.startswith("restart the container")
    assert "daemon-reload" in found.remedy
    assert LOST_GPU in found.remedy


def test_other_errors_on_a_machine_name_the_log() -> None:
    assert "dmesg" in _trouble(_failing(NvmlCode.UNKNOWN, "Unknown Error")).remedy
    assert "may not use it" in _trouble(_failing(NvmlCode.NO_PERMISSION, "Insufficient Permissions")).detail
    assert _trouble(_failing(NvmlCode.NO_BINDING)).remedy == "make setup"


def test_too_few_gpus() -> None:
    found = _trouble(_working(), wanted=2)
    assert found.detail == "1 of the 2 needed: NVIDIA H200 (150.0 GB)"
    assert found.remedy == "use a machine with 2 NVIDIA GPUs"
    assert "--gpus all" in _trouble(_working(), IN_A_CONTAINER, wanted=2).remedy
    assert _judge(_working(count=2), wanted=2)[1].state == "ok"


def test_hidden_gpus_count_for_a_container_only() -> None:
    note = "CUDA_VISIBLE_DEVICES= shows 0 of 1 GPUs"
    hidden = _working().model_copy(update={"gpus": (), "note": note})
    found = _trouble(hidden)
    assert note in found.detail
    assert found.remedy == "unset CUDA_VISIBLE_DEVICES"
    assert all(f.state == "ok" for f in nvidia_findings(hidden, ON_A_MACHINE, 1, count_hidden=True))


def test_a_gpu_that_fell_off_the_bus() -> None:
    dead = Nvml(code=15, error="GPU is lost", driver="580.95.05", cuda="13.0", note="GPU 0 does not answer")
    assert "dmesg" in _trouble(dead).remedy


def test_a_gpu_older_than_cuda_13() -> None:
    volta = _working(name="Tesla V100-SXM2-16GB").model_copy(update={"capability": (7, 0)})
    found = _trouble(volta)
    assert "compute capability 7.0 is too old" in found.detail
    assert "7.5" in found.detail
    turing = volta.model_copy(update={"capability": (7, 5)})
    assert _judge(turing)[1].state == "ok"
