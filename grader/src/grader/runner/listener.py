"""A warm parent that others reach over a Unix socket: the grader's container beside a workspace."""

import contextlib
import json
import os
import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from grader.runner import reaper
from grader.runner.warm import WarmParent, import_all

# More clients at a time than this are turned away; each may run a job.
MAX_CLIENTS = 8


def listen(path: Path, preload: Sequence[str]) -> NoReturn:
    """Import `preload` once, then serve every connection in a fork of this process.

    Args:
        path: of the socket; whatever an earlier listener left there is replaced. Its group may connect.
        preload: modules that jobs find imported.
    """
    reaper.adopt_orphans()
    reaper.hide()
    import_all(preload)
    path.unlink(missing_ok=True)
    before = os.umask(0o007)
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    os.umask(before)
    server.listen()
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    clients: set[int] = set()
    while True:
        connection, _ = server.accept()
        clients -= _ended(clients)
        if len(clients) >= MAX_CLIENTS:
            _turn_away(connection)
            continue
        pid = os.fork()
        if pid == 0:
            server.close()
            _serve(connection)
        connection.close()
        clients.add(pid)


def _turn_away(connection: socket.socket) -> None:
    with connection, contextlib.suppress(OSError):
        connection.setblocking(False)
        connection.send(json.dumps({"event": "busy", "clients": MAX_CLIENTS}).encode() + b"\n")


def _serve(connection: socket.socket) -> NoReturn:
    code = 70
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        reaper.die_with_parent()
        with contextlib.suppress(BrokenPipeError, ConnectionError):
            WarmParent(connection.makefile("rb"), connection.fileno()).serve(())
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def _ended(clients: set[int]) -> set[int]:
    ended = set()
    for pid in clients:
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(pid, os.WNOHANG)[0] == 0:
                continue
        ended.add(pid)
    return ended
