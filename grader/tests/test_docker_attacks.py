"""Code under test that attacks: limits hold, the status is right, a run beside it is verified, nothing is left.

docs/security.md lists every attack with the name of its test.
"""

import ast
import contextlib
import gzip
import io
import json
import os
import re
import socket
import tarfile
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from grader.catalog import Catalog
from grader.expected import expected_tests
from grader.grading import grade_lab
from grader.report import LabReport, Outcome, Status
from grader.runner.protocol import Event, Job, ProtocolError, receive_job, send_job
from grader.sandbox import Sandbox, SandboxFailed
from grader.sandbox.docker import ContainerLimits, DockerSandbox
from grader.sandbox.local import LocalSandbox
from grader.submission import pack

RIGHT = "def double(x):\n    return x * 2\n\n\ndef is_even(n):\n    return n % 2 == 0\n"
# The run beside the attack wants threads, which the kernel counts by user.
BESIDE = "import threading\n" + RIGHT.replace(
    "    return x * 2",
    """    barrier = threading.Barrier(33, timeout=20)
    threads = [threading.Thread(target=barrier.wait) for _ in range(32)]
    [thread.start() for thread in threads]
    barrier.wait()
    [thread.join() for thread in threads]
    return x * 2""",
)
LIMITS = ContainerLimits(
    memory_bytes=1 << 30, processes=200, scratch_bytes=128 << 20, shared_memory_bytes=16 << 20
)

# `attempt` notes what came of an attack; the tests read it in the message of the test that fails.
PROBE = """
import ctypes, errno, glob, os, resource, signal, socket, stat, subprocess, sys, threading, time

found = {}
libc = ctypes.CDLL(None, use_errno=True)


def attempt(name, function, *arguments):
    try:
        result = function(*arguments)
        found[name] = "done" if result is None else f"done: {str(result)[:60]}"
    except BaseException as error:
        found[name] = errno.errorcode.get(getattr(error, "errno", None), type(error).__name__)


def call(name, *arguments):
    if getattr(libc, name)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), name)


def write(path, data=b"x"):
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(file, data)
    os.close(file)


def read(path):
    with open(path, "rb") as file:
        return file.read(64)


def attack():
{body}


def double(x):
    if not found:
        attack()
    return found


def is_even(n):
    return n % 2 == 0
"""


def hostile(body: str) -> str:
    """A right solution whose `double` first runs `body`."""
    body = textwrap.indent(textwrap.dedent(body), "    ")
    imports = "import os, signal, sys, threading, time"
    return f"{imports}\n{RIGHT}\n_right = double\n\n\ndef double(x):\n{body}\n    return _right(x)\n"


def until(condition: Callable[[], object], within_s: float = 15.0) -> bool:
    waiting = threading.Event()
    for _ in range(int(within_s / 0.05)):
        if condition():
            return True
        waiting.wait(0.05)
    return False


class Beside:
    """One container that grades right code again and again while others attack."""

    def __init__(self, sandbox: DockerSandbox) -> None:
        self._sandbox = sandbox
        self._warm = sandbox._launch(("torch",), strict=False)
        self.isolation = sandbox.isolation
        self.machine = sandbox.machine

    def run(self, job: Job, tar: bytes) -> Iterator[Event]:
        send_job(self._warm, job, tar)
        for line in self._warm.lines:
            event = json.loads(line)
            yield event
            if event["event"] == "finished":
                return

    def close(self) -> None:
        self._sandbox._destroy(self._warm)
        self._sandbox.close()


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("expected")


@pytest.fixture(scope="module")
def beside(image) -> Iterator[Beside]:
    beside = Beside(DockerSandbox(image=image, threads=1, pool=0, limits=LIMITS))
    yield beside
    beside.close()


@pytest.fixture(scope="module")
def docked(image) -> Iterator[DockerSandbox]:
    with DockerSandbox(image=image, threads=1, limits=LIMITS) as sandbox:
        sandbox.start()
        yield sandbox


def processes_in(container: str) -> list[int]:
    """Processes of this machine that belong to a container."""
    found = []
    for pid in psutil.pids():
        with contextlib.suppress(OSError):
            if container in Path(f"/proc/{pid}/cgroup").read_text():
                found.append(pid)
    return found


@pytest.fixture
def attack(course: Catalog, docked: DockerSandbox, beside: Beside, cache: Path, is_gone):
    """`attack(source)`: grade hostile code while another container grades right code; return the report.

    Whatever the attack, afterwards its container and processes are gone and the other run was verified.
    """
    lab = course.labs[0]

    def run(source: str, timeout_s: float = 20.0) -> LabReport:
        expected_tests(course, lab, lambda: beside, cache)
        docked.start()
        container = docked._waiting[0].result().container.id
        assert processes_in(container)
        working = threading.Event()

        def note(_: object, event: Event) -> None:
            if event["event"] == "test_started":
                working.set()

        with ThreadPoolExecutor(1) as pool:
            code = {"numbers_lab.py": source.encode()}
            attacked = pool.submit(
                grade_lab, course, lab, docked, code, timeout_s=timeout_s, cache=cache, on_event=note
            )
            assert working.wait(30)
            other = grade_lab(course, lab, beside, {"numbers_lab.py": BESIDE.encode()}, cache=cache)
            report = attacked.result(timeout_s + 60)
        assert other.status is Status.VERIFIED, other
        assert is_gone(container)
        assert until(lambda: not processes_in(container))
        return report

    return run


@pytest.fixture
def probe(attack) -> Callable[[str], dict[str, str]]:
    """`probe(body)`: what came of each attempt in `body`; the lab fails, with every result in place."""

    def run(body: str) -> dict[str, str]:
        report = attack(PROBE.replace("{body}", textwrap.indent(textwrap.dedent(body), "    ")))
        assert report.status is Status.FAILED, report
        assert [t.outcome for t in report.tests] == [Outcome.FAILED] * 4 + [Outcome.PASSED]
        found = re.match(r"got (\{.*\}): is the operator right\?", report.tests[0].message)
        assert found, report.tests[0].message
        return dict(ast.literal_eval(found[1]))

    return run


def done(found: dict[str, str]) -> set[str]:
    """Names of the attempts that got what they wanted."""
    return {name for name, result in found.items() if result.startswith("done")}


# --- reaching out -------------------------------------------------------------------------------------


def test_there_is_no_network(probe):
    with socket.create_server(("127.0.0.1", 0)) as here, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind(f"\0topeka-test-{os.getpid()}")
        abstract.listen()
        found = probe(
            f"""
            def tcp(host, port):
                socket.create_connection((host, port), timeout=3).close()

            def udp(host, port):
                socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", (host, port))

            attempt("TCP", tcp, "198.51.100.1", 443)
            attempt("TCP to the engine's bridge", tcp, "172.17.0.1", 22)
            attempt("TCP to this machine", tcp, "127.0.0.1", {here.getsockname()[1]})
            attempt("TCP over IPv6", tcp, "2001:db8::1", 443)
            attempt("metadata service", tcp, "169.254.169.254", 80)
            attempt("UDP", udp, "198.51.100.1", 53)
            attempt("multicast", udp, "224.0.0.251", 5353)
            attempt("DNS", socket.getaddrinfo, "example.org", 443)
            attempt("raw socket", socket.socket, socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
            attempt("packet socket", socket.socket, socket.AF_PACKET, socket.SOCK_RAW)
            attempt("hypervisor's socket", lambda: socket.socket(socket.AF_VSOCK).connect((2, 1024)))
            attempt("abstract socket", lambda: socket.socket(socket.AF_UNIX).connect("\\0topeka-test-{os.getpid()}"))
            """
        )
    assert len(found) == 12
    assert done(found) == set(), found
    assert found["TCP"] == found["metadata service"] == found["UDP"] == "ENETUNREACH"
    assert found["TCP to this machine"] == found["abstract socket"] == "ECONNREFUSED"


def test_nothing_of_the_host_and_of_other_runs_can_be_read(probe, course, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("a grade")
    found = probe(
        f"""
        attempt("a file of the host", read, {str(secret)!r})
        attempt("the course", os.listdir, {str(course.root)!r})
        attempt("its solutions", glob.glob, {str(course.root)!r} + "/**/solutions")
        attempt("the engine's socket", lambda: socket.socket(socket.AF_UNIX).connect("/var/run/docker.sock"))
        attempt("the grader's socket", os.listdir, "/run/topeka")
        attempt("a process of the host", os.kill, {os.getpid()}, 0)
        attempt("passwords", read, "/etc/shadow")
        attempt("kernel memory", read, "/proc/kcore")
        attempt("kernel log", read, "/dev/kmsg")
        attempt("disks", lambda: [d for d in os.listdir("/dev") if d.startswith(("sd", "vd", "nvme", "mem", "kvm"))])
        attempt("other runs", lambda: len(glob.glob("/tmp/topeka-job-*")))
        attempt("processes", lambda: sorted(int(p) for p in os.listdir("/proc") if p.isdigit()))
        attempt("myself", os.getpid)
        attempt("labs in the image", lambda: sum("labs" in d for _, d, _ in os.walk("/opt/topeka/src")))
        """
    )
    answers = {name: found.pop(name).removeprefix("done: ") for name in sorted(done(found))}
    mine = answers.pop("myself")
    assert answers["disks"] == answers["its solutions"] == "[]"
    assert answers["labs in the image"] == "0"
    assert answers["other runs"] == "1", "its own work folder is the only one"
    assert answers["processes"] == f"[1, {mine}]"
    assert answers.get("the grader's socket", "[]") == "[]"
    assert {
        "a file of the host",
        "the course",
        "the engine's socket",
        "a process of the host",
    } <= found.keys()
    assert {"passwords", "kernel memory"} <= found.keys()


def test_the_runner_can_be_neither_read_nor_changed_nor_ended(probe):
    found = probe(
        r"""
        forged = b'{"event": "finished", "job": "x", "end": "exited", "code": 0}\n'
        attempt("its memory", read, "/proc/1/mem")
        attempt("its memory, writing", os.open, "/proc/1/mem", os.O_RDWR)
        attempt("its descriptors", os.listdir, "/proc/1/fd")
        for number in range(8):
            attempt(f"forging on its descriptor {number}", write, f"/proc/1/fd/{number}", forged)
        attempt("its environment", read, "/proc/1/environ")
        attempt("its folder", os.listdir, "/proc/1/cwd")
        attempt("its root", os.listdir, "/proc/1/root")
        attempt("its memory map", read, "/proc/1/maps")
        attempt("ptrace attach", call, "ptrace", 16, 1, 0, 0)
        attempt("ptrace seize", call, "ptrace", 0x4206, 1, 0, 0)
        buffer = ctypes.create_string_buffer(8)
        vector = (ctypes.c_size_t * 2)(ctypes.addressof(buffer), 8)
        attempt("process_vm_readv", call, "process_vm_readv", 1, vector, 1, vector, 1, 0)
        attempt("pidfd_getfd", lambda: call("syscall", 438, os.pidfd_open(1), 3, 0))
        attempt("choosing it when memory runs out", write, "/proc/1/oom_score_adj", b"1000")
        found["parent"] = str(os.getppid())
        found["command"] = read("/proc/1/cmdline").replace(b"\0", b" ").decode()
        for number in signal.valid_signals():
            try:
                os.kill(1, number)
            except OSError as error:
                pass
        time.sleep(0.3)
        """
    )
    assert found.pop("parent") == "1", "the runner is process 1, which no signal from inside ends or stops"
    assert "python -P -m grader.runner" in found.pop("command"), (
        "-P: no modules from the folder jobs write to"
    )
    assert len(found) == 20
    assert done(found) == set(), found


def test_lowering_the_runners_limits_ends_the_container_and_forges_nothing(attack):
    """The kernel lets a process set limits of others of its user; the runner then fails, as an error."""
    body = """
    import resource
    time.sleep(0.5)  # the runner tells that the test has begun, as long as it can
    resource.prlimit(1, resource.RLIMIT_NOFILE, (0, 0))
    resource.prlimit(1, resource.RLIMIT_AS, (0, 0))
    time.sleep(1e6)
    """
    report = attack(hostile(body), timeout_s=3.0)
    assert report.status in (Status.ERROR, Status.TIMEOUT), report


def test_rights_cannot_be_gained(probe):
    found = probe(
        r"""
        def run(*command):
            done = subprocess.run(command, capture_output=True, text=True, timeout=5, stdin=subprocess.DEVNULL)
            if done.returncode:
                raise PermissionError(1, done.stderr)
            return done.stdout

        attempt("setuid", os.setuid, 0)
        attempt("setgid", os.setgid, 0)
        attempt("setresuid", os.setresuid, -1, 0, 0)
        attempt("setgroups", os.setgroups, [0])
        attempt("chroot", os.chroot, "/tmp")
        attempt("mount", call, "mount", b"none", b"/tmp", b"tmpfs", 0, None)
        attempt("remount of the root", call, "mount", b"none", b"/", None, 32, None)
        attempt("umount", call, "umount2", b"/tmp", 2)
        attempt("unshare of users", call, "unshare", 0x10000000)
        attempt("unshare of mounts", call, "unshare", 0x00020000)
        attempt("setns", lambda: call("setns", os.open("/proc/self/ns/net", os.O_RDONLY), 0))
        attempt("device file", os.mknod, "/tmp/disk", stat.S_IFBLK | 0o600, os.makedev(254, 0))
        attempt("chown", lambda: (write("/tmp/mine"), os.chown("/tmp/mine", 0, 0)))
        attempt("hostname", socket.sethostname, "mine")
        attempt("clock", time.clock_settime, time.CLOCK_REALTIME, 0)
        attempt("kernel module", call, "syscall", 175, 0, 0, b"")
        attempt("bpf", call, "syscall", 321, 0, 0, 0)
        attempt("perf events", call, "syscall", 298, 0, 0, -1, -1, 0)
        attempt("keyring", call, "syscall", 250, 0, -3, 0)
        attempt("io_uring", call, "syscall", 425, 1, ctypes.create_string_buffer(120))
        attempt("su", run, "su", "-c", "id -u")
        attempt("mount command", run, "mount", "-t", "tmpfs", "none", "/tmp")
        attempt("lower nice value", os.setpriority, os.PRIO_PROCESS, 0, -5)
        attempt("higher limit", resource.setrlimit, resource.RLIMIT_NPROC, (10_000, 10_000))
        found["setuid programs"] = str(
            run("sh", "-c", "cp /bin/sh /tmp/sh && chmod 6755 /tmp/sh && /tmp/sh -p -c 'id -u'").strip() == "0"
        )
        status = dict(line.split(":\t") for line in open("/proc/self/status").read().splitlines() if ":\t" in line)
        found["status"] = " ".join(status[k] for k in ("CapEff", "CapPrm", "CapBnd", "NoNewPrivs", "Seccomp"))
        """
    )
    none = "0" * 16
    assert found.pop("status") == f"{none} {none} {none} 1 2"
    assert found.pop("setuid programs") == "False"
    assert len(found) == 24
    assert done(found) == set(), found


def test_only_the_scratch_folders_can_be_written(probe):
    found = probe(
        r"""
        for path in (
            "/mine", "/opt/topeka/src/grader/mine", "/opt/topeka/src/grader/runner/warm.py", "/opt/topeka/bin/start",
            "/opt/topeka/venv/lib/python3.11/site-packages/mine.pth", "/etc/passwd", "/etc/ld.so.preload",
            "/usr/bin/mine", "/home/topeka/mine", "/run/mine", "/run/topeka/mine", "/var/tmp/mine", "/dev/mine",
            "/sys/kernel/mine", "/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory.max",
            "/proc/sys/kernel/core_pattern", "/proc/sys/kernel/hostname", "/proc/sys/vm/drop_caches",
            "/proc/sysrq-trigger", "/proc/1/comm",
        ):
            attempt(path, write, path)
        writable = []
        for line in open("/proc/mounts"):
            folder = line.split()[1]
            try:
                write(folder + "/mine")
                writable.append(folder)
            except OSError:
                pass
        found["writable"] = ",".join(sorted(set(writable)))
        """
    )
    assert set(found.pop("writable").split(",")) <= {"/tmp", "/dev/shm", "/dev/mqueue"}
    assert len(found) == 21
    assert done(found) == set(), found


# --- using up -----------------------------------------------------------------------------------------


def test_a_fork_bomb(attack):
    body = """
    while True:
        try:
            os.fork()
            os.setsid()
        except OSError:
            pass
    """
    report = attack(hostile(body), timeout_s=5.0)
    # Which limit is met first depends on the load: that on processes, or that on time.
    assert report.status in (Status.ERROR, Status.TIMEOUT)
    assert "more than 64 processes at a time" in report.reason or "no verdict within" in report.reason


def test_a_thread_bomb(attack):
    body = """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    started = 0
    try:
        while True:
            threading.Thread(target=time.sleep, args=(1e6,), daemon=True).start()
            started += 1
    except RuntimeError as error:
        time.sleep(2)  # long enough for the run beside it to want threads too
        raise RuntimeError(f"{error} after {started}")
    """
    report = attack(hostile(body))
    assert report.status is Status.FAILED
    number = re.search(r"can't start new thread after (\d+)", report.tests[0].message)
    assert number, report.tests[0].message
    assert int(number[1]) <= 64


def test_a_memory_bomb_of_one_allocation(attack):
    report = attack(hostile("hoard = bytearray(64 << 30)"))
    assert report.status is Status.FAILED
    assert "MemoryError" in report.tests[0].message


def test_a_memory_bomb_of_touched_pages_ends_the_job_and_not_the_machine(attack):
    report = attack(hostile("hoard = []\nwhile True: hoard.append(b'x' * (32 << 20))"))
    assert report.status is Status.ERROR
    assert "signal 9 (kill (out of memory?)) during test_double[1.5]" in report.reason


def test_filling_the_disk_and_the_shared_memory(probe):
    found = probe(
        """
        def fill(folder):
            size = 0
            try:
                while True:
                    with open(f"{folder}/{size}", "wb", buffering=0) as file:
                        for _ in range(16):
                            size += file.write(bytes(1 << 20))
            finally:
                found[folder + " took"] = str(size >> 20)

        attempt("scratch", fill, "/tmp")
        attempt("shared memory", fill, "/dev/shm")
        for name in os.listdir("/tmp"):
            if name.isdigit():
                os.unlink(f"/tmp/{name}")
        """
    )
    assert found["scratch"] == found["shared memory"] == "ENOSPC"
    assert int(found["/tmp took"]) <= 128
    assert int(found["/dev/shm took"]) <= 16


def test_a_disk_that_stays_full_is_no_way_to_pass(attack):
    body = """
    for folder in ("/tmp", "/dev/shm"):
        try:
            for number in range(200):
                with open(f"{folder}/{number}", "wb", buffering=0) as file:
                    while file.tell() < 64 << 20:
                        file.write(bytes(1 << 20))
        except OSError:
            pass
    x = x + 1
    """
    assert attack(hostile(body)).status in (Status.FAILED, Status.ERROR)


def test_100_000_files_in_folders_10_000_deep(attack):
    body = """
    if x != 1.5:
        return _right(x)
    os.mkdir("many")
    for number in range(100_000):
        os.close(os.open(f"many/{number}", os.O_CREAT))
    here = os.getcwd()
    for _ in range(10_000):
        os.mkdir("deep")
        os.chdir("deep")
    os.chdir(here)
    os.chmod("deep", 0)
    """
    assert attack(hostile(body), timeout_s=60).status is Status.VERIFIED


def test_a_gigabyte_on_standard_output_and_another_on_standard_error(attack):
    # pytest captures both, so look for the pipe behind: its copies are open more than once.
    body = """
    if x == 1.5:
        links = {}
        for fd in range(3, 64):
            try:
                links[fd] = os.readlink(f"/proc/self/fd/{fd}")
            except OSError:
                pass
        pipes = [link for link in links.values() if link.startswith("pipe:")]
        out, err = [fd for fd, link in links.items() if pipes.count(link) > 1][:2]
        for fd in (out, err):
            for _ in range(1024):
                os.write(fd, b"x" * (1 << 20))
        os.write(err, b"the end")
    x = 5 * x
    """
    report = attack(hostile(body), timeout_s=60.0)
    assert report.status is Status.FAILED
    assert report.output_cut
    assert len(report.output) == 64 << 10
    assert "the end" in report.output[-100:]


def test_printing_without_end(attack):
    report = attack(hostile("while True: print('x' * 1_000_000)"))
    assert report.status in (Status.FAILED, Status.ERROR)
    assert all(len(test.output) <= 4_000 and len(test.message) <= 4_000 for test in report.tests)


EVENT_PIPE = """
links = {}
for fd in range(3, 64):
    try:
        links[fd] = os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        pass
pipes = [link for link in links.values() if link.startswith("pipe:")]
events = next(fd for fd, link in links.items() if pipes.count(link) == 1)
"""


def test_a_flood_of_well_formed_results(attack):
    body = (
        EVENT_PIPE
        + """
while True:
    os.write(events, b'{"event": "test_started", "test": "' + b"x" * 2000 + b'"}\\n')
"""
    )
    report = attack(hostile(body), timeout_s=60.0)
    assert report.status is Status.ERROR
    assert "more results came than any lab has" in report.reason


def test_malformed_results_disturb_nobody(attack):
    body = (
        EVENT_PIPE
        + r"""
if x == 1.5:
    for line in (
        b'{"event": "test"}', b'{"event": "test", "test": {}}', b'{"event": "test_started", "test": null}',
        b'{"event": "collect_error", "file": 1}', b'{"event": ["test"]}', b'{"event": "collected", "tests": 7}',
        b'{"event": "test", "test": "x", "outcome": "perfect", "seconds": 0, "message": "", "output": "",'
        b' "not_written": false, "milestones": [{}]}',
        b'{"event": "test_started", "test": "\\ud800"}', b"[" * 100_000, b'{"a":' * 100_000, b"1" * 100_000,
        b'{"event": "finished", "end": "exited", "code": 0}', b'{"event": "ready"}', b"\xff\x00", b"", b"x" * (3 << 20),
    ):
        os.write(events, line + b"\n")
"""
    )
    assert attack(hostile(body)).status is Status.VERIFIED
    report = attack(hostile(body).replace("return _right(x)", "raise ValueError('half a pair: \\ud800')"))
    assert report.status is Status.FAILED
    assert report.reason == "4 of 5 tests failed"
    assert "half a pair: ?" in report.tests[0].message


# --- staying ------------------------------------------------------------------------------------------


def test_a_time_out_that_ignores_every_signal(attack):
    body = """
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN)
    while True:
        time.sleep(1)
    """
    report = attack(hostile(body), timeout_s=1.0)
    assert report.status is Status.TIMEOUT
    assert report.reason == "no verdict within 1 s; stopped during test_double[1.5]"


def test_a_daemon_does_not_outlive_its_job(attack):
    body = """
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(1e6)
        os._exit(0)
    """
    assert attack(hostile(body)).status is Status.VERIFIED


def test_killing_and_stopping_everything_in_reach(attack):
    body = """
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for target in (1, os.getppid(), -1):
            try:
                os.kill(target, number)
            except ProcessLookupError:
                pass
    """
    assert attack(hostile(body)).status is Status.VERIFIED
    report = attack(hostile("os.kill(0, signal.SIGSTOP)"), timeout_s=1.0)  # itself
    assert report.status is Status.TIMEOUT


def test_two_containers_have_different_users(docked, beside, engine):
    docked.start()
    containers = [docked._waiting[0].result().container, beside._warm.container]
    users = {engine.containers.get(c.id).attrs["Config"]["User"] for c in containers}
    assert len(users) == 2
    assert all(re.fullmatch(r"([2-5]\d{4}):\1", user) for user in users)


# --- tars that no client of ours would make -----------------------------------------------------------


def member(name: str, **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    content = fields.pop("content", b"")
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    for key, value in fields.items():
        setattr(entry, key, value)
    return entry, content


def tar_of(*members: tuple[tarfile.TarInfo, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for entry, content in members:
            tar.addfile(entry, io.BytesIO(content) if content else None)
    return buffer.getvalue()


def header_with_size(field: bytes) -> bytes:
    """A tar header whose size field says anything at all."""
    header = bytearray(tarfile.TarInfo("huge").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = field
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def sparse() -> bytes:
    """A GNU sparse file: a gigabyte of nothing in 512 bytes."""
    header = bytearray(header_with_size(b"%011o\0" % 512))
    header[156:157] = b"S"
    header[386:410] = b"%011o\0" % 0 + b"%011o\0" % 512
    header[483:495] = b"%011o\0" % (1 << 30)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + bytes(512) + bytes(1024)


ESCAPE = "/tmp/topeka-escaped"
TARS: dict[str, tuple[Callable[[], bytes], str]] = {
    "path traversal": (lambda: tar_of(member("../../escaped", content=b"x")), "no file below its root"),
    "path traversal inside": (
        lambda: tar_of(member("labs/../../../escaped", content=b"x")),
        "no file below its root",
    ),
    "absolute path": (lambda: tar_of(member(ESCAPE, content=b"x")), "no file below its root"),
    "symbolic link": (
        lambda: tar_of(
            member("out", type=tarfile.SYMTYPE, linkname="/tmp"),
            member("out/topeka-escaped", content=b"x"),
        ),
        "'out', which is no file",
    ),
    "hard link": (
        lambda: tar_of(member("out", type=tarfile.LNKTYPE, linkname="/etc/passwd")),
        "'out', which is no file",
    ),
    "hard link to a member": (
        lambda: tar_of(member("a", content=b"x"), member("b", type=tarfile.LNKTYPE, linkname="a")),
        "'b', which is no file",
    ),
    "device file": (
        lambda: tar_of(member("disk", type=tarfile.BLKTYPE, devmajor=254, devminor=0)),
        "'disk', which is no file",
    ),
    "fifo": (lambda: tar_of(member("pipe", type=tarfile.FIFOTYPE)), "'pipe', which is no file"),
    "decompression bomb": (lambda: gzip.compress(bytes(64 << 20)), "not the tar of a job"),
    "compressed tar": (
        lambda: gzip.compress(tar_of(member("zeros", content=bytes(64 << 20)))),
        "not the tar of a job",
    ),
    "100,000 files": (
        lambda: tar_of(*(member(f"file{n}") for n in range(100_000)), format=tarfile.GNU_FORMAT),
        "more than 5,000 files",
    ),
    "header of a gigabyte": (
        lambda: header_with_size(b"%011o\0" % (1 << 30)),
        "more than 5,000 files or 256 MiB",
    ),
    "header of less than nothing": (
        lambda: header_with_size(b"\xff" * 4 + b"\xc0" + bytes(7)),
        "more than 5,000 files or 256 MiB|invalid offset",  # later Pythons see it themselves
    ),
    "sparse gigabyte": (sparse, "more than 5,000 files or 256 MiB"),
    "cut in a member": (lambda: tar_of(member("a", content=bytes(4096)))[:1024], "not the tar of a job"),
    "a folder and a file of one name": (
        lambda: tar_of(member("a/b", content=b"x"), member("a", content=b"x")),
        "not the tar of a job",
    ),
    "a name too long": (lambda: tar_of(member("x" * 5000, content=b"x")), "not the tar of a job"),
    "garbage": (lambda: bytes(range(256)) * 100, "not the tar of a job"),
    "nothing": (lambda: b"", "not the tar of a job"),
}


class Swapped:
    """A sandbox that is given another tar than the one that the grader packed."""

    def __init__(self, sandbox: Sandbox, tar: bytes) -> None:
        self._sandbox, self._tar = sandbox, tar
        self.isolation, self.machine = sandbox.isolation, None

    def run(self, job: Job, tar: bytes) -> Iterator[Event]:
        return self._sandbox.run(job, self._tar)


@pytest.fixture(scope="module")
def light() -> Iterator[LocalSandbox]:
    """A runner that starts quickly, since a bad tar ends it: it is the same runner in every sandbox."""
    with LocalSandbox(threads=1, preload=()) as sandbox:
        yield sandbox


@pytest.mark.parametrize("name", TARS)
def test_a_tar_that_is_none_of_ours(course, sandbox, light, cache, name):
    make, words = TARS[name]
    lab = course.labs[0].model_copy(update={"preload": ()})
    expected_tests(course, lab, lambda: sandbox, cache)
    around = {p for p in Path(os.environ["TMPDIR"]).parent.rglob("*") if "escaped" in p.name}
    report = grade_lab(course, lab, Swapped(light, make()), {}, cache=cache)
    assert report.status is Status.ERROR
    assert re.search(words, report.reason)
    assert not Path(ESCAPE).exists()
    assert {p for p in Path(os.environ["TMPDIR"]).parent.rglob("*") if "escaped" in p.name} == around
    assert [
        p for p in Path(os.environ["TMPDIR"]).glob("topeka-job-*") if str(light_pid(light)) in p.name
    ] == []
    right = grade_lab(course, course.labs[0], sandbox, {"numbers_lab.py": RIGHT.encode()}, cache=cache)
    assert right.status is Status.VERIFIED


def light_pid(sandbox: LocalSandbox) -> int:
    return sandbox._process.pid if sandbox._process else 0


@pytest.mark.parametrize("name", ["path traversal", "symbolic link", "100,000 files"])
def test_a_tar_that_is_none_of_ours_in_a_container(course, image, containers_of, name):
    make, words = TARS[name]
    job = Job(id="x", folder="ch01_numbers/lab01_double", preload=())
    with DockerSandbox(image=image, preload=("numpy",), pool=0, limits=LIMITS) as sandbox:
        before = {c.id for c in containers_of(os.getpid())}
        with pytest.raises(SandboxFailed, match=words):
            list(sandbox.run(job, make()))
        assert until(lambda: {c.id for c in containers_of(os.getpid())} <= before)


@pytest.mark.parametrize(
    "stream",
    [
        b"garbage\n",
        b"{}\n",
        b"[" * 100_000 + b"\n",
        b'{"job": {"id": "x", "folder": 7}, "tar_bytes": 0}\n',
        b'{"job": {"id": "x", "folder": "y"}, "tar_bytes": -1}\n',
        b'{"job": {"id": "x", "folder": "y"}, "tar_bytes": 1000000000000}\n',
        b'{"job": {"id": "x", "folder": "y"}, "tar_bytes": 100}\ntoo short',
        b" " * (2 << 20),
    ],
    ids=["garbage", "empty", "nested", "types", "negative", "terabyte", "cut", "endless"],
)
def test_a_header_that_is_none_of_ours(stream):
    with pytest.raises(ProtocolError):
        receive_job(io.BytesIO(stream))


def test_the_packed_tar_of_a_job_is_taken(course):
    """The counterpart of the above: what the grader packs passes."""
    job = Job(id="x", folder="ch01_numbers/lab01_double", tests=("tests/a.py::test_b",))
    stream = io.BytesIO()
    send_job(stream, job, pack(course, course.labs[0], {"numbers_lab.py": RIGHT.encode()}))
    stream.seek(0)
    assert receive_job(stream)[0] == job
