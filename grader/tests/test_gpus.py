"""What NVML tells: no driver here, or the real one; and which GPUs CUDA_VISIBLE_DEVICES shows."""

import pytest
from grader.gpus import Gpu, Nvml, NvmlCode, ask_nvml, visible_gpus


def test_this_machine() -> None:
    nvml = ask_nvml()
    assert nvml.gpus or nvml.note, "no GPU without a reason"
    assert bool(nvml.driver) == (nvml.present > 0 or "has no GPU" in nvml.note)
    assert Nvml.model_validate_json(nvml.model_dump_json()) == nvml


def test_the_codes_are_nvmls() -> None:
    pynvml = pytest.importorskip("pynvml")
    for code in NvmlCode:
        if code is not NvmlCode.NO_BINDING:
            name = "NVML_SUCCESS" if code is NvmlCode.SUCCESS else f"NVML_ERROR_{code.name}"
            assert getattr(pynvml, name) == code


@pytest.mark.parametrize(
    ("visible", "shown"),
    [
        ("0,1", [0, 1]),
        ("1", [1]),
        (" 1 , 0", [1, 0]),
        ("1,7,0", [1]),  # CUDA stops at the first that is not there
        ("-1,0", []),
        ("", []),
        ("GPU-fcc8", [0]),
        ("GPU-e7,GPU-fcc8e711-0169", [1, 0]),
        ("GPU-", []),  # names two; CUDA shows none
        ("MIG-1234", [0, 1]),
    ],
)
def test_visible_gpus(visible: str, shown: list[int]) -> None:
    gpus = [Gpu(index=i, name="H100", memory_bytes=80 * 10**9, driver="580", cuda="13.0") for i in range(2)]
    found = list(zip(gpus, ("GPU-fcc8e711-0169", "GPU-e77613a4-f911"), strict=True))
    assert [gpu.index for gpu in visible_gpus(found, visible)] == shown
