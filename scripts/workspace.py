#!/usr/bin/env python3
"""The course in containers: `make lab`, `up`, `stop`, `logs` and `shell` run this file.

    scripts/workspace.py lab 1           bring up the workspace that fits the chapter and this machine
    scripts/workspace.py up [PROFILE]    cpu, gpu, multi-gpu, or grader: the service for a class
    scripts/workspace.py logs | shell | stop
    scripts/workspace.py usable          exit 0 if a Docker Engine with compose answers

Only the standard library is used, and any Python from 3.8 on will do: with Docker, nothing of the
course is installed on the machine itself. Exit 2: wrong usage; 3: could not run.
"""

import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, List, NoReturn, Optional  # noqa: UP035 - old Pythons know them from here

ROOT = Path(__file__).resolve().parents[1]
CREDENTIALS = ROOT / ".topeka" / "credentials.env"
LINK = ROOT / ".topeka" / "dashboard" / "link"
STACK_OF = {"cpu": "cpu", "gpu": "cuda", "multi-gpu": "multi-gpu"}
PROFILE_OF = {stack: profile for profile, stack in STACK_OF.items()}


def say(message: str) -> None:
    """Tell the user something."""
    print("topeka: " + message, file=sys.stderr, flush=True)


def stop_with(message: str, code: int) -> NoReturn:
    """Say `message` and end."""
    say(message)
    sys.exit(code)


# --- the engine and its machine --------------------------------------------------------------------


def output_of(*command: str) -> Optional[str]:  # noqa: UP045 - old Pythons
    """Return what a command prints, None if it fails or does not answer within 10 s."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False, cwd=str(ROOT))
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def engine_is_usable() -> bool:
    """Whether a Docker Engine answers and `docker compose` is there."""
    return bool(
        shutil.which("docker")
        and output_of("docker", "info", "--format", "{{.ServerVersion}}")
        and output_of("docker", "compose", "version", "--short")
    )


def gpus_for_containers() -> int:
    """Return how many NVIDIA GPUs the engine can give to containers."""
    runtimes = output_of("docker", "info", "--format", "{{json .Runtimes}}") or ""
    if '"nvidia"' not in runtimes:
        return 0
    return len((output_of("nvidia-smi", "--list-gpus") or "").splitlines())


def profile_for(stack: str) -> str:
    """Return the profile for a chapter's stack on this machine, and say so if it is a smaller one."""
    wanted, gpus = PROFILE_OF[stack], gpus_for_containers()
    possible = "cpu" if gpus == 0 else "gpu" if gpus == 1 else "multi-gpu"
    order = list(STACK_OF)
    if order.index(wanted) <= order.index(possible):
        return wanted
    say(
        "this chapter is written for the {} stack, and the Docker Engine here has {}: starting the {} profile. "
        "The CPU tier of every lab is verified there; what needs a GPU is reported as not verified here.".format(
            stack, f"{gpus} GPU(s)" if gpus else "no GPU to give to containers", possible
        )
    )
    return possible


# --- compose -----------------------------------------------------------------------------------------


def environment() -> Dict[str, str]:  # noqa: UP006
    """Return the environment of compose: whose files these are, unless the user said it."""
    variables = dict(os.environ)
    variables.setdefault("TOPEKA_UID", str(ROOT.stat().st_uid))
    return variables


def compose(profile: str, *arguments: str) -> List[str]:  # noqa: UP006
    """Return a compose command for one profile."""
    return ["docker", "compose", "--profile", profile, *arguments]


def run(command: List[str], failure: str) -> None:  # noqa: UP006
    """Run a command in the checkout; end with `failure` if it does."""
    if subprocess.run(command, cwd=str(ROOT), env=environment(), check=False).returncode != 0:
        stop_with(failure, 3)


def running_profile() -> Optional[str]:  # noqa: UP045
    """Return the profile whose workspace is up."""
    names = (
        output_of("docker", "compose", "--profile", "*", "ps", "--services", "--status", "running") or ""
    ).split()
    return next((p for p in STACK_OF if "workspace-" + p in names), None)


def up(profile: str) -> None:
    """Bring a profile up and wait until it is healthy; build its images if they are not there."""
    if profile == "grader":
        up_grader()
        return
    if profile not in STACK_OF:
        stop_with(
            "there is no profile {!r}: PROFILE is one of {}, grader".format(profile, ", ".join(STACK_OF)), 2
        )
    other = running_profile()
    if other is not None and other != profile:
        say(f"the {other} profile is running; stopping it first")
        stop()
    stack = STACK_OF[profile]
    if any(
        output_of("docker", "image", "inspect", "topeka-" + p + ":" + stack) is None
        for p in ("sandbox", "workspace")
    ):
        say(f"building the images of the {stack} stack; this takes several minutes the first time")
        run(
            [str(ROOT / "scripts" / "images.sh"), stack],
            "the images could not be built; the lines above say why",
        )
    state = ROOT / ".topeka"
    if not state.exists():  # or the engine would make it, as root
        state.mkdir()
        if os.geteuid() == 0:
            os.chown(str(state), ROOT.stat().st_uid, ROOT.stat().st_gid)
    start = compose(profile, "up", "--detach", "--wait", "--no-build")
    if subprocess.run(start, cwd=str(ROOT), env=environment(), check=False).returncode != 0:
        said = output_of(*compose(profile, "logs", "--no-color", "--no-log-prefix", "--tail", "5")) or ""
        said = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", said)
        stop()  # they would be restarted for ever
        stop_with("the containers did not become healthy. The last they said:\n" + said, 3)
    print_addresses(profile)


def up_grader() -> None:
    """Bring up the service for a class: server, workers, PostgreSQL."""
    wanted = ["topeka-sandbox:" + os.environ.get("TOPEKA_STACKS", "cpu"), "topeka-service", "topeka-database"]
    for image in wanted:
        if output_of("docker", "image", "inspect", image) is None:
            name = image.split(":")[1] + "-sandbox" if ":" in image else image[len("topeka-") :]
            say(f"building the image {image}")
            run(
                [str(ROOT / "scripts" / "images.sh"), name],
                "the image could not be built; the lines above say why",
            )
    secret = ROOT / ".topeka" / "secrets" / "database_password"
    if not secret.exists():
        secret.parent.mkdir(parents=True, exist_ok=True)
        secret.parent.chmod(0o700)
        # The folder keeps others out; in the containers, users of other numbers read the file.
        with os.fdopen(os.open(str(secret), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444), "w") as stream:
            stream.write(secrets.token_urlsafe(32) + "\n")
    socket = Path(os.environ.get("TOPEKA_DOCKER_SOCKET", "/var/run/docker.sock"))
    if socket.exists():
        os.environ.setdefault("TOPEKA_DOCKER_GID", str(socket.stat().st_gid))
    run(
        compose("grader", "up", "--detach", "--wait", "--no-build"),
        "the containers did not become healthy: `docker compose --profile grader logs` says why",
    )
    address = output_of(*compose("grader", "port", "service", "8300")) or "127.0.0.1:8300"
    print(f"Topeka's grader  http://{address}/")
    print(
        "the first token: docker compose --profile grader exec service topeka token create NAME --instructor"
    )


def print_addresses(profile: str) -> None:
    """Print where the servers are and how to log in."""
    deadline = time.monotonic() + 10
    while not CREDENTIALS.exists() and not os.environ.get("TOPEKA_PASSWORD") and time.monotonic() < deadline:
        time.sleep(0.1)
    kept = dict(re.findall(r"^(\w+)=(.*)$", CREDENTIALS.read_text(), re.M)) if CREDENTIALS.exists() else {}
    chosen = os.environ.get("TOPEKA_PASSWORD")
    token, password = (
        chosen or kept.get("JUPYTER_TOKEN", ""),
        chosen or kept.get("CODE_SERVER_PASSWORD", ""),
    )
    service = "workspace-" + profile
    jupyter = output_of(*compose(profile, "port", service, "8888")) or "127.0.0.1:8888"
    code = output_of(*compose(profile, "port", service, "8080")) or "127.0.0.1:8080"
    print(f"JupyterLab   http://{jupyter}/lab?token={token}")
    print(f"code-server  http://{code}/  password {password}")
    if link := dashboard_link(output_of(*compose(profile, "port", service, "8300")) or "127.0.0.1:8300"):
        print(f"dashboard    {link}  (signs one browser in)")
    print(
        f"(both passwords are kept in {CREDENTIALS.relative_to(ROOT)}, which only you can read)\n", flush=True
    )


def dashboard_link(address: str) -> str:
    """Return the link that the dashboard wrote, with the address it has here; empty if it does not run."""
    deadline = time.monotonic() + 20
    while not LINK.exists():
        if time.monotonic() > deadline:
            say("the dashboard has not started; .topeka/dashboard/server.log says why")
            return ""
        time.sleep(0.1)
    return re.sub(r"^http://[^/]+", f"http://{address}", LINK.read_text().strip())


def stop() -> None:
    """End the containers; settings, caches and your files stay."""
    run(
        ["docker", "compose", "--profile", "*", "down", "--timeout", "15"],
        "the containers could not be stopped",
    )


def inside(*command: str) -> int:
    """Run a command in the running workspace and return its exit status."""
    profile = running_profile()
    if profile is None:
        stop_with("no workspace is running: `make up` or `make lab CH=1` starts one", 3)
    terminal = [] if sys.stdin.isatty() and sys.stdout.isatty() else ["--no-TTY"]
    arguments = compose(profile, "exec", *terminal, "workspace-" + profile, *command)
    return subprocess.run(arguments, cwd=str(ROOT), env=environment(), check=False).returncode


# --- chapters ----------------------------------------------------------------------------------------


def stack_of(chapter: str) -> str:
    """Return the stack of a chapter, named `1`, `01` or `ch01`."""
    known = {int(f.name[2:4]): f for f in sorted((ROOT / "labs").glob("ch[0-9][0-9]_*"))}
    number = re.fullmatch(r"(?:ch)?0*(\d+)", chapter)
    folder = known.get(int(number.group(1))) if number else None
    if folder is None:
        names = "\n".join("  {:2}  {}".format(n, f.name[5:].replace("_", " ")) for n, f in known.items())
        stop_with(f"there is no chapter {chapter!r}. The chapters are:\n{names}", 2)
    found = re.search(r'^stack = "(.*)"', (folder / "chapter.toml").read_text(encoding="utf-8"), re.M)
    return found.group(1) if found else "cpu"


def lab(chapter: str) -> int:
    """Bring up what fits the chapter and this machine, and show the chapter."""
    up(profile_for(stack_of(chapter)))
    return inside("topeka", "lab", chapter, "--no-serve")


def main(arguments: List[str]) -> int:  # noqa: UP006
    """Do what the first argument says."""
    command = arguments[0] if arguments else ""
    if command not in ("usable", "lab", "up", "stop", "logs", "shell"):
        print(__doc__, file=sys.stderr)
        return 2
    usable = engine_is_usable()
    if command == "usable":
        return 0 if usable else 1
    if not usable:
        stop_with(
            "no Docker Engine with compose answers: start it, or work without: SANDBOX=local make lab CH=1", 3
        )
    if command == "lab":
        return lab(arguments[1] if len(arguments) > 1 else "")
    if command == "up":
        up(arguments[1] if len(arguments) > 1 else "cpu")
    elif command == "stop":
        stop()
    elif command == "logs":
        return subprocess.run(
            ["docker", "compose", "--profile", "*", "logs", "--tail", "200"], cwd=str(ROOT), check=False
        ).returncode
    elif command == "shell":
        return inside("bash")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
