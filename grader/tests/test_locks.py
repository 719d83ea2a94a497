"""docker/requirements: every lock is whole, hashed, names no host, and agrees with the others."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docker" / "requirements"
LOCKS = sorted(f for f in FOLDER.glob("*.txt") if not f.name.endswith("-overrides.txt"))


def pinned(file: Path) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9._-]+)(?:\[[a-z,]*\])?==([^\s;]+)", file.read_text(), re.MULTILINE))


@pytest.mark.parametrize("lock", LOCKS, ids=lambda f: f.name)
def test_every_requirement_has_a_hash_and_no_line_names_a_host(lock):
    text = lock.read_text()
    assert "://" not in text
    assert "--index-url" not in text
    assert "--find-links" not in text
    blocks = re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)[1:]
    assert blocks
    for block in blocks:
        assert "--hash=sha256:" in block, f"{lock.name} has no hash for {block.splitlines()[0]}"


@pytest.mark.parametrize("stack", ["cpu", "cuda", "multi-gpu"])
def test_a_stacks_versions_are_those_of_the_laptop(stack):
    laptop = pinned(FOLDER / "cpu.txt")
    image = pinned(FOLDER / f"stack-{stack}.txt")
    for name in (
        "numpy",
        "pytest",
        "transformers",
        "tokenizers",
        "matplotlib",
        "hypothesis",
        "pydantic",
        "docker",
    ):
        assert image[name] == laptop[name]
    assert image["torch"] == ("2.13.0+cpu" if stack == "cpu" else "2.13.0")


@pytest.mark.parametrize("stack", ["cpu", "cuda", "multi-gpu"])
def test_the_workspace_adds_to_a_stack_and_changes_nothing(stack):
    image, workspace = (pinned(FOLDER / f"{kind}-{stack}.txt") for kind in ("stack", "workspace"))
    assert "jupyterlab" in workspace
    assert {n: v for n, v in workspace.items() if image.get(n, v) != v} == {}


def test_the_cpu_stack_holds_no_cuda_library():
    names = pinned(FOLDER / "stack-cpu.txt")
    assert [n for n in names if re.match(r"(nvidia-(?!ml-py)|cuda-)", n)] == []
    assert not {"torchvision", "torchaudio", "torchcodec"} & names.keys()


def test_versions_json_is_written_from_the_locks():
    script = ROOT / "scripts" / "image_versions.py"
    written = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout
    assert json.loads(written) == json.loads((ROOT / "docker" / "versions.json").read_text()), (
        "run `make lock`"
    )


def test_uv_is_the_version_that_set_up_takes():
    wanted = re.search(r'^UV = "(.*)"', (ROOT / "scripts" / "setup_env.py").read_text(), re.MULTILINE)
    assert wanted
    assert pinned(FOLDER / "uv.txt")["uv"] == wanted.group(1)
