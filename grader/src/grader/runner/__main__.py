"""`python -m grader.runner`: a warm parent on standard input and a descriptor, or behind a socket."""

import argparse
import signal
import sys
from pathlib import Path

from grader.runner.listener import listen
from grader.runner.warm import WarmParent


def main() -> None:
    """Serve jobs until standard input ends, or for as long as this process lives."""
    parser = argparse.ArgumentParser(prog="python -m grader.runner", description=__doc__)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--events-fd", type=int, help="jobs on standard input, events to this descriptor")
    where.add_argument("--socket", type=Path, help="jobs and events over a Unix socket at this path")
    parser.add_argument("--preload", default="torch,numpy", help="modules to import first, with commas")
    arguments = parser.parse_args()
    preload = [name for name in arguments.preload.split(",") if name]
    # Ctrl-C reaches the whole terminal; it is the client that decides to stop, by closing our input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if arguments.socket is not None:
        listen(arguments.socket, preload)
    else:
        WarmParent(sys.stdin.buffer, arguments.events_fd).serve(preload)


main()
