"""Asks other programs, and gives up soon."""

import subprocess
from typing import NamedTuple

PATIENCE_S = 1.0
"""Every question to another program is given up after this, so that the examination stays short."""


class Answer(NamedTuple):
    """What a program said: its output, empty if there was none, and why it failed, empty if it did not."""

    text: str
    trouble: str = ""


def ask(*command: str) -> Answer:
    """Run a program and return what it said; a failure is an answer too."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
    except FileNotFoundError:
        return Answer("", f"the program {command[0]} is not installed")
    except subprocess.TimeoutExpired:
        return Answer("", f"no answer within {PATIENCE_S:.0f} s")
    except OSError as error:
        return Answer("", f"{command[0]}: {error.strerror}")
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return Answer(done.stdout.strip(), lines[-1] if lines else f"exit status {done.returncode}")
    return Answer(done.stdout.strip())
