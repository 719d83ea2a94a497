"""The Docker Engine: what it answers, and what a stack lacks in it.

The engine is asked through the command `docker`, so contexts, DOCKER_HOST and TLS settings hold as they do for
`docker compose`.
"""

import getpass
import grp
import json
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from grader.catalog import Stack
from grader.doctor.answer import Answer, ask
from grader.doctor.finding import GB, Finding, Frozen, in_gb, missing, ok, warning
from grader.sandbox import SANDBOX_IMAGE

WORKSPACE_IMAGE = "topeka-workspace"
"""The repository of the workspace images; the stack's name is the tag."""

ROOM_FOR_IMAGES: dict[Stack, int] = {"cpu": 12 * GB, "cuda": 40 * GB, "multi-gpu": 40 * GB}
"""Free disk to build a stack's two images: the images, their layers in the build cache, downloads.

Generous estimates: the sandbox images take 2.9 GB (cpu) and 9.4 GB (cuda), the cpu workspace 4.3 GB."""

LITTLE_ROOM = 5 * GB

ENGINE, TOOLKIT, DISK = "Docker Engine", "NVIDIA Container Toolkit", "disk for images"


class Engine(Frozen):
    """What the Docker Engine said.

    Attributes:
        version: empty if none answers.
        trouble: why none answers; empty otherwise.
        endpoint: where it was asked, such as `unix:///var/run/docker.sock`.
        has_nvidia: it can attach NVIDIA GPUs, by a runtime or by device files (CDI).
        cgroup_driver: `systemd` or `cgroupfs`.
        images: of this course, as `topeka-sandbox:cpu`.
        free_disk: bytes where it keeps images; None if that cannot be seen from here.
        has_toolkit: NVIDIA's `nvidia-ctk` is installed beside it.
        in_docker_group: this user is a member of the group `docker`.
    """

    version: str = ""
    trouble: str = ""
    endpoint: str = ""
    has_nvidia: bool = False
    cgroup_driver: str = ""
    images: frozenset[str] = frozenset()
    free_disk: int | None = None
    has_toolkit: bool = False
    in_docker_group: bool = False

    @property
    def is_remote(self) -> bool:
        """Whether it runs on another machine, as far as its address tells."""
        return bool(self.endpoint) and not self.endpoint.startswith(("unix://", "npipe://", "fd://"))


def ask_engine() -> Engine:
    """Return what the engine says that the command `docker` uses."""
    with ThreadPoolExecutor() as pool:
        info_later = pool.submit(ask, "docker", "info", "--format", "{{json .}}")
        place_later = pool.submit(
            ask, "docker", "context", "inspect", "--format", "{{.Endpoints.docker.Host}}"
        )
        names = ask(
            "docker", "image", "ls", "--format", "{{.Repository}}:{{.Tag}}", "--filter", "reference=topeka-*"
        )
        return read_engine(info_later.result(), names, place_later.result())


def read_engine(info: Answer, names: Answer, place: Answer) -> Engine:
    """Understand the answers of `docker info`, `docker image ls` and `docker context inspect`."""
    try:
        known: dict[str, Any] = json.loads(info.text or "{}")
    except ValueError:
        known = {}
    version = str(known.get("ServerVersion") or "")
    trouble = info.trouble or "; ".join(known.get("ServerErrors") or []) or "no answer"
    engine = Engine(
        version=version,
        trouble="" if version else trouble,
        endpoint=place.text,
        has_nvidia=_attaches_nvidia(known),
        cgroup_driver=str(known.get("CgroupDriver") or ""),
        images=frozenset(names.text.split()),
        has_toolkit=shutil.which("nvidia-ctk") is not None,
        in_docker_group=_in_docker_group(),
    )
    if engine.is_remote:
        return engine
    return engine.model_copy(update={"free_disk": _free(str(known.get("DockerRootDir") or ""))})


def _attaches_nvidia(info: dict[str, Any]) -> bool:
    """Whether it has the runtime `nvidia`, or knows a device file (CDI) of an NVIDIA GPU."""
    devices: Iterable[dict[str, Any]] = info.get("DiscoveredDevices") or []
    return "nvidia" in (info.get("Runtimes") or {}) or any(
        str(device.get("ID", "")).startswith("nvidia.com/gpu") for device in devices
    )


def _free(folder: str) -> int | None:
    try:
        return shutil.disk_usage(folder).free if Path(folder).is_absolute() else None
    except OSError:
        return None  # the engine runs in a virtual machine of its own, or hides its folder


def _in_docker_group() -> bool:
    try:
        return getpass.getuser() in grp.getgrnam("docker").gr_mem
    except (KeyError, OSError):
        return False  # no such group, or no name for this user


# --- what a stack lacks in it ----------------------------------------------------------------------


def stack_findings(engine: Engine, stack: Stack, *, in_container: bool) -> list[Finding]:
    """Judge what a stack's container needs of the engine, hardware apart."""
    findings = [engine_finding(engine, in_container=in_container)]
    if not engine.version:
        return findings
    if stack != "cpu":
        findings.append(toolkit_finding(engine))
        if engine.cgroup_driver == "systemd" and engine.has_nvidia:
            findings.append(
                warning(
                    "cgroup driver",
                    "systemd: a `systemctl daemon-reload` may take the GPU from running containers",
                    "restart the container when that happens; docs/remote-gpu.md says how to prevent it",
                )
            )
    return [*findings, *image_findings(engine, stack), *disk_findings(engine, stack)]


def engine_finding(engine: Engine, *, in_container: bool) -> Finding:
    """Judge whether an engine answers, and if not, why."""
    if engine.version:
        return ok(ENGINE, f"{engine.version} at {engine.endpoint}" if engine.endpoint else engine.version)
    trouble = engine.trouble.lower()
    if "permission denied" in trouble:
        how = (
            "this user is in the group docker, but this session began before that: log out and in again"
            if engine.in_docker_group
            else "sudo usermod -aG docker $USER, then log out and in again (whoever is in that group is as "
            "powerful as root)"
        )
        return missing(ENGINE, f"permission denied at {engine.endpoint or 'its socket'}", how)
    if in_container and not engine.is_remote:
        return missing(
            ENGINE,
            "none: this machine is itself a container, and no engine answers inside",
            "nothing to repair: work in this environment, where tests run in the local sandbox, which is not "
            "isolated, or in the grader's container beside it",
        )
    if "is not installed" in trouble:
        return missing(ENGINE, engine.trouble, "install it: https://docs.docker.com/engine/install/")
    if engine.is_remote:
        how = (
            f"{engine.endpoint} comes from DOCKER_HOST or the context; is that machine up, and its port open?"
        )
        return missing(ENGINE, engine.trouble, how)
    return missing(
        ENGINE, engine.trouble, "sudo systemctl start docker; `sudo journalctl -u docker -n 20` if it fails"
    )


def toolkit_finding(engine: Engine) -> Finding:
    """Judge whether the engine can attach NVIDIA GPUs."""
    if engine.has_nvidia:
        return ok(TOOLKIT, "the engine can attach NVIDIA GPUs")
    configure = "sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart docker"
    if engine.has_toolkit and not engine.is_remote:
        return missing(
            TOOLKIT, "installed, but the engine has neither its runtime nor its devices", configure
        )
    return missing(
        TOOLKIT,
        "the engine lists neither a runtime `nvidia` nor NVIDIA devices (CDI)",
        f"install it (docs/remote-gpu.md, section 3), then {configure}",
    )


def image_findings(engine: Engine, stack: Stack) -> list[Finding]:
    """Judge the stack's two images: grading needs the sandbox's, working in a container the other."""
    build = f"make images STACK={stack}"
    sandbox, workspace = f"{SANDBOX_IMAGE}:{stack}", f"{WORKSPACE_IMAGE}:{stack}"
    return [
        ok(f"image {sandbox}", "built")
        if sandbox in engine.images
        else missing(f"image {sandbox}", "not built", build),
        ok(f"image {workspace}", "built")
        if workspace in engine.images
        else warning(f"image {workspace}", "not built; JupyterLab and code-server are in it", build),
    ]


def disk_findings(engine: Engine, stack: Stack) -> list[Finding]:
    """Judge the room where the engine keeps images; nothing if it cannot be seen."""
    free = engine.free_disk
    if free is None:
        return []
    needed = 0 if f"{SANDBOX_IMAGE}:{stack}" in engine.images else ROOM_FOR_IMAGES[stack]
    clean = "`docker system df` shows what Docker holds, `docker builder prune` empties its build cache"
    if free < needed:
        detail = f"{in_gb(free)} free; building the {stack} images takes up to about {in_gb(needed)}"
        return [missing(DISK, detail, f"use a larger disk, or make room: {clean}")]
    if free < LITTLE_ROOM:
        return [warning(DISK, f"{in_gb(free)} free", clean)]
    return [ok(DISK, f"{in_gb(free)} free")]
