"""The images, compose.yaml and the devcontainer, started for real and used as a learner would.

    scripts/test_containers.sh        # or `make test-containers`: its own environment, then these tests

Needs a Docker Engine with the images of the cpu stack, Chromium, and root (to give a checkout to another
user). Each run has a compose project, ports and volumes of its own, and removes them.
"""

import base64
import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, TimeoutError, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
SHOTS = Path(os.environ.get("TOPEKA_SCREENSHOTS", ROOT / ".topeka" / "screenshots"))
UID = 1234  # neither root nor the image's own user
LAB_FILE = "labs/ch01_attention/lab01_dot_product/src/attention.py"


def run(
    *command: str | Path, cwd: Path = ROOT, check: bool = True, **variables: str
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if check and done.returncode != 0:
        raise AssertionError(
            f"{command} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        )
    return done


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def status(url: str, **headers: str) -> int:
    """Return the HTTP status without following redirects."""

    class Stay(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *_: object) -> None:
            return None

    opener = urllib.request.build_opener(Stay, urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url, headers=headers), timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


class Workspace:
    """A clone of the checkout, owned by UID, with its workspace running."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.jupyter_port, self.code_port, self.dashboard_port = free_port(), free_port(), free_port()
        self.variables = {
            "COMPOSE_PROJECT_NAME": f"topeka-test-{os.getpid()}",
            "TOPEKA_JUPYTER_PORT": self.jupyter_port,
            "TOPEKA_CODE_PORT": self.code_port,
            "TOPEKA_DASHBOARD_PORT": self.dashboard_port,
        }
        run("git", "clone", "--quiet", ROOT, folder)
        run("chown", "-R", f"{UID}:{UID}", folder)
        self.said = self.make("lab", "CH=1")

    def make(self, *words: str, check: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
        return run("make", *words, cwd=self.folder, check=check, **self.variables, **variables)

    def inside(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        compose = ["docker", "compose", "--profile", "cpu", "exec", "--no-TTY", "workspace-cpu"]
        return run(*compose, *command, cwd=self.folder, check=check, **self.variables)

    def credentials(self) -> dict[str, str]:
        text = (self.folder / ".topeka" / "credentials.env").read_text()
        return dict(re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE))

    @property
    def jupyter(self) -> str:
        return f"http://127.0.0.1:{self.jupyter_port}"

    @property
    def code(self) -> str:
        return f"http://127.0.0.1:{self.code_port}"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    folder = tmp_path_factory.mktemp("checkout") / "topeka"
    folder.parent.chmod(0o755)
    made = Workspace(folder)
    yield made
    run("docker", "compose", "--profile", "*", "down", "--volumes", cwd=folder, **made.variables)


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    chromium = shutil.which("chromium")
    assert chromium, "Chromium is needed: apt-get install chromium"
    with sync_playwright() as playwright:
        options = [
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--disable-component-update",
        ]
        browser = playwright.chromium.launch(executable_path=chromium, args=options)
        yield browser.new_page(viewport={"width": 1400, "height": 900})
        browser.close()


# --- make lab and the servers ----------------------------------------------------------------------


def test_make_lab_prints_addresses_credentials_labs_and_the_next_step(workspace):
    said, secrets = workspace.said.stdout, workspace.credentials()
    assert f"{workspace.jupyter}/lab?token={secrets['JUPYTER_TOKEN']}" in said
    assert secrets["CODE_SERVER_PASSWORD"] in said
    assert said.count("ch01/lab0") >= 4
    assert "topeka watch ch01/lab01" in said


def test_credentials_are_long_random_and_only_the_owners(workspace):
    file = workspace.folder / ".topeka" / "credentials.env"
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.stat().st_uid == UID
    secrets = workspace.credentials()
    assert {len(secret) for secret in secrets.values()} == {32}
    assert len(set(secrets.values())) == 2


def test_both_servers_demand_credentials(workspace):
    token = workspace.credentials()["JUPYTER_TOKEN"]
    assert status(f"{workspace.jupyter}/api") == 200
    assert status(f"{workspace.jupyter}/api/contents") == 403
    assert status(f"{workspace.jupyter}/api/contents?token=wrong") == 403
    assert status(f"{workspace.jupyter}/api/contents?token={token}") == 200
    assert status(f"{workspace.code}/healthz") == 200
    assert status(f"{workspace.code}/") == 302  # to /login
    assert status(f"{workspace.code}/", Cookie="code-server-session=wrong") == 302


def test_ports_are_on_the_loopback_address_only(workspace):
    for name in ("workspace-cpu", "grader-cpu"):
        found = json.loads(
            run("docker", "inspect", f"{workspace.variables['COMPOSE_PROJECT_NAME']}-{name}-1").stdout
        )[0]
        for bindings in (found["HostConfig"]["PortBindings"] or {}).values():
            assert [b["HostIp"] for b in bindings] == ["127.0.0.1"]


def test_a_browser_logs_into_code_server_and_opens_a_lab_file(workspace, page):
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.goto(f"{workspace.code}/?folder=/topeka")
    page.fill("input[name=password]", "not the password")
    page.click("input[type=submit]")
    page.wait_for_selector("text=Incorrect password")
    page.fill("input[name=password]", workspace.credentials()["CODE_SERVER_PASSWORD"])
    page.click("input[type=submit]")
    page.wait_for_selector(".monaco-workbench", timeout=60_000)
    row = page.locator(f".quick-input-list .monaco-list-row:has-text('{LAB_FILE.rpartition('/')[0]}')")
    code = page.locator(".monaco-editor .view-lines:has-text('softmax')")
    for tries_left in (2, 1, 0):
        # While the workbench settles, whatever takes the focus closes the list of files.
        page.keyboard.press("Escape")
        page.keyboard.press("Control+P")
        page.keyboard.type("ch01 lab01 src attention.py", delay=20)
        try:
            row.click(timeout=30_000)
            code.wait_for(timeout=30_000)
            break
        except TimeoutError:
            page.screenshot(path=SHOTS / f"code-server-{tries_left}.png")
            if not tries_left:
                raise
    page.screenshot(path=SHOTS / "code-server.png")


def test_a_browser_opens_a_lab_file_in_jupyterlab(workspace, page):
    token = workspace.credentials()["JUPYTER_TOKEN"]
    page.goto(f"{workspace.jupyter}/lab/tree/{LAB_FILE}?token={token}")
    page.wait_for_selector(".jp-FileEditor .cm-content:has-text('softmax')", timeout=60_000)
    page.screenshot(path=SHOTS / "jupyterlab.png")


def test_a_browser_opens_the_printed_dashboard_and_grades_the_files_of_the_checkout(workspace, page):
    again = workspace.make("lab", "CH=1").stdout
    [link] = re.findall(rf"http://127\.0\.0\.1:{workspace.dashboard_port}/sign-in\S+", again)
    page.goto(link)
    page.wait_for_selector("h1:has-text('labs verified')")
    page.screenshot(path=SHOTS / "dashboard.png")
    page.goto(link.partition("/sign-in")[0] + "/labs/ch01/lab01")
    page.click("#grade-mine")
    page.wait_for_selector("#result .verdict:has-text('Nothing written yet')", timeout=60_000)
    report = workspace.inside("topeka", "list", "--json").stdout
    assert {row["lab"]: row["status"] for row in json.loads(report)}["ch01/lab01"] == "not_attempted"


def test_chapter_1_is_graded_in_the_graders_container(workspace):
    done = workspace.inside("topeka", "grade", "ch01", "--code", "solutions", "--json", "-")
    report = json.loads(done.stdout)
    assert [lab["status"] for lab in report["labs"]] == ["verified"] * 4
    assert report["isolation"]["isolated"] is True
    assert "no network" in report["isolation"]["flags"]


def test_chapter_1_is_graded_in_single_use_containers():
    command = [
        ROOT / ".venv" / "bin" / "topeka",
        "grade",
        "ch01",
        "--code",
        "solutions",
        "--sandbox",
        "docker",
    ]
    report = json.loads(run(*command, "--json", "-").stdout)
    assert [lab["status"] for lab in report["labs"]] == ["verified"] * 4
    assert report["isolation"]["sandbox"] == "docker"
    assert report["isolation"]["image_digest"].startswith("sha256:")
    assert "single-use container" in report["isolation"]["flags"]
    assert report["machine"]["libraries"]["torch"] == "2.13.0+cpu"


def test_the_grader_has_no_network_and_a_read_only_root(workspace):
    compose = ["docker", "compose", "--profile", "cpu", "exec", "--no-TTY", "grader-cpu"]
    links = run(*compose, "ls", "/sys/class/net", cwd=workspace.folder, **workspace.variables).stdout.split()
    assert links == ["lo"]
    write = run(*compose, "touch", "/opt/x", cwd=workspace.folder, check=False, **workspace.variables)
    assert write.returncode != 0
    shown = run(*compose, "ls", "/", cwd=workspace.folder, **workspace.variables).stdout.split()
    assert "topeka" not in shown, "the grader must not see the checkout"


def test_make_works_inside_and_every_file_belongs_to_the_owner(workspace):
    workspace.inside("make", "grade", "CH=1", "CODE=solutions")
    workspace.inside("topeka", "grade", "ch01/lab01", check=False)
    workspace.inside(
        "python", "-m", "pytest", "-q", "labs/ch01_attention/lab01_dot_product/tests", "--code", "solutions"
    )
    strangers = [str(p) for p in workspace.folder.rglob("*") if p.lstat().st_uid != UID]
    assert strangers == []
    assert run("git", "-c", "safe.directory=*", "status", "--short", cwd=workspace.folder).stdout == ""


def test_stop_and_start_keep_credentials_and_home(workspace):
    before = workspace.credentials()
    workspace.inside("sh", "-c", "echo kept > $HOME/note")
    workspace.make("stop")
    assert workspace.make("shell", check=False).returncode != 0
    again = workspace.make("up")
    assert before == workspace.credentials()
    assert before["JUPYTER_TOKEN"] in again.stdout
    assert workspace.inside("sh", "-c", "cat $HOME/note").stdout == "kept\n"


def test_an_unknown_chapter_or_profile_lists_the_valid_ones(workspace):
    done = workspace.make("lab", "CH=13", check=False)
    assert "there is no chapter '13'" in done.stderr
    assert "12  kernels" in done.stderr
    done = workspace.make("up", "PROFILE=tpu", check=False)
    assert "PROFILE is one of cpu, gpu, multi-gpu" in done.stderr


def test_a_chapter_for_a_gpu_starts_the_cpu_profile_and_says_so(workspace):
    done = workspace.make("lab", "CH=10")
    assert "not verified here" in done.stderr
    assert "ch10/lab01" in done.stdout


# --- images ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("purpose", "gigabytes"), [("sandbox", 3.0), ("workspace", 4.5)])
def test_images_are_labelled_small_and_not_root(purpose, gigabytes):
    found = json.loads(run("docker", "image", "inspect", f"topeka-{purpose}:cpu").stdout)[0]
    assert found["Size"] <= gigabytes * 1e9
    assert found["Config"]["User"] == "1000:0"
    labels = found["Config"]["Labels"]
    pinned = json.loads((ROOT / "docker" / "versions.json").read_text())["cpu"]
    assert labels["topeka.stack"] == "cpu"
    assert json.loads(labels["topeka.versions"])["cpu"] == pinned
    assert found["Config"]["Healthcheck"]
    shown = run("docker", "history", "--no-trunc", f"topeka-{purpose}:cpu").stdout
    assert "BEGIN CERTIFICATE" not in shown


def test_the_images_libraries_are_the_pinned_ones():
    names = json.loads((ROOT / "docker" / "versions.json").read_text())["cpu"]
    code = "import json, sys; from importlib.metadata import version; " \
           "print(json.dumps({n: version(n) for n in sys.argv[1:]}))"  # fmt: skip
    command = [
        "docker",
        "run",
        "--rm",
        "--network",
        "none",
        "topeka-sandbox:cpu",
        "python",
        "-c",
        code,
        *names,
    ]
    assert json.loads(run(*command).stdout) == names


@pytest.mark.parametrize(
    "module", ["torch", "triton", "fla", "jax", "vllm", "llama_cpp", "gguf", "xgrammar", "peft", "torchao"]
)
def test_every_library_of_the_stack_can_be_imported_by_any_user(module):
    run(
        "docker",
        "run",
        "--rm",
        "--network",
        "none",
        "--user",
        "4321:0",
        "topeka-sandbox:cpu",
        "python",
        "-c",
        f"import {module}",
    )


def test_no_secret_or_cache_is_left_in_an_image():
    code = "ls -A /root/.cache /root/.npm /run/secrets /var/lib/apt/lists /tmp 2>/dev/null | grep -v : | grep . || true"
    for purpose in ("sandbox", "workspace"):
        done = run(
            "docker", "run", "--rm", "--user", "0", "--entrypoint", "sh", f"topeka-{purpose}:cpu", "-c", code
        )
        assert done.stdout.strip() in ("", "partial"), f"left in {purpose}: {done.stdout}"


def test_the_workspace_image_alone_is_a_place_to_work_for_any_user():
    command = ["docker", "run", "--rm", "--network", "none", "--user", "4321:0", "topeka-workspace:cpu"]
    done = run(*command, "make", "grade", "CH=1", "CODE=solutions")
    assert "All 4 verified." in done.stdout
    assert "not isolated" in done.stdout


@pytest.mark.parametrize("password", ["short", "fifteen-letters"])
def test_a_public_address_with_a_short_password_is_refused(password):
    command = ["docker", "run", "--rm", "-e", "TOPEKA_BIND=0.0.0.0", "-e", f"TOPEKA_PASSWORD={password}"]
    done = run(*command, "topeka-workspace:cpu", check=False)
    assert done.returncode == 2
    assert "too short" in done.stderr


def test_the_wrong_torch_fails_the_build():
    command = [
        "docker",
        "run",
        "--rm",
        "--user",
        "0",
        "--entrypoint",
        "sh",
        "-v",
        f"{ROOT}/docker/build:/build:ro",
    ]
    done = run(*command, "topeka-sandbox:cpu", "/build/check-torch", "cuda", check=False)
    assert done.returncode != 0
    assert "which is built for cpu" in done.stderr


# --- compose.yaml ------------------------------------------------------------------------------------


def config(*options: str) -> dict[str, dict[str, object]]:
    command = ["docker", "compose", *options, "config", "--format", "json"]
    return json.loads(run(*command, COMPOSE_PROJECT_NAME="topeka-config").stdout)["services"]


def test_plain_compose_means_the_cpu_stack():
    assert set(config()) == {"workspace-cpu", "grader-cpu"}


@pytest.mark.parametrize(("profile", "count"), [("gpu", 1), ("multi-gpu", -1)])
def test_gpu_profiles_reserve_gpus_and_what_nccl_needs(profile, count):
    services = config("--profile", profile)
    assert set(services) == {f"workspace-{profile}", f"grader-{profile}"}
    for service in services.values():
        devices = service["deploy"]["resources"]["reservations"]["devices"]
        assert devices == [{"capabilities": ["gpu"], "driver": "nvidia", "count": count}]
        assert int(service["shm_size"]) >= 8 << 30
        assert service["ulimits"]["memlock"] == -1


def test_every_service_restarts_rotates_its_log_and_drops_its_capabilities():
    for options in ([], ["--profile", "gpu"], ["--profile", "multi-gpu"]):
        for service in config(*options).values():
            assert service["restart"] == "unless-stopped"
            assert service["logging"]["options"]["max-size"]
            assert service["cap_drop"] == ["ALL"]
            assert service["security_opt"] == ["no-new-privileges:true"]


# --- the grader as a service ---------------------------------------------------------------------------


class Service:
    """The profile `grader` of a clone, with two workers; each worker's container is a host of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.variables = {
            "COMPOSE_PROJECT_NAME": f"topeka-grader-test-{os.getpid()}",
            "TOPEKA_GRADER_PORT": self.port,
            "TOPEKA_WORKERS": "2",
        }
        run("git", "clone", "--quiet", ROOT, folder)
        for image in ("service", "database"):
            run(ROOT / "scripts" / "images.sh", image)
        self.said = run("make", "up", "PROFILE=grader", cwd=folder, **self.variables).stdout

    def compose(self, *command: str) -> str:
        done = run("docker", "compose", "--profile", "grader", *command, cwd=self.folder, **self.variables)
        return done.stdout.strip()

    def token(self, *words: str) -> str:
        return self.compose("exec", "--no-TTY", "service", "topeka", "token", "create", *words)

    def ask(self, token: str, path: str, document: object = None) -> dict[str, object]:
        data = None if document is None else json.dumps(document).encode()
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/api/v1{path}", data=data, headers=headers
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=30) as answer:
            return json.load(answer)

    def submit(self, token: str, source: str) -> str:
        files = {"attention.py": base64.b64encode(source.encode()).decode()}
        return str(self.ask(token, "/submissions", {"lab": "ch01/lab01", "files": files})["id"])

    def until(
        self, token: str, submission_id: str, is_so: Callable[[dict[str, object]], bool]
    ) -> dict[str, object]:
        deadline = time.monotonic() + 120
        while not is_so(found := self.ask(token, f"/submissions/{submission_id}")):
            assert time.monotonic() < deadline, found
            time.sleep(0.2)
        return found


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service") / "topeka"
    made = Service(folder)
    yield made
    made.compose("down", "--volumes")


def test_a_worker_host_that_dies_for_good_leaves_its_work_to_the_other(service):
    teacher, learner = service.token("Ina Teacher", "--instructor"), service.token("Ada")
    right = (ROOT / LAB_FILE.replace("/src/", "/solutions/")).read_text()
    first = service.submit(learner, right)
    assert service.until(learner, first, lambda s: s["state"] == "graded")["status"] == "verified"
    report = service.ask(learner, f"/submissions/{first}/report")
    assert report["isolation"]["sandbox"] == "docker"
    workers = {str(worker["id"]) for worker in service.ask(teacher, "/workers")}
    assert len(workers) == 2

    slow = service.submit(learner, right + "\nimport time\n\ntime.sleep(8)\n")
    service.until(learner, slow, lambda s: s["state"] == "running")
    deadline = time.monotonic() + 60  # the container gets the submission's name when it gets the job
    while not (
        container := run("docker", "ps", "--quiet", "--filter", f"name=^topeka-{slow}$").stdout.strip()
    ):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    [row] = [w for w in service.ask(teacher, "/workers") if w["id"] == _worker_of(service, learner, slow)]
    run("docker", "kill", str(row["host"]))
    killed = time.monotonic()
    done = service.until(learner, slow, lambda s: s["state"] == "graded")
    assert done["status"] == "verified"
    assert time.monotonic() - killed < 60
    assert _worker_of(service, learner, slow) != row["id"]
    assert run("docker", "ps", "--quiet", "--no-trunc", "--filter", f"id={container}").stdout == ""


def _worker_of(service: Service, token: str, submission_id: str) -> str:
    return str(service.ask(token, f"/submissions/{submission_id}")["worker"])


# --- devcontainer ------------------------------------------------------------------------------------


def test_the_devcontainer_starts_and_grades(workspace, tmp_path):
    workspace.make("stop")
    devcontainer = os.environ.get("TOPEKA_DEVCONTAINER_CLI") or shutil.which("devcontainer")
    assert devcontainer, "@devcontainers/cli is needed; scripts/test_containers.sh installs it"
    where = [
        "--workspace-folder",
        str(workspace.folder),
        "--config",
        str(workspace.folder / ".devcontainer/cpu/devcontainer.json"),
    ]
    variables = {**workspace.variables}
    up = run(devcontainer, "up", *where, cwd=workspace.folder, **variables)
    outcome = json.loads(up.stdout.strip().splitlines()[-1])
    assert outcome["outcome"] == "success"
    assert outcome["remoteWorkspaceFolder"] == "/topeka"
    done = run(
        devcontainer,
        "exec",
        *where,
        "make",
        "grade",
        "CH=1",
        "CODE=solutions",
        cwd=workspace.folder,
        **variables,
    )
    assert "All 4 verified." in done.stdout
    user = run(devcontainer, "exec", *where, "id", "-u", cwd=workspace.folder, **variables)
    assert user.stdout.strip().endswith(str(UID))
    image = run("docker", "inspect", "--format", "{{.Config.Image}}", outcome["containerId"]).stdout.strip()
    run("docker", "rm", "--force", outcome["containerId"])
    if image.startswith("vsc-"):  # the command line makes an image of its own each time
        run("docker", "image", "rm", "--force", image)
