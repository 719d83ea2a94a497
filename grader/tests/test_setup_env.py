"""Set-up, run for real on a small checkout: real Python, pip and uv, with wheels from a folder instead of a network."""

import ast
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "setup_env.py"
BUILD = ("editables", "hatchling", "packaging", "pathspec", "pluggy", "trove-classifiers")
# The Python below the environment that runs the tests, as a learner would name it.
PYTHON = getattr(sys, "_base_executable", sys.executable)
NOBODY_LISTENS = "http://127.0.0.1:9"


def _module(name: str, file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


setup_env = _module("setup_env", SCRIPT)
wheelhouse = _module("wheelhouse", Path(__file__).with_name("wheelhouse.py"))


class Checkout:
    """A checkout with a short lock, whose environment knows a wheel folder and no network."""

    def __init__(self, root: Path, wheels: Path) -> None:
        self.root, self.wheels = root, wheels
        copied = ("pyproject.toml", "shared/pyproject.toml", "grader/pyproject.toml", "Makefile")
        for name in (*copied, "scripts/setup_env.py"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
        for package in ("shared", "grader"):
            (root / package / "src" / package).mkdir(parents=True)
            (root / package / "src" / package / "__init__.py").write_text("")
        locked = root / "docker" / "requirements"
        locked.mkdir(parents=True)
        pins = [
            wheelhouse.pin(next(wheels.glob(f"{name.replace('-', '_')}-*"))) for name in (*BUILD, "small")
        ]
        (locked / "cpu.txt").write_text("".join(pins))
        (locked / "torch-cpu.txt").write_text(wheelhouse.pin(next(wheels.glob("cpu/torch-*"))))
        (locked / "torch-pypi.txt").write_text(wheelhouse.pin(next(wheels.glob("pypi/torch-*"))))
        home = root.parent / "home"
        home.mkdir(exist_ok=True)
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": f"{wheels} {wheels / 'cpu'}",
            "UV_OFFLINE": "1",
            "UV_CACHE_DIR": str(root.parent / "cache"),
        }

    @property
    def without_torch(self) -> dict[str, str]:
        return {"PIP_FIND_LINKS": str(self.wheels)}

    def set_up(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [PYTHON, "-I", str(self.root / "scripts" / "setup_env.py"), *arguments]
        return self._run(command, environment)

    def make(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self._run(["make", "-C", str(self.root), "--no-print-directory", *arguments], environment)

    def _run(self, command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        environment = {**self.environment, **environment}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)

    def python(self, code: str) -> str:
        done = self._run([str(self.root / ".venv" / "bin" / "python"), "-c", code], {})
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def torch(self) -> str:
        return self.python("import torch; print(torch.__version__)")

    def uninstall(self, package: str) -> None:
        venv = self.root / ".venv"
        done = self._run([str(venv / "bin/uv"), "pip", "uninstall", "-q", "--python", str(venv), package], {})
        assert done.returncode == 0, done.stderr

    def change_lock(self) -> None:
        with (self.root / "docker" / "requirements" / "cpu.txt").open("a") as file:
            file.write("# changed\n")


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    try:
        if distribution("uv").version != setup_env.UV:
            pytest.skip(f"uv here is not {setup_env.UV}: these tests need the .venv that `make setup` makes")
        for name in ("uv", *BUILD):
            wheelhouse.repack(name, folder)
    except PackageNotFoundError as error:
        pytest.skip(f"{error.name} is not installed: these tests need the .venv that `make setup` makes")
    wheelhouse.make("small", "1.0", folder)
    wheelhouse.make("torch", "2.13.0+cpu", folder / "cpu")
    wheelhouse.make("torch", "2.13.0", folder / "pypi")
    return folder


@pytest.fixture
def checkout(tmp_path: Path, wheels: Path) -> Checkout:
    """Untouched by set-up."""
    return Checkout(tmp_path / "a course", wheels)


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory, wheels: Path) -> Checkout:
    """Set up once, through `make`; tests that use it leave it set up."""
    checkout = Checkout(tmp_path_factory.mktemp("ready") / "a course", wheels)
    done = checkout.make("setup", f"PYTHON={PYTHON}")
    assert done.returncode == 0, done.stderr
    assert "from find-links" in done.stderr
    assert str(wheels / "cpu") in done.stderr
    return checkout


# --- what comes out --------------------------------------------------------------------------


def test_everything_is_installed_and_editable(ready: Checkout) -> None:
    assert ready.torch() == "2.13.0+cpu"
    assert ready.python("import small; print(small.__version__)") == "1.0"
    found = ready.python(
        "import grader, shared; print(grader.__file__, shared.__file__, sep='\\n')"
    ).splitlines()
    assert found == [str(ready.root / p / "src" / p / "__init__.py") for p in ("grader", "shared")]
    assert (ready.root / ".venv" / "bin" / "topeka").exists()


def test_a_second_run_does_nothing_and_says_nothing(ready: Checkout) -> None:
    def state() -> dict[Path, float]:
        return {f: f.stat().st_mtime for f in (ready.root / ".venv").rglob("*") if f.suffix != ".pyc"}

    before = state()
    times = []
    for _ in range(3):
        started = time.monotonic()
        done = ready.make("setup")
        times.append(time.monotonic() - started)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert {f for f, t in state().items() if before.get(f) != t and f.name != "__pycache__"} == set()
    assert min(times) < 0.5, f"{times} s: a run with nothing to do should take a tenth of a second"
    assert ready.set_up("--check").returncode == 0


def test_nothing_to_do_needs_no_python_on_path(ready: Checkout, tmp_path: Path) -> None:
    done = ready.make("setup", PATH=_path_with(tmp_path, "sh", "make"))
    assert (done.returncode, done.stderr) == (0, "")


def test_a_changed_lock_is_installed_into_the_same_environment(ready: Checkout) -> None:
    keepsake = ready.root / ".venv" / "keepsake"
    keepsake.write_text("")
    ready.change_lock()
    assert ready.set_up("--check").returncode == 1
    done = ready.set_up()
    assert done.returncode == 0, done.stderr
    assert "making" not in done.stderr
    assert keepsake.exists()
    assert ready.set_up("--check").returncode == 0


# --- where torch comes from ----------------------------------------------------------------------


@pytest.fixture
def indexes(tmp_path: Path) -> Iterator["wheelhouse.Indexes"]:
    if shutil.which("openssl") is None:
        pytest.skip("the stand-in for the package indexes needs openssl for its certificates")
    folder = tmp_path / "certificates"
    folder.mkdir()
    indexes = wheelhouse.Indexes(folder)
    yield indexes
    indexes.close()


@pytest.mark.skipif(
    sys.platform != "linux", reason="on macOS PyPI's torch is the CPU build, and always taken"
)
def test_torch_comes_from_the_cpu_index_if_it_answers_and_else_from_pypi(
    ready: Checkout, indexes: "wheelhouse.Indexes"
) -> None:
    indexes.folders = {"/whl/cpu/torch/": ready.wheels / "cpu", "/simple/torch/": ready.wheels / "pypi"}
    network = {**indexes.environment, **ready.without_torch}

    def without_torch() -> None:
        ready.change_lock()
        ready.uninstall("torch")

    without_torch()
    done = ready.set_up(**network)
    assert done.returncode == 0, done.stderr
    assert "torch 2.13.0+cpu from PyTorch's CPU index" in done.stderr
    assert ready.torch() == "2.13.0+cpu"

    # With a Python the lock has no hash for, the version is all there is to go by.
    is_locked = sys.version_info[:2] == (3, 11) and os.uname().machine == "x86_64"
    assert ("no hash of this wheel" in done.stderr) == (not is_locked)

    del indexes.folders["/whl/cpu/torch/"]
    without_torch()
    done = ready.set_up(**network)
    assert done.returncode == 0, done.stderr
    assert re.search(r"torch 2\.13\.0 from PyPI: .*CUDA build.*4\.5 GB", done.stderr)
    assert ready.torch() == "2.13.0"

    done = ready.set_up(**network, TOPEKA_TORCH="find-links")
    assert done.returncode == 3
    assert (
        "TOPEKA_TORCH is find-links, but torch==2.13.0+cpu for this Python cannot be had there" in done.stderr
    )

    done = ready.set_up(
        TOPEKA_TORCH="find-links"
    )  # changes it back, and leaves the checkout as other tests want it
    assert done.returncode == 0, done.stderr
    assert ready.torch() == "2.13.0+cpu"
    assert ready.set_up("--check").returncode == 0, "without TOPEKA_TORCH any source is as good"


def test_a_torch_that_is_not_the_locked_one_is_refused(ready: Checkout) -> None:
    locked = ready.root / "docker" / "requirements" / "torch-cpu.txt"
    good = locked.read_text()
    ready.uninstall("torch")
    try:
        locked.write_text(good[: good.index("sha256:") + 7] + "0" * 64 + "\n")
        done = ready.set_up()
        if sys.version_info[:2] == (3, 11) and os.uname().machine == "x86_64":
            assert done.returncode == 3
            assert "Hash mismatch" in done.stderr
    finally:
        locked.write_text(good)
        assert ready.set_up().returncode == 0


def test_find_links_of_pips_files_and_of_uv_are_found(ready: Checkout, tmp_path: Path) -> None:
    settings = tmp_path / "pip.conf"
    settings.write_text(
        f"[global]\nfind-links =\n    {ready.wheels}\n    {tmp_path / 'nowhere'}\n    https://wheels.invalid/page\n"
        f"index-url = https://mirror.invalid/simple\ncert = {settings}\n"
        f"[install]\nfind-links = {ready.wheels / 'cpu'}\n"
    )
    code = (
        f"import sys; sys.path.insert(0, {str(ready.root / 'scripts')!r})\n"
        "import json, os, setup_env as s; from pathlib import Path\n"
        f"c = s.Checkout(Path({str(ready.root)!r})); found = s.pip_settings(c)\n"
        "print(json.dumps([s.find_links(found), s.uv_environment(found)]))"
    )
    environment = {**ready.environment, "PIP_CONFIG_FILE": str(settings), "UV_FIND_LINKS": str(tmp_path)}
    del environment["PIP_FIND_LINKS"]
    done = subprocess.run([PYTHON, "-c", code], env=environment, capture_output=True, text=True, check=True)
    links, for_uv = json.loads(done.stdout)
    assert links == [
        str(tmp_path),
        str(ready.wheels / "cpu"),
        str(ready.wheels),
        "https://wheels.invalid/page",
    ]
    assert for_uv["UV_DEFAULT_INDEX"] == "https://mirror.invalid/simple"
    assert for_uv["SSL_CERT_FILE"] == str(settings)
    assert "UV_FIND_LINKS" not in for_uv


# --- interrupted, twice at once, made by others ------------------------------------------------


def test_a_killed_set_up_is_repaired_by_two_that_start_at_once(checkout: Checkout) -> None:
    command = [PYTHON, "-I", str(checkout.root / "scripts" / "setup_env.py")]
    first = subprocess.Popen(
        command, env=checkout.environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert first.stderr is not None
    assert "making .venv" in first.stderr.readline()
    while not (checkout.root / ".venv" / "pyvenv.cfg").exists():
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert checkout.set_up("--check").returncode == 1

    both = [
        subprocess.Popen(command, env=checkout.environment, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=240)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum("repairing .venv" in text for text in said) == 1
    assert sum("waiting for it to end" in text for text in said) == 1
    assert checkout.torch() == "2.13.0+cpu"
    assert checkout.set_up("--check").returncode == 0

    # A checkout that moved has scripts that start the Python of the old place: they must be made anew.
    moved = checkout.root.with_name("moved")
    checkout.root.rename(moved)
    checkout.root = moved
    assert checkout.set_up("--check").returncode == 1


def test_an_environment_made_by_uv_is_used_as_it_is(checkout: Checkout, wheels: Path) -> None:
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or "uv"
    venv = checkout.root / ".venv"
    checkout._run([uv, "venv", "-q", "--python", PYTHON, str(venv)], {})
    (venv / "keepsake").write_text("")
    done = checkout.set_up()
    assert done.returncode == 0, done.stderr
    assert "using the .venv that is there" in done.stderr
    assert (venv / "keepsake").exists()
    assert checkout.torch() == "2.13.0+cpu"


# --- errors ----------------------------------------------------------------------------------


def _path_with(folder: Path, *programs: str) -> str:
    for program in programs:
        found = shutil.which(program)
        assert found is not None
        (folder / program).symlink_to(found)
    return str(folder)


@pytest.mark.parametrize("old", [False, True])
def test_no_new_enough_python(checkout: Checkout, tmp_path: Path, old: bool) -> None:
    folder = tmp_path / "programs"
    folder.mkdir()
    path = _path_with(folder, "sh", "make")
    if old:  # answers like a Python that is too old
        (folder / "python3").write_text("#!/bin/sh\nexit 1\n")
        (folder / "python3").chmod(0o755)
    done = checkout.make("setup", PATH=path)
    assert done.returncode == 2  # make's own
    assert "Error 3" in done.stderr
    assert "Python 3.11 or newer is needed" in done.stderr
    assert "apt install python3 python3-venv" in done.stderr
    assert not (checkout.root / ".venv").exists()


def test_an_old_python_can_read_the_script_up_to_its_error() -> None:
    ast.parse(SCRIPT.read_text(), feature_version=(3, 6))


@pytest.mark.parametrize("version", ["3.8", "3.9", "3.10"])
def test_an_old_python_says_so(version: str) -> None:
    python = shutil.which(f"python{version}")
    if python is None or subprocess.run([python, "-V"], capture_output=True, check=False).returncode != 0:
        pytest.skip(f"no Python {version} here")
    done = subprocess.run([python, str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 3
    assert "Python 3.11 or newer is needed" in done.stderr


def test_debian_without_the_package_for_venv(checkout: Checkout) -> None:
    script = str(checkout.root / "scripts" / "setup_env.py")
    code = f"import runpy, sys; sys.modules['ensurepip'] = None; sys.argv = [{script!r}]; "
    code += f"runpy.run_path({script!r}, run_name='__main__')"
    done = checkout._run([PYTHON, "-c", code], {})
    assert done.returncode == 3
    assert "lacks the module ensurepip" in done.stderr
    assert "apt install python3-venv" in done.stderr


def test_too_little_disk_space(tmp_path: Path) -> None:
    with pytest.raises(setup_env.Failed, match=r"needs 1000000\.0 GB and .* has \d+\.\d GB free"):
        setup_env.check_space(tmp_path / "not" / "there", 1e6)


def _mount(folder: Path, *options: str) -> bool:
    folder.mkdir(exist_ok=True)
    if os.geteuid() != 0 or sys.platform != "linux":
        return False
    command = ["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small disk"
    if not _mount(folder, "-o", "size=20m"):
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(small_disk: Path, wheels: Path) -> None:
    checkout = Checkout(small_disk / "course", wheels)
    done = checkout.set_up()
    assert done.returncode == 3
    assert re.search(r"needs 2\.0 GB and .* has 0\.0 GB free", done.stderr)
    assert not (checkout.root / ".venv").exists()


def test_a_disk_that_fills_up_on_the_way(small_disk: Path, ready: Checkout) -> None:
    record = ready.root / ".venv" / "topeka-setup.json"
    before = record.read_text()
    (small_disk / "ballast").write_bytes(b"\0" * (20 << 20))
    ready.change_lock()
    ready.uninstall("small")
    try:
        done = ready.set_up(UV_CACHE_DIR=str(small_disk / "cache"))
        assert done.returncode == 3, done.stderr
        assert "the disk is full: make room" in done.stderr
        assert json.loads(record.read_text()) == {}, "what may be half-written must be made anew"
    finally:
        record.write_text(before)  # it was not: the full disk was another
        assert ready.set_up().returncode == 0


def test_a_read_only_checkout(checkout: Checkout) -> None:
    is_mounted = os.geteuid() == 0 and sys.platform == "linux"
    if is_mounted:
        bind = subprocess.run(
            ["mount", "--bind", checkout.root, checkout.root], capture_output=True, check=False
        )
        if bind.returncode != 0:
            pytest.skip("root may write everywhere, and no file system can be mounted here")
        subprocess.run(["mount", "-o", "remount,ro,bind", checkout.root], check=True)
    else:
        checkout.root.chmod(0o555)
    try:
        done = checkout.set_up()
    finally:
        if is_mounted:
            subprocess.run(["umount", checkout.root], check=True)
        else:
            checkout.root.chmod(0o755)
    assert done.returncode == 3
    assert "cannot be written" in done.stderr
    assert "clone it to a folder of your own" in done.stderr


def test_something_in_the_way(checkout: Checkout) -> None:
    (checkout.root / ".venv").write_text("not a folder")
    done = checkout.set_up()
    assert done.returncode == 3
    assert ".venv: File exists" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_network_for_uv(ready: Checkout) -> None:
    # A cache without the wheels, a wheel folder without them, and a proxy that nobody is behind.
    ready.change_lock()
    ready.uninstall("small")
    network = {"UV_OFFLINE": "0", "HTTPS_PROXY": NOBODY_LISTENS, "PIP_FIND_LINKS": str(ready.wheels / "cpu")}
    network["UV_CACHE_DIR"] = str(ready.root.parent / "empty cache")
    try:
        done = ready.set_up(**network, UV_HTTP_RETRIES="0")
        assert done.returncode == 3
        assert "Failed to fetch" in done.stderr, "the tool's own lines are kept"
        assert "a package index cannot be reached" in done.stderr
        assert "HTTPS_PROXY" in done.stderr
    finally:
        assert ready.set_up().returncode == 0


def test_no_network_for_pip(ready: Checkout) -> None:
    ready.change_lock()
    (ready.root / ".venv" / "bin" / "uv").unlink()
    try:
        done = ready.set_up(PIP_NO_INDEX="0", PIP_FIND_LINKS="", HTTPS_PROXY=NOBODY_LISTENS)
        assert done.returncode == 3
        assert "a package index cannot be reached" in done.stderr
        assert "PIP_FIND_LINKS" in done.stderr
    finally:
        assert ready.set_up().returncode == 0


def test_wrong_use(checkout: Checkout) -> None:
    done = checkout.set_up(TOPEKA_TORCH="moon")
    assert done.returncode == 3
    assert "TOPEKA_TORCH is moon; it can be find-links, cpu-index, pypi" in done.stderr
    assert checkout.set_up("--chek").returncode == 2


# --- the Makefile ----------------------------------------------------------------------------


def test_help_is_the_default_and_lists_every_target(checkout: Checkout) -> None:
    done = checkout.make()
    assert done.returncode == 0
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert targets is not None
    for target in targets[1].split():
        assert re.search(rf"^  make {target}\b.+[a-z]", done.stdout, re.MULTILINE), (
            f"make help does not list {target}"
        )
    assert not (checkout.root / ".venv").exists()


def test_lab_without_a_chapter_says_what_to_type(ready: Checkout) -> None:
    done = ready.make("lab")
    assert done.returncode == 2
    assert "make lab CH=1" in done.stderr
