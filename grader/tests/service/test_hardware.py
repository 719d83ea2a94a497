"""Which work goes to which machine."""

import pytest
from grader.catalog import Catalog, Lab, load
from grader.gpus import Gpu
from grader.service.hardware import UnfitMachine, all_queues, needs_of, queue_of, queues_here, stack_here

from .cluster import ROOT

GIB = 1 << 30


def gpus(*memory_gb: float) -> tuple[Gpu, ...]:
    return tuple(
        Gpu(index=n, name="NVIDIA", memory_bytes=int(gb * GIB), driver="580", cuda="13.0")
        for n, gb in enumerate(memory_gb)
    )


@pytest.fixture
def labs(course: Catalog) -> dict[str, Lab]:
    """One lab of each kind of need."""
    first = course.labs[0]
    kinds = {
        "cpu": {},
        "cpu-12g": {"memory_gb": 12.0},
        "cuda": {"stack": "cuda"},
        "cuda-40vram": {"stack": "cuda", "gpu_memory_gb": 40.0},
        "multi-gpu": {"stack": "multi-gpu"},
        "multi-gpu-x4-80vram-64g": {
            "stack": "multi-gpu",
            "gpus": 4,
            "gpu_memory_gb": 80.0,
            "memory_gb": 64.0,
        },
    }
    return {queue: first.model_copy(update=values) for queue, values in kinds.items()}


@pytest.fixture
def catalog(course: Catalog, labs: dict[str, Lab]) -> Catalog:
    [chapter] = course.chapters
    return course.model_copy(
        update={"chapters": (chapter.model_copy(update={"labs": tuple(labs.values())}),)}
    )


def test_a_queue_is_called_by_what_its_labs_need(catalog: Catalog, labs: dict[str, Lab]):
    assert {name: queue_of(lab) for name, lab in labs.items()} == {name: name for name in labs}
    assert set(all_queues(catalog)) == set(labs)


def test_needs_in_words(labs: dict[str, Lab]):
    assert {name: needs_of(lab).words for name, lab in labs.items()} == {
        "cpu": "",
        "cpu-12g": "12 GiB of memory",
        "cuda": "a GPU",
        "cuda-40vram": "a GPU of 40 GiB",
        "multi-gpu": "2 GPUs",
        "multi-gpu-x4-80vram-64g": "4 GPUs of 80 GiB and 64 GiB of memory",
    }


@pytest.mark.parametrize(
    ("stack", "memory_gb", "here", "takes"),
    [
        ("cpu", (), 8, {"cpu"}),
        ("cpu", (), 11.5, {"cpu", "cpu-12g"}),
        ("cpu", (80, 80), 64, {"cpu", "cpu-12g"}),
        ("cuda", (24,), 64, {"cpu", "cpu-12g", "cuda"}),
        ("cuda", (39.4,), 8, {"cpu", "cuda", "cuda-40vram"}),
        ("multi-gpu", (24, 24), 64, {"cpu", "cpu-12g", "cuda", "multi-gpu"}),
        ("multi-gpu", (79.6,) * 3, 64, {"cpu", "cpu-12g", "cuda", "cuda-40vram", "multi-gpu"}),
        ("multi-gpu", (79.6, 79.6, 79.6, 24), 64, {"cpu", "cpu-12g", "cuda", "cuda-40vram", "multi-gpu"}),
    ],
)
def test_a_worker_takes_only_what_its_gpus_and_memory_can_verify(
    catalog: Catalog, stack: str, memory_gb: tuple[float, ...], here: float, takes: set[str]
):
    assert set(queues_here(catalog, stack, gpus(*memory_gb), int(here * GIB))) == takes


def test_a_machine_with_everything_takes_everything(catalog: Catalog):
    assert queues_here(catalog, "multi-gpu", gpus(*(79.6,) * 4), 512 * GIB) == all_queues(catalog)


def test_the_largest_stack_is_what_the_gpus_allow():
    assert [stack_here(None, gpus(*([80] * n))) for n in (0, 1, 2, 8)] == [
        "cpu",
        "cuda",
        "multi-gpu",
        "multi-gpu",
    ]
    assert stack_here("cpu", gpus(80, 80)) == "cpu"


@pytest.mark.parametrize(
    ("wanted", "here", "words"),
    [
        ("cuda", (), r"gradings here see no GPU \(no NVIDIA driver is installed\), and cuda needs 1"),
        ("multi-gpu", (80,), r"gradings here see 1 GPU \(.*\), and multi-gpu needs 2"),
    ],
)
def test_too_few_gpus_for_what_is_wanted_is_a_sentence(wanted: str, here: tuple[float, ...], words: str):
    with pytest.raises(UnfitMachine, match=words):
        stack_here(wanted, gpus(*here), "no NVIDIA driver is installed")


def test_the_courses_own_labs_have_few_queues():
    queues = set(all_queues(load(ROOT)))
    assert {"cpu", "cuda", "multi-gpu"} <= queues
    assert len(queues) <= 8, "each kind of need is a queue that workers poll"
