"""The programs: the server, with a worker of its own on SQLite, and the worker alone."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from socket import IPPROTO_TCP, TCP_NODELAY
from socket import socket as Socket
from typing import NoReturn

import uvicorn
from sqlalchemy.exc import DBAPIError

from grader.catalog import Catalog
from grader.errors import COULD_NOT_RUN, OK, TopekaError
from grader.machine import describe
from grader.report import Report
from grader.sandbox import Sandbox, SandboxFailed
from grader.service import dashboard, work_queue
from grader.service.api import Service, create_app
from grader.service.dashboard.sessions import has_local_owner, is_local_owner
from grader.service.database import Database, DatabaseUnusable
from grader.service.hardware import all_queues, queues_here, stack_here
from grader.service.logs import log_as_json
from grader.service.models import Submission
from grader.service.settings import Settings
from grader.service.upkeep import Upkeep
from grader.service.work_queue import WorkQueue
from grader.service.worker import GradingWorker, WorkerRefused
from grader.state import State, StateUnusable

log = logging.getLogger("topeka.serve")

SandboxMaker = Callable[[], tuple[Sandbox, str]]


def open_database(settings: Settings) -> Database:
    """Return the database, its tables and the queue's brought up to date."""
    database = Database(settings.database_url)
    database.upgrade()
    try:
        work_queue.prepare(database)
    except DBAPIError as error:
        raise DatabaseUnusable(f"the database cannot be used: {error.orig}") from error
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
    queue = WorkQueue(database)
    upkeep = Upkeep(database, queue, catalog, settings)
    try:
        app = create_app(Service(database, settings, catalog, queue))
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
            # Nobody else will take what this machine cannot verify: its report then says so, test by test.
            worker = GradingWorker(
                database,
                settings,
                catalog,
                sandbox,
                queues=all_queues(catalog),
                stack=stack,
                cache=cache,
                on_graded=partial(_remember_own, database, settings, catalog),
            )
            worker.start()
        upkeep.start()
        # uvicorn hands its signals on once it has ended; ours do nothing, so that the worker can drain.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        server.run(sockets=[socket])
        upkeep.stop()
    finally:
        if worker:
            worker.stop()
        if sandbox:
            sandbox.close()
        database.close()


def _remember_own(
    database: Database, settings: Settings, catalog: Catalog, submission_id: str, report: Report
) -> None:
    """Let what the owner of this machine has graded here count for `topeka progress` too."""
    if not has_local_owner(settings):
        return
    try:
        with database.session() as session:
            if not is_local_owner(session, session.get_one(Submission, submission_id).user_id):
                return
        State(catalog.root / ".topeka").remember(report)
    except (OSError, StateUnusable, DBAPIError) as error:
        log.warning("topeka progress does not know of this attempt: %s", error)


class _Server(uvicorn.Server):
    async def startup(self, sockets: list[Socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and sockets:
            host, port = sockets[0].getsockname()[:2]
            print(f"Topeka's grader listens on http://{host}:{port}; Ctrl-C ends it.", flush=True)
            named = "127.0.0.1" if host == "0.0.0.0" else host
            if link := dashboard.sign_in_link(self.config.app, f"http://{named}:{port}"):
                print(f"Open {link}\nThe link signs you in, once.", flush=True)


def work(
    catalog: Catalog,
    settings: Settings,
    make_sandbox: SandboxMaker,
    wanted: str | None,
    slot: int,
    cache: Path,
) -> None:
    """Grade what waits until SIGTERM or Ctrl-C; what has begun is finished first, or put back.

    Args:
        catalog: the course.
        settings: of the service.
        make_sandbox: makes and starts this machine's sandbox, and names its stack.
        wanted: the largest stack to take work for; None for what this machine can verify.
        slot: number of this worker on its machine.
        cache: for expected test sets.

    Raises:
        TopekaError: the machine cannot verify what is wanted, another worker has this id, or the database cannot be
            used.
    """
    log_as_json()
    ended, displaced = threading.Event(), threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())

    def make_room() -> None:
        displaced.set()
        ended.set()

    sandbox, stack = make_sandbox()
    try:
        seen = sandbox.machine
        largest = stack_here(wanted, seen.gpus, seen.gpu_note)
        queues = queues_here(catalog, largest, seen.gpus, describe().memory_bytes)
        database = open_database(settings)
        try:
            if database.is_sqlite and slot == 0:
                log.info("SQLite is for one machine; `topeka serve` on it grades too")
            worker = GradingWorker(
                database,
                settings,
                catalog,
                sandbox,
                queues=queues,
                stack=stack,
                slot=slot,
                cache=cache,
                on_displaced=make_room,
            )
            try:
                worker.warm()
            except SandboxFailed as error:
                raise WorkerRefused(
                    f"the sandbox does not work, so nothing can be graded here: {error}"
                ) from error
            try:
                worker.start()
            except DBAPIError as error:
                log.error("the database does not answer: %s", error.orig)
                _leave(COULD_NOT_RUN)
            print(f"Worker {worker.id} takes work from {', '.join(queues)}; Ctrl-C ends it.", flush=True)
            ended.wait()
            log.info("draining", extra={"worker": worker.id})
            worker.stop()
        finally:
            database.close()
    finally:
        sandbox.close()
    if displaced.is_set():
        raise WorkerRefused(f"another worker has taken the id {worker.id}: see --slot and TOPEKA_WORKER_HOST")
    _leave(OK)


def _leave(code: int) -> NoReturn:
    """End the process now, also if the queue's threads still wait for work that others do now."""
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)
