"""Runs jobs in single-use containers of a stack's image, on any Docker Engine the client can reach.

A container is started before it is needed: inside, a warm parent (`grader.runner`) has imported torch
and waits on its standard input. It gets one job and is destroyed. Nothing of this machine is mounted,
so the engine may be another host's (`DOCKER_HOST`).
"""

import contextlib
import json
import os
import secrets
import socket as sockets
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Self

import docker
import psutil
from docker.errors import APIError, DockerException, ImageNotFound, NotFound
from docker.models.containers import Container
from docker.types import DeviceRequest, LogConfig, Ulimit
from docker.utils.socket import STDOUT, frames_iter
from requests.exceptions import RequestException

from grader.errors import TopekaError
from grader.machine import Machine
from grader.runner.protocol import GRACE_S, Event, Job, overdue, send_job
from grader.sandbox import SANDBOX_IMAGE, Isolation, SandboxFailed

_LABEL, _CLIENT = "topeka.sandbox", "topeka.client"
_START = ["/opt/topeka/bin/start", "--stdio"]
_READY_WITHIN_S = 120.0
_NAMED_WITHIN_S = 20.0
_TAIL_BYTES = 4_000
_FLAGS = (
    "single-use container",
    "no network",
    "read-only root",
    "no capabilities",
    "no new privileges",
    "non-root user",
    "limits on memory, CPU, processes, files and time",
)
# For strict trust the runner gives the code under test a user of its own, which has no capabilities either.
_TWO_USERS = ["CHOWN", "DAC_OVERRIDE", "FOWNER", "KILL", "SETGID", "SETUID"]
_STRICT_FLAGS = (
    *(flag for flag in _FLAGS if flag not in ("no capabilities", "non-root user")),
    "no capabilities and a non-root user of its own for the code under test",
    "capabilities for the tests only to keep users apart",
)
_ENGINE_ERRORS = (DockerException, RequestException, OSError)


class EngineUnusable(TopekaError):
    """No Docker Engine answers, or it lacks the stack's image; the message says what to do."""


@dataclass(frozen=True)
class ContainerLimits:
    """What one container may use, whatever the job inside asks for.

    Attributes:
        memory_bytes: of the container, without swap; files in its memory count. None for 6 GiB, and for as much as
            a job that may use more than 4 GiB needs.
        cpus: cores; None for all the engine has.
        processes: processes and threads.
        scratch_bytes: of its writable folder, /tmp.
        shared_memory_bytes: of /dev/shm.
    """

    memory_bytes: int | None = None
    cpus: int | None = None
    processes: int = 512
    scratch_bytes: int = 1 << 30
    shared_memory_bytes: int = 256 << 20


# A container's memory unless it is said, and what of it is for the runner and the files in memory.
_USUAL_MEMORY, _ROOM = 6 << 30, 2 << 30
GPU_LIMITS = ContainerLimits(
    memory_bytes=64 << 30, processes=4096, scratch_bytes=8 << 30, shared_memory_bytes=8 << 30
)


@dataclass
class _Warm:
    """A started container and the stream to it."""

    container: Container
    stream: Any
    strict: bool
    said: bytearray = field(default_factory=bytearray)  # the tail of what the runner printed
    lines: Iterator[bytes] = field(init=False)  # of its event channel

    def __post_init__(self) -> None:
        self.lines = self._read()

    def _read(self) -> Iterator[bytes]:
        partial = b""
        for stream, data in frames_iter(self.stream, tty=False):  # type: ignore[no-untyped-call]
            if stream != STDOUT:
                self.said += data
                del self.said[:-_TAIL_BYTES]
                continue
            *lines, partial = (partial + data).split(b"\n")
            yield from lines

    def write(self, data: bytes) -> int:
        """Write to its standard input."""
        getattr(self.stream, "_sock", self.stream).sendall(data)
        return len(data)

    def flush(self) -> None:
        """Nothing is buffered."""


class DockerSandbox:
    """A pool of warm, single-use containers of one stack.

    Args:
        stack: `cpu`, `cuda` or `multi-gpu`.
        threads: how many threads torch may use in each job; None for one per core of the container.
        pool: how many containers wait at a time.
        preload: modules that each imports before it waits.
        limits: of each container.
        image: instead of the stack's own.

    Raises:
        EngineUnusable: no engine answers, or the image is not there.
    """

    def __init__(
        self,
        stack: str = "cpu",
        *,
        threads: int | None = None,
        pool: int = 1,
        preload: Sequence[str] = ("torch", "numpy"),
        limits: ContainerLimits | None = None,
        image: str | None = None,
    ) -> None:
        self._image = image or f"{SANDBOX_IMAGE}:{stack}"
        self._stack = stack
        self._limits = limits or (ContainerLimits() if stack == "cpu" else GPU_LIMITS)
        self._threads = threads
        self._pool_size = pool
        self._preload = tuple(preload)
        self._client = connect()
        try:
            found = self._client.images.get(self._image)
            self._has_gpus = stack != "cpu" and "nvidia" in self._client.info().get("Runtimes", {})
            self._cores = int(self._client.info()["NCPU"])
        except ImageNotFound as error:
            raise EngineUnusable(
                f"the Docker Engine has no image {self._image}: build it with `make images STACK={stack}`, "
                "or use --sandbox local"
            ) from error
        except _ENGINE_ERRORS as error:
            raise EngineUnusable(f"the Docker Engine does not work: {error}") from error
        self._digest = str(found.id)
        self._strict = False  # what the last job asked for, and the next one probably will
        self._machine: Machine | None = None
        self._starters = ThreadPoolExecutor(max_workers=max(1, pool), thread_name_prefix="container")
        self._waiting: list[Future[_Warm]] = []
        self._lost: list[Container] = []  # to be removed once the engine answers again
        self._closed = False

    @property
    def isolation(self) -> Isolation:
        """What kept the last job in, or will the first."""
        return Isolation(
            sandbox="docker",
            isolated=True,
            note="isolated: each lab ran in a container of its own, without network and with limits",
            image_digest=self._digest,
            flags=_STRICT_FLAGS if self._strict else _FLAGS,
        )

    @property
    def machine(self) -> Machine:
        """The machine as the last job saw it; before any job, one container is asked."""
        if self._machine is None:
            warm = self._take(self._preload)
            self._destroy(warm)
        assert self._machine is not None
        return self._machine

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Remove what dead clients left, and fill the pool without waiting for it."""
        if not self._waiting:
            sweep(self._client)
        self._lost = [container for container in self._lost if not _remove(container)]
        self._fill(self._preload)

    def wait_until_warm(self) -> None:
        """Fill the pool and wait until every container in it is ready.

        Raises:
            SandboxFailed: one could not be started.
        """
        self.start()
        for waiting in self._waiting:
            waiting.result()

    def run(self, job: Job, tar: bytes) -> Iterator[Event]:
        """Run a job in a container of its own; yields its events, the last of them `finished`.

        The container of a sole job is named after it.

        Raises:
            SandboxFailed: the container or the engine ended in the middle, or none could be started.
        """
        self._strict = job.trust == "strict"
        self.start()
        warm = self._take(job.preload)
        self._fill(job.preload)
        killed = threading.Event()

        def kill() -> None:
            killed.set()
            with contextlib.suppress(*_ENGINE_ERRORS):
                warm.container.kill()

        started = time.monotonic()
        timer = threading.Timer(job.limits.timeout_s + GRACE_S, kill)
        timer.daemon = True
        timer.start()
        try:
            if job.sole:
                self._take_name(warm, container_name(job.id))
            needed = (job.limits.memory_bytes or 0) + _ROOM
            if self._limits.memory_bytes is None and needed > _USUAL_MEMORY:
                warm.container.update(mem_limit=needed, memswap_limit=needed)
            with contextlib.suppress(BrokenPipeError, ConnectionError):  # the read below says why
                send_job(warm, job, tar)
            for line in warm.lines:
                event: Event = json.loads(line)
                yield event
                if event["event"] == "finished":
                    return
            if killed.is_set():
                # The runner inside did not stop the job in time; the engine did.
                yield overdue(job, time.monotonic() - started)
                return
            raise SandboxFailed(_last_words(warm, "the container ended in the middle of a job"))
        except _ENGINE_ERRORS as error:
            raise SandboxFailed(f"the Docker Engine went away in the middle of a job: {error}") from error
        finally:
            timer.cancel()
            self._destroy(warm)

    def close(self) -> None:
        """Destroy every container of this sandbox."""
        if self._closed:
            return
        self._closed = True
        for waiting in self._waiting:
            if not waiting.cancel():
                with contextlib.suppress(SandboxFailed):
                    self._destroy(waiting.result())
        self._waiting.clear()
        self._starters.shutdown()
        self._client.close()

    # --- containers --------------------------------------------------------------------------

    def _fill(self, preload: tuple[str, ...]) -> None:
        while len(self._waiting) < self._pool_size and not self._closed:
            self._waiting.append(self._starters.submit(self._launch, preload, self._strict))

    def _take(self, preload: tuple[str, ...]) -> _Warm:
        self._fill(preload)
        trouble: SandboxFailed | None = None
        for _ in range(self._pool_size + 2):
            try:
                warm = self._waiting.pop(0).result() if self._waiting else self._launch(preload, self._strict)
            except SandboxFailed as error:
                trouble = error
                continue
            if warm.strict == self._strict and _is_running(warm):
                return warm
            self._destroy(
                warm
            )  # of the other kind, or it died while it waited: the engine was restarted, say
        raise trouble or SandboxFailed("containers end while they wait for a job")

    def _launch(self, preload: tuple[str, ...], strict: bool) -> _Warm:
        limits = self._limits
        memory = limits.memory_bytes or _USUAL_MEMORY
        cpus = min(limits.cpus or self._cores, self._cores)
        mine = psutil.Process()
        warm: _Warm | None = None
        container: Container | None = None
        try:
            container = self._client.containers.create(
                self._image,
                entrypoint=_START,  # as the container's first process, which no other can kill or look into
                command=[],
                stdin_open=True,
                user="0:0" if strict else _some_user(),
                network_mode="none",
                read_only=True,
                tmpfs={"/tmp": f"rw,exec,nosuid,nodev,size={limits.scratch_bytes},mode=1777"},
                cap_drop=["ALL"],
                cap_add=_TWO_USERS if strict else [],
                security_opt=["no-new-privileges"],
                mem_limit=memory,
                memswap_limit=memory,
                nano_cpus=cpus * 1_000_000_000,
                pids_limit=limits.processes,
                shm_size=limits.shared_memory_bytes,
                ulimits=[Ulimit(name="core", soft=0, hard=0), Ulimit(name="nofile", soft=4096, hard=4096)],
                ipc_mode="private",
                log_config=LogConfig(type="none"),
                healthcheck={"test": ["NONE"]},
                auto_remove=True,
                stop_signal="SIGKILL",  # an engine that shuts down has nothing to wait for
                device_requests=[DeviceRequest(count=-1, capabilities=[["gpu"]])] if self._has_gpus else [],
                environment={
                    "OMP_NUM_THREADS": str(self._threads or cpus),
                    "TOPEKA_PRELOAD": ",".join(dict.fromkeys((*self._preload, *preload))),
                },
                labels={_LABEL: self._stack, _CLIENT: _client_name(mine.pid, mine.create_time())},
            )
            stream = container.attach_socket(params={"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1})
            container.start()
            warm = _Warm(container, stream, strict)
            self._machine = self._wait_until_ready(warm)
            return warm
        except BaseException as error:  # Ctrl-C too must leave none behind
            if warm is not None:
                self._destroy(warm)
            elif container is not None:
                self._discard(container)
            if not isinstance(error, _ENGINE_ERRORS):
                raise
            raise SandboxFailed(f"no container of {self._image} could be started: {_words(error)}") from error

    def _take_name(self, warm: _Warm, name: str) -> None:
        """Give a container its name, and end whatever had it before: an earlier attempt whose client died."""
        until = time.monotonic() + _NAMED_WITHIN_S
        while True:
            try:
                warm.container.rename(name)
                return
            except APIError as error:
                if error.status_code != 409:
                    raise
            if time.monotonic() > until:
                raise SandboxFailed(f"another container has the name {name}, and cannot be removed")
            with contextlib.suppress(NotFound):
                left_over = self._client.containers.get(name)
                if _LABEL not in left_over.labels:
                    raise SandboxFailed(
                        f"a container that is not ours has the name {name}: rename or remove it"
                    )
                _remove(left_over)
            time.sleep(0.1)  # the engine frees a name a moment after the container is gone

    def _wait_until_ready(self, warm: _Warm) -> Machine:
        timer = threading.Timer(_READY_WITHIN_S, _remove, [warm.container])
        timer.daemon = True
        timer.start()
        try:
            for line in warm.lines:
                event = json.loads(line)
                if event["event"] == "ready":
                    return Machine.model_validate(event["machine"])
        finally:
            timer.cancel()
        raise SandboxFailed(_last_words(warm, "a container ended before it was ready"))

    def _destroy(self, warm: _Warm) -> None:
        with contextlib.suppress(OSError):
            warm.stream.close()
        self._discard(warm.container)

    def _discard(self, container: Container) -> None:
        if not _remove(container):
            self._lost.append(container)


def container_name(job_id: str) -> str:
    """Return the name of the container in which a sole job runs."""
    return f"topeka-{job_id}"


def connect() -> docker.DockerClient:
    """Return a client of the Docker Engine that DOCKER_HOST or the default socket names.

    Raises:
        EngineUnusable: none answers.
    """
    try:
        client = docker.from_env(timeout=30)
        client.ping()
    except _ENGINE_ERRORS as error:
        where = os.environ.get("DOCKER_HOST", "the default socket")
        raise EngineUnusable(
            f"no Docker Engine answers at {where} ({_words(error)}): start it, or use --sandbox local"
        ) from error
    return client


def is_available(stack: str) -> bool:
    """Whether an engine answers and has the stack's image."""
    try:
        client = docker.from_env(timeout=2)
    except _ENGINE_ERRORS:
        return False
    try:
        client.images.get(f"{SANDBOX_IMAGE}:{stack}")
    except _ENGINE_ERRORS:
        return False
    else:
        return True
    finally:
        client.close()


def sweep(client: docker.DockerClient) -> int:
    """Remove containers whose client on this host is dead; return how many there were."""
    removed = 0
    host = sockets.gethostname()
    with contextlib.suppress(*_ENGINE_ERRORS):
        for container in client.containers.list(all=True, filters={"label": _LABEL}):
            name, _, rest = container.labels.get(_CLIENT, "").partition(" ")
            pid, _, born = rest.partition(" ")
            if name == host and pid.isdecimal() and not _lives(int(pid), born):
                _remove(container)
                removed += 1
    return removed


def _some_user() -> str:
    """Return a user and group of its own for a container; it owns nothing in the image.

    The kernel counts processes, pipes and more by user over all containers of a host: with one user for
    all, a job could use up what the others may have. Below 65,536, since an engine may map no more.
    """
    number = 20_000 + secrets.randbelow(40_000)
    return f"{number}:{number}"


def _client_name(pid: int, born: float) -> str:
    return f"{sockets.gethostname()} {pid} {born:.2f}"


def _lives(pid: int, born: str) -> bool:
    try:
        return f"{psutil.Process(pid).create_time():.2f}" == born
    except psutil.Error:
        return False


def _is_running(warm: _Warm) -> bool:
    try:
        warm.container.reload()
    except _ENGINE_ERRORS:
        return False
    return bool(warm.container.status == "running")


def _remove(container: Container) -> bool:
    """Remove a container; return whether it is gone or the engine is about to remove it."""
    try:
        container.remove(force=True)
    except APIError as error:
        return bool(error.status_code in (404, 409))  # gone already, or being removed
    except _ENGINE_ERRORS:
        return False
    return True


def _last_words(warm: _Warm, what: str) -> str:
    """Say how a container ended, as far as the engine knows and the runner said."""
    state: dict[str, Any] = {}
    try:
        warm.container.reload()
        state = warm.container.attrs["State"]
    except APIError:
        pass  # removed already
    except _ENGINE_ERRORS:
        return what.replace("the container ended", "the Docker Engine went away")
    how = "out of memory" if state.get("OOMKilled") else f"exit status {state.get('ExitCode', 'unknown')}"
    text = warm.said.decode(errors="replace").strip()
    return f"{what}: {how}. {text.splitlines()[-1]}" if text else f"{what}: {how}"


def _words(error: BaseException) -> str:
    return str(error.explanation if isinstance(error, APIError) and error.explanation else error)
