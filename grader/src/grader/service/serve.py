"""The programs: the server, with a worker of its own on SQLite, and the worker alone."""

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from socket import IPPROTO_TCP, TCP_NODELAY
from socket import socket as Socket

import uvicorn

from grader.catalog import Catalog
from grader.errors import TopekaError
from grader.sandbox import Sandbox
from grader.service import dashboard, work_queue
from grader.service.api import Service, create_app
from grader.service.database import Database
from grader.service.settings import Settings
from grader.service.work_queue import WorkQueue
from grader.service.worker import GradingWorker

log = logging.getLogger("topeka.serve")

SandboxMaker = Callable[[], tuple[Sandbox, str]]


def open_database(settings: Settings) -> Database:
    """Return the database, its tables and the queue's brought up to date."""
    database = Database(settings.database_url)
    database.upgrade()
    work_queue.prepare(database)
    return database


def serve(catalog: Catalog, settings: Settings, make_sandbox: SandboxMaker, cache: Path) -> None:
    """Serve until SIGTERM or Ctrl-C; on SQLite grade too.

    Args:
        catalog: the course.
        settings: of the service.
        make_sandbox: makes and starts this machine's sandbox, and names its stack.
        cache: for expected test sets.

    Raises:
        TopekaError: the port is taken, or the database cannot be used.
    """
    log_as_json()
    database = open_database(settings)
    worker = sandbox = None
    try:
        app = create_app(Service(database, settings, catalog, WorkQueue(database)))
        server = _Server(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=5,
            )
        )
        try:
            socket = server.config.bind_socket()
            # Accepted connections inherit it. uvicorn's socket says no protocol, so asyncio does not set it, and an
            # answer's body would wait 40 ms for the acknowledgement of its head.
            socket.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)
        except SystemExit as error:  # uvicorn has logged why
            raise TopekaError(
                f"port {settings.port} of {settings.host} cannot be had: is another `topeka serve` running? "
                "--port takes another"
            ) from error
        if database.is_sqlite:
            sandbox, stack = make_sandbox()
            worker = _worker(database, settings, catalog, sandbox, stack, 0, cache)
            worker.start()
        # uvicorn hands its signals on once it has ended; ours do nothing, so that the worker can drain.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        server.run(sockets=[socket])
    finally:
        if worker:
            worker.stop()
        if sandbox:
            sandbox.close()
        database.close()


class _Server(uvicorn.Server):
    async def startup(self, sockets: list[Socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and sockets:
            host, port = sockets[0].getsockname()[:2]
            print(f"Topeka's grader listens on http://{host}:{port}; Ctrl-C ends it.", flush=True)
            if link := dashboard.sign_in_link(self.config.app, f"http://{host}:{port}"):
                print(f"Open {link}\nThe link signs you in, once.", flush=True)


def work(catalog: Catalog, settings: Settings, make_sandbox: SandboxMaker, slot: int, cache: Path) -> None:
    """Grade what waits until SIGTERM or Ctrl-C; what has begun is finished first.

    Args:
        catalog: the course.
        settings: of the service.
        make_sandbox: makes and starts this machine's sandbox, and names its stack.
        slot: number of this worker on its machine.
        cache: for expected test sets.
    """
    log_as_json()
    database = open_database(settings)
    if database.is_sqlite and slot == 0:
        log.info("SQLite is for one machine; `topeka serve` on it grades too")
    sandbox, stack = make_sandbox()
    worker = _worker(database, settings, catalog, sandbox, stack, slot, cache)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    try:
        worker.start()
        print(f"Worker {worker.id} takes work for {stack}; Ctrl-C ends it.", flush=True)
        ended.wait()
    finally:
        worker.stop()
        sandbox.close()
        database.close()


def _worker(
    database: Database,
    settings: Settings,
    catalog: Catalog,
    sandbox: Sandbox,
    stack: str,
    slot: int,
    cache: Path,
) -> GradingWorker:
    order = ["cpu", "cuda", "multi-gpu"]
    # A larger machine verifies what a smaller one does.
    queues = order[: order.index(stack) + 1]
    return GradingWorker(
        database, settings, catalog, sandbox, queues=queues, stack=stack, slot=slot, cache=cache
    )


# --- logs ---------------------------------------------------------------------------------------


class _JsonLines(logging.Formatter):
    """One JSON object a line: time, level, where, what, and what `extra` adds (submission, lab, ...)."""

    _KNOWN = frozenset(vars(logging.makeLogRecord({})))

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {k: v for k, v in vars(record).items() if k not in self._KNOWN | {"message", "asctime"}}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_as_json() -> None:
    """Send logs to standard error, one JSON object a line; TOPEKA_LOG_LEVEL chooses how much."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines())
    logging.basicConfig(
        level=os.environ.get("TOPEKA_LOG_LEVEL", "INFO").upper(), handlers=[handler], force=True
    )
    for noisy in ("dbos", "alembic", "uvicorn.error"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
