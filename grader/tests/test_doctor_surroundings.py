"""Where a process runs, read from real files: this machine's, and folders written as a machine's."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from grader.doctor.surroundings import (
    Surroundings,
    kernel_driver,
    look_around,
    shared_memory_finding,
)

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has it")


def _write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@LINUX
def test_this_machine() -> None:
    around = look_around()
    assert around.shared_memory == psutil.disk_usage("/dev/shm").total
    assert around.device_node == Path("/dev/nvidiactl").exists()
    assert bool(around.kernel_driver) == Path("/proc/driver/nvidia/version").exists()
    if Path("/.dockerenv").exists():
        assert around.container == "/.dockerenv"


def test_an_empty_root_says_nothing(tmp_path: Path) -> None:
    assert look_around(tmp_path, {}) == Surroundings()


@pytest.mark.parametrize(
    ("files", "environment", "mark"),
    [
        ({".dockerenv": ""}, {}, "/.dockerenv"),
        ({"run/.containerenv": ""}, {}, "/run/.containerenv"),
        ({}, {"container": "lxc"}, "container=lxc"),
        ({}, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "KUBERNETES_SERVICE_HOST"),
        ({"proc/1/cgroup": "0::/system.slice/docker-1f.scope\n"}, {}, "docker in /proc/1/cgroup"),
        ({"proc/1/cgroup": "4:memory:/kubepods/besteffort/pod1\n"}, {}, "kubepods in /proc/1/cgroup"),
        ({"proc/1/cgroup": "0::/init.scope\n"}, {}, ""),
    ],
)
def test_containers_are_recognised(
    tmp_path: Path, files: dict[str, str], environment: dict[str, str], mark: str
) -> None:
    assert look_around(_write(tmp_path, files), environment).container == mark


def test_nvidia_hardware_is_counted_on_the_bus(tmp_path: Path) -> None:
    bus = "sys/bus/pci/devices"
    files = {
        f"{bus}/0000:01:00.0/vendor": "0x10de\n",
        f"{bus}/0000:01:00.0/class": "0x030200\n",
        f"{bus}/0000:02:00.0/vendor": "0x10de\n",
        f"{bus}/0000:02:00.0/class": "0x030000\n",
        f"{bus}/0000:01:00.1/vendor": "0x10de\n",  # the GPU's sound device
        f"{bus}/0000:01:00.1/class": "0x040300\n",
        f"{bus}/0000:00:02.0/vendor": "0x8086\n",  # another maker's display
        f"{bus}/0000:00:02.0/class": "0x030000\n",
    }
    assert look_around(_write(tmp_path, files), {}).nvidia_hardware == 2


def test_a_graders_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    said = {"TOPEKA_GRADER_SOCKET": "/run/grader.sock"}
    assert not look_around(tmp_path, said).grader_socket
    monkeypatch.chdir(tmp_path / "run")
    with socket.socket(socket.AF_UNIX) as grader:
        grader.bind("grader.sock")
        assert look_around(tmp_path, said).grader_socket
        assert not look_around(tmp_path, {}).grader_socket


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\n", "535.183.01"),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (dvs-builder)\n"
            "GCC version:  gcc version 13.3.0 (Ubuntu 13.3.0-6ubuntu2~24.04)\n",
            "580.95.05",
        ),
        ("", ""),
    ],
)  # fmt: skip
def test_the_kernel_modules_version(text: str, version: str) -> None:
    assert kernel_driver(text) == version


# --- shared memory ---------------------------------------------------------------------------------

DOCKERS_DEFAULT = 64 * 2**20


def test_enough_shared_memory() -> None:
    (found,) = shared_memory_finding(Surroundings(shared_memory=10**9), needed=True)
    assert found.state == "ok"
    assert shared_memory_finding(Surroundings()) == []


def test_too_little_shared_memory_in_a_container() -> None:
    around = Surroundings(container="/.dockerenv", shared_memory=DOCKERS_DEFAULT)
    (found,) = shared_memory_finding(around)
    assert found.state == "warning"
    assert found.detail.startswith("67 MB")
    assert "NCCL" in found.detail
    assert "--shm-size" in found.remedy
    assert "--ipc=host" in found.remedy
    assert shared_memory_finding(around, needed=True)[0].state == "missing"


def test_too_little_shared_memory_on_a_machine() -> None:
    (found,) = shared_memory_finding(Surroundings(shared_memory=DOCKERS_DEFAULT))
    assert "remount" in found.remedy


@LINUX
def test_a_real_small_one(tmp_path: Path) -> None:
    """A real tmpfs of Docker's default size, where this test may mount one."""
    folder = tmp_path / "dev" / "shm"
    folder.mkdir(parents=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DOCKERS_DEFAULT}", "tmpfs", folder], capture_output=True, check=False
    )  # fmt: skip
    if os.geteuid() != 0 or done.returncode != 0:
        pytest.skip("no file system can be mounted here")
    try:
        around = look_around(tmp_path, {})
    finally:
        subprocess.run(["umount", folder], check=True)
    assert around.shared_memory == DOCKERS_DEFAULT
    assert shared_memory_finding(around)[0].state == "warning"
