"""When a stack is ready: in this environment, in its container, in neither."""

import re
from pathlib import Path

import pytest
from grader.catalog import Stack
from grader.cli import app
from grader.doctor.engine import Engine
from grader.doctor.finding import GB
from grader.doctor.stacks import Facts, StackReadiness, readiness
from grader.doctor.surroundings import Surroundings
from grader.gpus import Gpu, Nvml, NvmlCode
from grader.machine import Machine, describe
from grader.terminal_doctor import print_stack
from rich.console import Console
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "remote-gpu.md"
STACKS: tuple[Stack, ...] = ("cpu", "cuda", "multi-gpu")
IMAGES = frozenset(f"topeka-{kind}:{stack}" for kind in ("sandbox", "workspace") for stack in STACKS)
SOCKET = "unix:///var/run/docker.sock"
ENGINE = Engine(version="28.2.2", endpoint=SOCKET, has_nvidia=True, images=IMAGES, free_disk=100 * GB)
NO_ENGINE = Engine(trouble="the program docker is not installed")
NO_DRIVER = Nvml(code=NvmlCode.LIBRARY_NOT_FOUND, note="no NVIDIA driver is installed")


def _gpus(count: int) -> Nvml:
    gpu = Gpu(index=0, name="NVIDIA H200", memory_bytes=150 * GB, driver="580.95.05", cuda="13.0")
    gpus = tuple(gpu.model_copy(update={"index": i}) for i in range(count))
    return Nvml(driver="580.95.05", cuda="13.0", gpus=gpus, present=count, capability=(9, 0))


def _machine(torch: str) -> Machine:
    return Machine(
        system="Linux", cpu_model="a CPU", cores=2, memory_bytes=8 * GB, python="3.11", libraries={"torch": torch}
    )  # fmt: skip


def _facts(
    nvml: Nvml = NO_DRIVER,
    engine: Engine = NO_ENGINE,
    torch: str = "2.13.0",
    compiler: str = "/usr/bin/cc",
    container: str = "",
    shared_memory: int = 8 * GB,
    nvidia_hardware: int = 0,
) -> Facts:
    around = Surroundings(
        container=container, shared_memory=shared_memory, nvidia_hardware=nvidia_hardware
    )  # fmt: skip
    return Facts(machine=_machine(torch), nvml=nvml, around=around, engine=engine, compiler=compiler)


def _ready(facts: Facts) -> dict[str, tuple[bool, bool]]:
    found = {stack: readiness(stack, facts) for stack in STACKS}
    return {name: (not s.lacks_here, not s.lacks_in_docker) for name, s in found.items()}


def test_a_box_with_everything() -> None:
    assert _ready(_facts(_gpus(2), ENGINE)) == dict.fromkeys(STACKS, (True, True))


def test_one_gpu_is_not_enough_for_several() -> None:
    facts = _facts(_gpus(1), ENGINE)
    assert _ready(facts) == {"cpu": (True, True), "cuda": (True, True), "multi-gpu": (False, False)}
    assert any("1 of the 2 needed" in lack for lack in readiness("multi-gpu", facts).lacks_in_docker)


def test_a_laptop_without_docker() -> None:
    facts = _facts(torch="2.13.0+cpu")
    assert _ready(facts) == {"cpu": (True, False), "cuda": (False, False), "multi-gpu": (False, False)}
    assert readiness("cpu", facts).ready
    assert not readiness("cuda", facts).ready


def test_the_container_is_enough() -> None:
    """A CPU environment on a GPU box: the image brings what the environment lacks."""
    stack = readiness("cuda", _facts(_gpus(1), ENGINE, torch="2.13.0+cpu", compiler=""))
    assert stack.ready
    assert stack.lacks_in_docker == ()
    assert [lack.partition(" (")[0] for lack in stack.lacks_here] == ["CUDA build of torch", "C compiler"]


def test_a_box_that_is_itself_a_container() -> None:
    stack = readiness("cuda", _facts(_gpus(1), container="/.dockerenv"))
    assert stack.ready
    assert stack.lacks_here == ()
    (note,) = [f for f in stack.here if f.name == "sandbox"]
    assert "itself a container (/.dockerenv)" in note.detail
    assert "local sandbox, which is not isolated" in note.detail
    assert "no engine answers inside" in stack.lacks_in_docker[0]


def test_a_workspace_grades_in_the_container_beside_it() -> None:
    facts = _facts(_gpus(1), container="/.dockerenv")
    around = facts.around.model_copy(update={"grader_socket": True})
    stack = readiness("cuda", facts.model_copy(update={"around": around}))
    assert [f.detail for f in stack.here if f.name == "sandbox"] == [
        "tests run in the grader's container beside this one"
    ]


def test_inside_an_image_the_remedy_is_another_image() -> None:
    facts = _facts(_gpus(1), torch="2.13.0+cpu", container="/.dockerenv")
    image = facts.model_copy(update={"around": facts.around.model_copy(update={"image": "cpu"})})
    assert readiness("cuda", facts).here[0].remedy == "TOPEKA_TORCH=pypi make setup"
    assert readiness("cuda", image).here[0].remedy == "use the image topeka-workspace:cuda"


def test_several_gpus_need_shared_memory() -> None:
    facts = _facts(_gpus(2), container="/.dockerenv", shared_memory=64 * 2**20)
    assert any("/dev/shm" in lack for lack in readiness("multi-gpu", facts).lacks_here)
    assert readiness("cuda", facts).lacks_here == ()


def test_an_engine_on_another_machine_is_judged_by_what_it_says() -> None:
    engine = ENGINE.model_copy(update={"endpoint": "ssh://me@box", "free_disk": None})
    stack = readiness("cuda", _facts(engine=engine))
    assert stack.lacks_in_docker == ()
    gpu = stack.in_docker[0]
    assert gpu.state == "warning"
    assert "ssh://me@box" in gpu.detail


def test_a_container_beside_the_one_with_the_gpu() -> None:
    facts = _facts(engine=ENGINE, container="/.dockerenv", nvidia_hardware=1)
    stack = readiness("cuda", facts)
    assert stack.in_docker[0].state == "warning"
    assert "outside" in stack.in_docker[0].remedy
    assert any("started without it" in lack for lack in stack.lacks_here)


@pytest.mark.parametrize("stack", STACKS)
def test_every_lack_has_a_remedy(stack: Stack) -> None:
    for facts in (_facts(torch="2.13.0+cpu"), _facts(engine=Engine(version="28", free_disk=GB))):
        found = readiness(stack, facts)
        for finding in (*found.here, *found.in_docker):
            assert bool(finding.remedy) == (finding.state != "ok")
        assert StackReadiness.model_validate_json(found.model_dump_json()) == found


# --- on the screen ---------------------------------------------------------------------------------


def _printed(stack: StackReadiness) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        print_stack(console, stack)
    return capture.get()


def test_a_ready_stack_says_how_to_begin() -> None:
    text = _printed(readiness("cuda", _facts(_gpus(1), ENGINE)))
    assert "Both ways need" in text
    assert text.count("580.95.05") == 1
    assert "In this environment: ready" in text
    assert "In its container: ready" in text
    assert "`make up PROFILE=gpu` starts its container" in text


def test_a_stack_that_is_not_ready_shows_every_remedy() -> None:
    stack = readiness("multi-gpu", _facts(engine=Engine(version="28", free_disk=GB)))
    text = re.sub(r"\s+", " ", _printed(stack))
    for finding in (*stack.here, *stack.in_docker):
        assert finding.remedy in text
    assert "is not ready on this machine" in text


def test_the_exit_status_says_whether_the_stack_is_ready() -> None:
    run = CliRunner().invoke
    assert run(app, ["doctor", "--stack", "cpu"]).exit_code == 0
    if len(describe().gpus) < 2:
        done = run(app, ["doctor", "--stack", "multi-gpu", "--json"])
        assert done.exit_code == 1
        assert not StackReadiness.model_validate_json(done.stdout).ready
    assert run(app, ["doctor"]).exit_code == 0
    assert run(app, ["doctor", "--stack", "tpu"]).exit_code == 2


def test_help_names_the_exit_status() -> None:
    text = re.sub(r"\s+", " ", CliRunner().invoke(app, ["doctor", "--help"]).stdout)
    assert "exit status is 0 if that stack is ready in this environment or in its container" in text


# --- the guide -------------------------------------------------------------------------------------


def test_the_guide_has_the_sections_that_remedies_name() -> None:
    for section in ("## 1. The driver", "## 3. NVIDIA Container Toolkit"):
        assert section in GUIDE.read_text()


def test_the_guide_explains_what_doctor_says() -> None:
    table = GUIDE.read_text().split("| doctor says |")[1].split("\n\n")[0]
    said = re.findall(r"^\| `(.+?)` \|", table, re.MULTILINE)
    assert len(said) > 15
    sources = " ".join(f.read_text() for f in (ROOT / "grader" / "src" / "grader" / "doctor").glob("*.py"))
    from_docker = {"Cannot connect to the Docker daemon"}
    assert {words for words in said if words not in sources} == from_docker
