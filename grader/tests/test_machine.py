"""What a machine is described as: this one, and cgroups written as the kernel writes them."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from grader.machine import Machine, cgroup_limits, describe

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has it")


def _described_by(code: str = "", **environment: str) -> Machine:
    """Describe the machine in a process of its own, as a command does."""
    code = f"{code}\nfrom grader.machine import describe; print(describe().model_dump_json())"
    command = [sys.executable, "-c", code]
    env = {**os.environ, **environment}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return Machine.model_validate_json(done.stdout)


def test_this_machine() -> None:
    machine = describe()
    assert machine.python == ".".join(map(str, sys.version_info[:3]))
    assert 1 <= machine.cores <= (os.cpu_count() or 1)
    assert 10**8 < machine.memory_bytes <= psutil.virtual_memory().total
    assert machine.cpu_model
    assert os.uname().release in machine.system
    assert machine.libraries["pytest"] == pytest.__version__
    assert machine.gpus or machine.gpu_note, "no GPU without a reason"
    assert Machine.model_validate_json(machine.model_dump_json()) == machine


def test_torchs_build_is_named_without_importing_torch() -> None:
    machine = _described_by("import sys; sys.modules['torch'] = None  # importing it is an error now")
    command = [sys.executable, "-c", "import torch; print(torch.__version__)"]
    imported = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    # PyPI's wheel calls itself 2.13.0 in its metadata and 2.13.0+cu130 in its module.
    assert imported.startswith(machine.libraries["torch"])
    assert ("+cpu" in imported) == ("+cpu" in machine.libraries["torch"])


def test_it_takes_little_time() -> None:
    used = []
    for _ in range(5):
        started = time.process_time()
        describe()
        used.append(time.process_time() - started)
    assert min(used) < 0.05, f"{used} s of CPU time"


@LINUX
def test_only_the_cores_of_this_process_count() -> None:
    one = min(os.sched_getaffinity(0))
    assert _described_by(f"import os; os.sched_setaffinity(0, [{one}])").cores == 1


@LINUX
def test_no_driver_is_a_reason_and_not_an_error(tmp_path: Path) -> None:
    # A library that is no library: what a broken driver installation looks like.
    (tmp_path / "libnvidia-ml.so.1").write_text("not a library")
    machine = _described_by(LD_LIBRARY_PATH=str(tmp_path))
    assert machine.gpus == ()
    assert "NVIDIA driver" in machine.gpu_note


def test_without_the_nvml_package() -> None:
    machine = _described_by("import sys; sys.modules['pynvml'] = None")
    assert machine.gpus == ()
    assert "nvidia-ml-py is not installed" in machine.gpu_note


def test_hidden_gpus_are_left_out() -> None:
    if not describe().gpus:
        pytest.skip("no NVIDIA GPU")
    machine = _described_by(CUDA_VISIBLE_DEVICES="")
    assert machine.gpus == ()
    assert "CUDA_VISIBLE_DEVICES" in machine.gpu_note
    assert len(_described_by(CUDA_VISIBLE_DEVICES="0").gpus) == 1


# --- cgroups -------------------------------------------------------------------------------------


def _write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text + "\n")


def _limits(tmp_path: Path, membership: str, files: dict[str, str]) -> tuple[int | None, float | None]:
    (tmp_path / "membership").write_text(membership)
    _write(tmp_path / "mount", files)
    return cgroup_limits(tmp_path / "membership", tmp_path / "mount")


def test_version_2_the_lowest_limit_of_all_parents_holds(tmp_path: Path) -> None:
    files = {
        "user.slice/memory.max": "8589934592",
        "user.slice/cpu.max": "150000 100000",
        "user.slice/me/memory.max": "max",
        "user.slice/me/cpu.max": "max 100000",
        "other/memory.max": "1",
    }
    assert _limits(tmp_path, "0::/user.slice/me\n", files) == (8 * 2**30, 1.5)


def test_version_2_inside_a_container(tmp_path: Path) -> None:
    assert _limits(tmp_path, "0::/\n", {"memory.max": "1048576", "cpu.max": "50000 100000"}) == (2**20, 0.5)


def test_version_1(tmp_path: Path) -> None:
    membership = "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n"
    files = {
        # In a container the group's own folder is mounted as the hierarchy's top.
        "memory/memory.limit_in_bytes": "2147483648",
        "cpu,cpuacct/cpu.cfs_quota_us": "200000",
        "cpu,cpuacct/cpu.cfs_period_us": "100000",
    }
    assert _limits(tmp_path, membership, files) == (2 * 2**30, 2.0)


def test_no_limits(tmp_path: Path) -> None:
    files = {
        "memory/memory.limit_in_bytes": "9223372036854771712",
        "cpu/cpu.cfs_quota_us": "-1",
        "cpu/cpu.cfs_period_us": "100000",
    }
    assert _limits(tmp_path, "4:memory:/\n3:cpu:/\n0::/\n", files) == (None, None)
    assert cgroup_limits(tmp_path / "nothing", tmp_path) == (None, None)


@LINUX
def test_a_real_limit() -> None:
    """A real group of the running kernel, where this test may make one."""
    first = Path("/sys/fs/cgroup/memory")  # version 1
    name, limit = (
        ("memory.limit_in_bytes", first) if first.is_dir() else ("memory.max", Path("/sys/fs/cgroup"))
    )
    group = limit / f"topeka-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / name).write_text(str(2 * 2**30))
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    try:
        machine = _described_by(f"open({str(group / 'cgroup.procs')!r}, 'w').write('0')")
    finally:
        group.rmdir()
    assert machine.memory_bytes == 2 * 2**30
