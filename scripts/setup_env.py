#!/usr/bin/env python3
"""Make `.venv` with everything the course needs; `make setup` runs this file.

It gets uv into `.venv`, installs what docker/requirements/ locks, and takes torch from the first of
these that works: a wheel folder or page that pip's or uv's find-links names, PyTorch's CPU index,
PyPI. TOPEKA_TORCH=find-links, cpu-index or pypi insists on one of them. A complete `.venv` is left as it
is, an interrupted one is made anew. Only the standard library is used, and the file must parse on old
Pythons, so that it can say that they are too old.

Exit 0: ready. 1 (only with --check): not set up, or out of date. 3: could not run; the last lines say
what to do.
"""

import contextlib
import errno
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Iterator, NamedTuple, NoReturn  # noqa: UP035 - old Pythons know Iterator from here

UV = "0.13.9"
# Measured: 1.3 and 5.2 GB with an empty cache, whose files .venv shares where both are on one disk. The
# rest is for what Python compiles later.
CPU_GB, CUDA_GB = 2.0, 6.0
SOURCES = ("find-links", "cpu-index", "pypi")
LOCKED_INPUTS = ("cpu.txt", "torch-cpu.txt", "torch-pypi.txt")
# A probe must not keep anybody waiting who has no such network.
IMPATIENT = {"UV_HTTP_TIMEOUT": "5", "UV_HTTP_CONNECT_TIMEOUT": "5", "UV_HTTP_RETRIES": "0"}
NO_NETWORK = re.compile(
    r"failed to fetch|error sending request|dns error|name resolution|failed to establish a new connection"
    r"|proxyerror|connection (refused|reset|aborted)|timed? ?out|network is unreachable|sslerror|certificate"
    r"|connectivity is disabled|network was disabled|could not connect|tunnel",
    re.IGNORECASE,
)
DISK_FULL = re.compile(r"no space left on device|os error 28|disk quota exceeded", re.IGNORECASE)
NO_NETWORK_ADVICE = """\
a package index cannot be reached.
  - Try again: `make setup` goes on where it stopped.
  - Behind a proxy: set HTTPS_PROXY. Where TLS is inspected: set PIP_CERT to the CA bundle.
  - Without a network: put the wheels into a folder and set PIP_FIND_LINKS to it, PIP_NO_INDEX=1, UV_OFFLINE=1."""


class Environment(NamedTuple):
    """What decides which wheels fit: the Python of `.venv` and the system."""

    version: str
    implementation: str
    system: str
    processor: str

    @property
    def minor(self) -> str:
        """The version without its last part, such as `3.11`."""
        return self.version.rpartition(".")[0]


class Torch(NamedTuple):
    """Where torch comes from: uv's arguments, the disk space needed, and a sentence for the user."""

    source: str
    arguments: "list[str]"
    gigabytes: float
    told: str


class Failed(Exception):
    """Set-up could not be done; the message says what to do."""


class DiskFull(Failed):
    """The disk filled up while files were written, so `.venv` may be half-written."""


def say(message: str) -> None:
    """Tell the user something."""
    print("topeka: " + message, file=sys.stderr, flush=True)


def stop(message: str, code: int = 3) -> NoReturn:
    """Say `message` and end."""
    say(message)
    sys.exit(code)


if os.name != "posix":
    stop("Linux or macOS is needed. On Windows, use WSL.")
if sys.version_info < (3, 11):  # noqa: UP036 - this is where an old Python ends
    stop(
        "Python 3.11 or newer is needed, and {} is {}. Install one (Debian 12: `apt install python3 python3-venv`; "
        "macOS: `brew install python@3.11`), then run `make setup` again; `make setup PYTHON=...` names "
        "one that is not on PATH.".format(sys.executable, ".".join(map(str, sys.version_info[:3])))
    )


# --- is anything to do? --------------------------------------------------------------------------


class Checkout:
    """A checkout of the course and what is known about its `.venv`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.venv = root / ".venv"
        self.python = self.venv / "bin" / "python"
        self.requirements = root / "docker" / "requirements"
        self._record = self.venv / "topeka-setup.json"

    def noted(self) -> "dict[str, Any]":
        """Return what the last set-up noted at its end; empty if it was interrupted or never ran."""
        try:
            return dict(json.loads(self._record.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}

    def note(self, **values: object) -> None:
        """Note `values` for the next run, whole or not at all."""
        draft = self._record.with_suffix(".new")
        draft.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        draft.replace(self._record)

    def inputs(self) -> str:
        """Return a hash of everything that decides what set-up installs."""
        files = [Path(__file__).resolve(), *(self.requirements / name for name in LOCKED_INPUTS)]
        files += [self.root / package / "pyproject.toml" for package in ("shared", "grader")]
        return _hash(*(file.read_bytes() for file in files))

    def identity(self) -> str:
        """Return a hash that changes when `.venv` was moved or made anew by someone else."""
        return _hash(os.fsencode(self.venv), (self.venv / "pyvenv.cfg").read_bytes())

    def is_complete(self) -> bool:
        """Return whether `.venv` is as a finished set-up left it, perhaps of older inputs."""
        try:
            return self.noted().get("venv") == self.identity() and self.python.exists()
        except OSError:
            return False

    def is_foreign(self) -> bool:
        """Return whether someone else made `.venv`, such as `uv sync`."""
        return not self._record.exists()

    def is_fresh(self, insisted: "str | None") -> bool:
        """Return whether there is nothing to do."""
        noted = self.noted()
        same_torch = insisted in (None, noted.get("torch"))
        return same_torch and noted.get("inputs") == self.inputs() and self.is_complete()


def _hash(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


# --- running pip and uv --------------------------------------------------------------------------


def run(command: "list[str]", environment: "dict[str, str]") -> None:
    """Run a tool, show what it says but for its list of packages, and explain a failure.

    Raises:
        Failed: the tool failed; its last lines were shown.
    """
    # On a terminal the tool gets a terminal, or it would draw no progress.
    read, write = os.openpty() if sys.stderr.isatty() else os.pipe()
    if sys.stderr.isatty():
        _copy_window_size(sys.stderr.fileno(), write)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=write, stderr=write, env=environment)
    os.close(write)
    try:
        last_lines = _show(read)
    finally:
        os.close(read)
    if process.wait() == 0:
        return
    name = Path(command[0]).name if "-m" not in command else command[command.index("-m") + 1]
    if DISK_FULL.search(last_lines):
        raise DiskFull("the disk is full: make room, then run `make setup` again.")
    if NO_NETWORK.search(last_lines):
        raise Failed(NO_NETWORK_ADVICE)
    raise Failed(f"{name} failed, see above (exit status {process.returncode}).")


def _show(read: int) -> str:
    colour = rb"(\x1b\[[\d;]*m)*"
    listed = re.compile(colour + rb"( " + colour + rb"[-+~]" + colour + rb" \S|Using Python)")
    pending, tail = b"", b""
    while True:
        try:
            chunk = os.read(read, 1 << 16)
        except OSError as error:
            if error.errno != errno.EIO:  # how Linux says that a terminal has no more writers
                raise
            chunk = b""
        *lines, pending = (pending + chunk).split(b"\n")
        shown = b"".join(line + b"\n" for line in lines if not listed.match(line))
        if not chunk or not re.match(colour + rb"( |Using )", pending):  # surely no line of the list
            shown, pending = shown + pending, b""
        tail = (tail + shown)[-8000:]
        os.write(sys.stderr.fileno(), shown)
        if not chunk:
            return re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", tail.decode(errors="replace"))


def _copy_window_size(source: int, target: int) -> None:
    import fcntl
    import termios

    with contextlib.suppress(OSError):
        fcntl.ioctl(target, termios.TIOCSWINSZ, fcntl.ioctl(source, termios.TIOCGWINSZ, b"\0" * 8))


def answer(command: "list[str]", environment: "dict[str, str] | None" = None) -> "str | None":
    """Return what a command printed, or None if it failed or could not run."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment, check=False
        )
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


# --- the steps -----------------------------------------------------------------------------------


def make_venv(checkout: Checkout) -> Environment:
    """Make `.venv`, or keep the one that is there if it is sound, and see what it is."""
    probe = (
        "import platform as p, sys; "
        "print(p.python_version(), sys.implementation.name, sys.platform, p.machine(), "
        "sys.version_info >= (3, 11))"
    )
    usable = checkout.is_complete() or checkout.is_foreign()
    here = answer([str(checkout.python), "-I", "-c", probe]) if usable else None
    if here is None or here.split()[-1] != "True":
        for module in ("venv", "ensurepip"):
            if importlib.util.find_spec(module) is None:
                raise Failed(
                    f"{sys.executable} lacks the module {module}. On Debian and Ubuntu: "
                    "`apt install python3-venv`, then run `make setup` again."
                )
        check_space(checkout.venv, CPU_GB)
        doing = "repairing" if checkout.venv.exists() else "making"
        say(f"{doing} .venv with Python {sys.version.split()[0]}")
        checkout.venv.mkdir(parents=True, exist_ok=True)
        checkout.note()  # from here to the end .venv counts as interrupted
        for child in checkout.venv.iterdir():
            if child.name != "topeka-setup.json":
                shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()
        # Started from inside an environment, the Python underneath makes the better parent.
        base = getattr(sys, "_base_executable", None) or sys.executable
        run([base, "-I", "-m", "venv", str(checkout.venv)], dict(os.environ))
        here = answer([str(checkout.python), "-I", "-c", probe])
        if here is None:
            raise Failed(f"{checkout.python} does not run. Remove .venv and run `make setup` again.")
    elif checkout.is_foreign():
        say("using the .venv that is there")
    return Environment(*here.split()[:4])


def get_uv(checkout: Checkout) -> str:
    """Return the path of the pinned uv in `.venv`, installing it if it is not there."""
    uv = str(checkout.venv / "bin" / "uv")
    if (answer([uv, "--version"]) or "").split()[1:2] == [UV]:
        return uv
    python = [str(checkout.python), "-I", "-m"]
    if answer([*python, "pip", "--version"]) is None:  # an environment made by uv has no pip
        run([*python, "ensurepip"], dict(os.environ))
    say(f"getting uv {UV}")
    options = ["--quiet", "--disable-pip-version-check", "--retries", "2", "--force-reinstall", "--no-deps"]
    run([*python, "pip", "install", *options, f"uv=={UV}"], dict(os.environ))
    return uv


def pip_settings(checkout: Checkout) -> "dict[str, list[str]]":
    """Return pip's settings by name, from its environment and all its files, each with every value found."""
    import ast  # here, because a run that has nothing to do should start fast

    found: dict[str, list[str]] = {}
    listing = answer([str(checkout.python), "-I", "-m", "pip", "config", "list"]) or ""
    # What pip itself would prefer comes first: the environment, then [install], then [global].
    for scope in (":env:", "install", "global"):
        for line in listing.splitlines():
            key, _, value = line.partition("=")
            if key.startswith(scope + "."):
                with contextlib.suppress(ValueError, SyntaxError):
                    found.setdefault(key[len(scope) + 1 :], []).append(str(ast.literal_eval(value)))
    return found


def uv_environment(settings: "dict[str, list[str]]") -> "dict[str, str]":
    """Return uv's environment: what pip is told about the network, uv is told too."""
    environment = {k: v for k, v in os.environ.items() if k not in ("UV_FIND_LINKS", "UV_TORCH_BACKEND")}
    index = () if "UV_INDEX_URL" in environment else (("index-url", "UV_DEFAULT_INDEX"),)
    for key, name in (*index, ("cert", "SSL_CERT_FILE"), ("proxy", "ALL_PROXY")):
        if key in settings:
            environment.setdefault(name, settings[key][0])
    return environment


def find_links(settings: "dict[str, list[str]]") -> "list[str]":
    """Return the wheel folders and pages that uv and pip are told of, without folders that do not exist."""
    named = [link for link in os.environ.get("UV_FIND_LINKS", "").split(",") if link.strip()]
    named += [link for value in settings.get("find-links", []) for link in value.split()]
    links = [link if "://" in link else str(Path(link).expanduser().absolute()) for link in named]
    return [link for link in dict.fromkeys(links) if "://" in link or Path(link).is_dir()]


class Uv(NamedTuple):
    """The pinned uv, working on `.venv`; it installs exactly what is named and no dependencies."""

    program: str
    python: str
    environment: "dict[str, str]"

    def _command(self, *arguments: str) -> "list[str]":
        return [self.program, "pip", "install", "--python", self.python, "--no-deps", *arguments]

    def install(self, *arguments: str) -> None:
        """Install what the arguments name."""
        run(self._command(*arguments), self.environment)

    def can_install(self, *arguments: str) -> bool:
        """Return whether `install` would find what is named; waits a few seconds at most."""
        return answer(self._command("--dry-run", *arguments), {**self.environment, **IMPATIENT}) is not None

    def cache(self) -> Path:
        """Return the folder of uv's cache."""
        return Path((answer([self.program, "cache", "dir"], self.environment) or ".").strip())


def choose_torch(
    requirements: Path, here: Environment, uv: Uv, links: "list[str]", insisted: "str | None"
) -> Torch:
    """Return the first source of torch that works."""
    locked = requirements / "torch-cpu.txt"
    pin = re.search(r"^torch==(\S+)\+cpu\b", locked.read_text(encoding="utf-8"), re.MULTILINE)
    assert pin, f"{locked} pins no CPU build of torch"
    version, cpu_build = pin[1], f"torch=={pin[1]}+cpu"
    cpu, note = ["--require-hashes", "-r", str(locked)], ""
    if here != Environment(here.version, "cpython", "linux", "x86_64") or here.minor != "3.11":
        # The lock has the hash of one wheel, and this is another.
        cpu, note = [cpu_build], ". The lock has no hash of this wheel: it is taken by its version alone"

    on_linux = here.system == "linux"
    if on_linux and insisted in (None, "find-links"):
        for link in links:
            options = ["--no-index", "--find-links", link]
            if uv.can_install(*options, cpu_build):
                told = f"torch {version}+cpu from find-links, {link} has it{note}"
                return Torch("find-links", [*options, *cpu], CPU_GB, told)
    if on_linux and insisted in (None, "cpu-index"):
        options = ["--torch-backend", "cpu"]
        if uv.can_install(*options, cpu_build):
            told = f"torch {version}+cpu from PyTorch's CPU index, which answers{note}"
            return Torch("cpu-index", [*options, *cpu], CPU_GB, told)
    if insisted not in (None, "pypi"):
        raise Failed(f"TOPEKA_TORCH is {insisted}, but {cpu_build} for this Python cannot be had there.")

    arguments = ["--require-hashes", "-r", str(requirements / "torch-pypi.txt")]
    if not on_linux:
        told = f"torch {version} from PyPI, which has a CPU build for this system"
        return Torch("pypi", arguments, CPU_GB, told)
    why = f"no find-links has {cpu_build} for this Python and PyTorch's CPU index does not answer"
    why = "TOPEKA_TORCH asks for it" if insisted else why
    told = f"torch {version} from PyPI: {why}. It is the CUDA build and brings about 4.5 GB of libraries"
    return Torch("pypi", arguments, CUDA_GB, told)


def check_space(folder: Path, needed_gb: float) -> None:
    """Raise `Failed` if the disk that `folder` is on, or will be on, has too little room."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 1e9
    if free < needed_gb:
        raise Failed(
            f"not enough disk space: set-up needs {needed_gb:.1f} GB and {folder} has {free:.1f} GB free. "
            "Make room, then run `make setup` again. UV_CACHE_DIR puts uv's cache on another disk."
        )


def set_up(checkout: Checkout, insisted: "str | None") -> None:
    """Make `.venv` or bring it up to date."""
    started = time.monotonic()
    is_update = "inputs" in checkout.noted()
    here = make_venv(checkout)
    checkout.note()  # until the end .venv counts as interrupted
    try:
        source = install(checkout, here, insisted, is_update)
    except DiskFull:
        raise
    except Failed:
        # pip and uv fail before they write, so what is there is whole and the next run can go on with it.
        checkout.note(venv=checkout.identity())
        raise
    checkout.note(venv=checkout.identity(), inputs=checkout.inputs(), torch=source)
    say(f".venv is ready after {time.monotonic() - started:.0f} s")


def install(checkout: Checkout, here: Environment, insisted: "str | None", is_update: bool) -> str:
    """Install everything into `.venv`; return where torch came from."""
    program = get_uv(checkout)
    settings = pip_settings(checkout)
    uv = Uv(program, str(checkout.python), uv_environment(settings))
    links = find_links(settings)
    torch = choose_torch(checkout.requirements, here, uv, links, insisted)
    say(torch.told)
    if not is_update:  # which needs little room
        for folder in (checkout.venv, uv.cache()):
            check_space(folder, torch.gigabytes)

    folders = [option for link in links if "://" not in link for option in ("--find-links", link)]
    uv.install(*folders, "--require-hashes", "-r", str(checkout.requirements / "cpu.txt"))
    uv.install(*torch.arguments)
    packages = (str(checkout.root / "shared"), str(checkout.root / "grader"))
    uv.install("--no-build-isolation", "-e", packages[0], "-e", packages[1])
    return torch.source


@contextlib.contextmanager
def alone(checkout: Checkout) -> "Iterator[None]":
    """Keep a second set-up of the same checkout waiting."""
    import fcntl

    if not os.access(checkout.root, os.W_OK):
        raise Failed(
            f"{checkout.root} cannot be written. Set-up needs a checkout that you may write to: "
            "clone it to a folder of your own."
        )
    folder = checkout.root / ".topeka"
    folder.mkdir(exist_ok=True)
    with (folder / "setup.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another set-up of this checkout is running; waiting for it to end")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main() -> int:
    """Set up, or with `--check` only say whether that is needed."""
    checkout = Checkout(Path(__file__).resolve().parents[1])
    insisted = os.environ.get("TOPEKA_TORCH") or None
    if insisted not in (None, *SOURCES):
        stop(f"TOPEKA_TORCH is {insisted}; it can be {', '.join(SOURCES)}, or unset")
    if sys.argv[1:] not in ([], ["--check"]):
        stop(f"usage: {sys.argv[0]} [--check]", 2)
    try:
        if checkout.is_fresh(insisted):
            return 0
        if sys.argv[1:] == ["--check"]:
            return 1
        with alone(checkout):
            if not checkout.is_fresh(insisted):  # whoever we waited for may have done it
                set_up(checkout, insisted)
    except Failed as error:
        stop(str(error))
    except KeyboardInterrupt:
        stop("stopped; `make setup` begins again", 130)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            stop("the disk is full: make room, then run `make setup` again.")
        stop(f"{error.filename or 'the system'}: {error.strerror or error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
