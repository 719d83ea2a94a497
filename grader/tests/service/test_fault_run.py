"""The short form of scripts/fault_run.py: kill things at random, and nothing is lost or graded twice."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from shared.plugin import NOT_VERIFIED_HERE

from .cluster import ROOT


def test_whatever_is_killed_every_submission_gets_exactly_one_report(tmp_path: Path):
    options = [
        "-n",
        "12",
        "--clients",
        "4",
        "--kills",
        "2",
        "--seed",
        "3",
        "--lost-after",
        "2",
        "--within",
        "400",
    ]
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "scripts" / "fault_run.py"),
            *options,
            "--json",
            str(tmp_path / "figures"),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    if done.returncode == 3:
        pytest.skip(f"{NOT_VERIFIED_HERE}: {done.stderr.strip()}")
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "figures").read_text())
    assert sum(figures["kills"].values()) == 2
    assert figures["accepted"] == figures["final reports"] == figures["events `graded`"] == 16
    assert figures["begun on the host killed for good"] >= 1
