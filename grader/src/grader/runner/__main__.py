"""`python -m grader.runner --events-fd N`: a warm parent on standard input and descriptor N."""

import argparse
import signal
import sys

from grader.runner.warm import WarmParent


def main() -> None:
    """Serve jobs until standard input ends."""
    parser = argparse.ArgumentParser(prog="python -m grader.runner", description=__doc__)
    parser.add_argument("--events-fd", type=int, required=True, help="descriptor for events, JSON lines")
    parser.add_argument("--preload", default="torch,numpy", help="modules to import first, with commas")
    arguments = parser.parse_args()
    # Ctrl-C reaches the whole terminal; it is the client that decides to stop, by closing our input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    WarmParent(sys.stdin.buffer, arguments.events_fd).serve(arguments.preload.split(","))


main()
