"""What an examination of this machine finds, with the programs it asks as they come and as they go wrong."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from grader.catalog import Catalog
from grader.doctor import SANDBOX_IMAGE, Finding, Findings, examine

ROOT = Path(__file__).resolve().parents[2]


def _finding(findings: Findings, name: str) -> Finding:
    return next(f for f in findings.findings if f.name.startswith(name))


def _program(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with nothing on it."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def test_this_checkout() -> None:
    started = time.monotonic()
    findings = examine(ROOT)
    seconds = time.monotonic() - started
    assert seconds < 3, f"{seconds:.1f} s; half of that is promised on a machine that does nothing else"
    assert {f.name for f in findings.findings} >= {
        "Python", ".venv", "torch", "JupyterLab", "Node.js", "cores", "memory", "GPU", "Docker Engine",
    }  # fmt: skip
    assert _finding(findings, "torch").detail.startswith(findings.machine.libraries["torch"])
    assert all(f.remedy for f in findings.findings if f.state != "ok"), "a finding without a remedy"
    assert not any(f.remedy for f in findings.findings if f.state == "ok")
    assert [s.stack for s in findings.stacks] == ["cpu", "cuda", "multi-gpu"]
    assert findings.stacks[0].lacks_here == ()
    assert Findings.model_validate_json(findings.model_dump_json()) == findings


def test_chapters_are_told_by_stack(course: Catalog) -> None:
    stacks = examine(course.root, course).stacks
    assert [s.chapters for s in stacks] == [("ch01",), (), ()]


def test_gpu_stacks_say_what_they_lack() -> None:
    findings = examine(ROOT)
    if findings.machine.gpus:
        pytest.skip("this machine has a GPU")
    for stack in findings.stacks[1:]:
        assert any("GPU" in lack for lack in stack.lacks_here)
        assert any("GPU" in lack for lack in stack.lacks_in_docker)
        assert any("CUDA build of torch" in lack for lack in stack.lacks_here) == (
            findings.machine.libraries["torch"].endswith("+cpu")
        )
    assert _finding(findings, "GPU").detail == findings.machine.gpu_note


def test_nothing_is_installed(programs: Path) -> None:
    findings = examine(ROOT)
    docker = _finding(findings, "Docker Engine")
    assert docker.state == "warning"
    assert "docker is not installed" in docker.detail
    assert "not found" in _finding(findings, "Node.js").detail
    assert any("C compiler" in lack for lack in findings.stacks[1].lacks_here)


# The Docker command's answers below are what it prints; that the real engine is understood is tested
# where one runs.


def test_an_engine_with_images(programs: Path) -> None:
    info = json.dumps({"ServerVersion": "28.2.2", "Runtimes": {"nvidia": {}, "runc": {}}})
    images = f"{SANDBOX_IMAGE}:cpu\n{SANDBOX_IMAGE}:cuda"
    _program(programs, "docker", f"if [ $1 = info ]; then echo '{info}'; else echo '{images}'; fi")
    findings = examine(ROOT)
    assert _finding(findings, "Docker Engine") == Finding(name="Docker Engine", state="ok", detail="28.2.2")
    assert _finding(findings, "sandbox images").state == "ok"
    lacks = {s.stack: s.lacks_in_docker for s in findings.stacks}
    assert lacks["cpu"] == ()
    assert f"image {SANDBOX_IMAGE}:multi-gpu (not built)" in lacks["multi-gpu"]
    assert not any("Toolkit" in lack for lack in lacks["cuda"])


def test_an_engine_without_images_or_gpu_support(programs: Path) -> None:
    _program(
        programs,
        "docker",
        """[ $1 = info ] && echo '{"ServerVersion": "20.10.24", "Runtimes": {"runc": {}}}'""",
    )
    findings = examine(ROOT)
    assert _finding(findings, "sandbox images").state == "warning"
    assert findings.stacks[0].lacks_in_docker == (f"image {SANDBOX_IMAGE}:cpu (not built)",)
    assert any("NVIDIA Container Toolkit" in lack for lack in findings.stacks[1].lacks_in_docker)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'Cannot connect to the Docker daemon' >&2; exit 1", "Cannot connect to the Docker daemon"),
        ("""echo '{"ServerVersion": "", "ServerErrors": ["permission denied"]}'""", "permission denied"),
        ("echo nonsense", "no answer"),
    ],
)
def test_an_engine_that_does_not_answer(programs: Path, script: str, said: str) -> None:
    _program(programs, "docker", script)
    findings = examine(ROOT)
    assert _finding(findings, "Docker Engine").state == "warning"
    assert said in _finding(findings, "Docker Engine").detail
    assert any("Docker Engine" in lack for lack in findings.stacks[0].lacks_in_docker)


def test_a_docker_that_hangs_costs_a_second(programs: Path) -> None:
    sleep = shutil.which("sleep", path="/bin:/usr/bin")
    _program(programs, "docker", f"exec {sleep} 30")
    _program(programs, "node", f"exec {sleep} 30")
    started = time.monotonic()
    findings = examine(ROOT)
    assert time.monotonic() - started < 3
    assert "no answer within 1 s" in _finding(findings, "Docker Engine").detail


def test_the_real_docker_command_is_understood() -> None:
    docker = shutil.which("docker")
    if docker is None:
        pytest.skip("no docker command")
    try:
        done = subprocess.run(
            [docker, "version", "--format", "{{.Server.Version}}"], capture_output=True, text=True, timeout=10
        )
    except subprocess.TimeoutExpired:
        pytest.skip("docker does not answer")
    found = _finding(examine(ROOT), "Docker Engine")
    assert found.state == ("ok" if done.returncode == 0 else "warning")
    if done.returncode == 0:
        assert found.detail == done.stdout.strip()


def test_an_environment_that_is_out_of_date(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "setup_env.py", tmp_path / "scripts")
    shutil.copytree(ROOT / "docker" / "requirements", tmp_path / "docker" / "requirements")
    for package in ("shared", "grader"):
        (tmp_path / package).mkdir()
        shutil.copy(ROOT / package / "pyproject.toml", tmp_path / package)
    assert _finding(examine(tmp_path), ".venv").detail == "not there"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / ".venv"], check=True)
    found = _finding(examine(tmp_path), ".venv")
    assert (found.state, found.remedy) == ("warning", "make setup")
    assert "out of date" in found.detail
