"""Recognises known misconceptions by which tests fail, and with which wrong numbers.

Tests are seeded, so two programs with the same mistake print the same wrong values. The
signature of a misconception maps each test it fails to a fingerprint of the failure's message;
`topeka check --write` makes them by running the misconceptions, and keeps them in the lab's
`signatures.json`.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from grader.catalog import Lab
from grader.report import Diagnosis, Outcome, TestResult

Signature = Mapping[str, str]

# Below this likeness the failures are the learner's own, and a hint would mislead.
THRESHOLD = 0.7
# Two tests may fail for one reason with different numbers: failing alike counts this much.
_SAME_TEST = 0.4

_NUMBER = re.compile(r"[-+]?(?:\d+\.\d*|\.\d+|\d+)(?:e[-+]?\d+)?")
_ADDRESS = re.compile(r"0x[0-9a-f]+")
# Each job has a folder of its own, and messages may name files in it.
_WORK_FOLDER = re.compile(r"[^\s'\"]*/topeka-job-\d+-\w+/")
_FRAME = re.compile(r'^ {2}File ".*$\n^ {4}.*$\n?', re.MULTILINE)


def signature(tests: Sequence[TestResult]) -> dict[str, str]:
    """Return the failing tests, each with a fingerprint of its message."""
    return {t.name: fingerprint(t.message) for t in tests if t.outcome in (Outcome.FAILED, Outcome.ERROR)}


def fingerprint(message: str) -> str:
    """Return a short hash of `message` without code positions and work folders, its numbers rounded to two digits."""
    for varies in (_FRAME, _WORK_FOLDER, _ADDRESS):
        message = varies.sub("", message)
    text = _NUMBER.sub(lambda m: f"{float(m.group()):.1e}", message)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def likeness(failures: Signature, known: Signature) -> float:
    """Return from 0 to 1 how alike two sets of failures are."""
    tests = failures.keys() | known.keys()
    if not tests:
        return 0.0
    both = failures.keys() & known.keys()
    return sum(1.0 if failures[t] == known[t] else _SAME_TEST for t in both) / len(tests)


def diagnose(
    tests: Sequence[TestResult], signatures: Mapping[str, Signature], hints: Mapping[str, str]
) -> Diagnosis | None:
    """Return the misconception that the failures look most like, if one is close enough.

    Tests that ran into code not yet written say nothing about a misconception and are left out
    on both sides.

    Args:
        tests: every test with its outcome.
        signatures: of each known misconception.
        hints: of each known misconception.
    """
    ran = {t.name for t in tests if t.outcome in (Outcome.PASSED, Outcome.FAILED, Outcome.ERROR)}
    failures = signature(tests)
    if not failures:
        return None
    best: tuple[float, str] = (0.0, "")
    for name, known in signatures.items():
        visible = {test: mark for test, mark in known.items() if test in ran}
        best = max(best, (likeness(failures, visible), name))
    score, name = best
    if score < THRESHOLD or name not in hints:
        return None
    return Diagnosis(misconception=name, hint=hints[name], likeness=round(score, 3))


def signatures_file(lab: Lab) -> Path:
    """Return where the lab's signatures are kept."""
    return lab.path / "signatures.json"


def read_signatures(lab: Lab) -> dict[str, dict[str, str]]:
    """Return the lab's signatures by misconception; empty if there are none yet."""
    try:
        document = json.loads(signatures_file(lab).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return {name: dict(tests) for name, tests in document["misconceptions"].items()}


def write_signatures(lab: Lab, signatures: Mapping[str, Signature]) -> None:
    """Write the lab's signatures, all or nothing."""
    file = signatures_file(lab)
    text = json.dumps({"misconceptions": signatures}, indent=1, sort_keys=True) + "\n"
    handle, name = tempfile.mkstemp(dir=file.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        stream.write(text)
    Path(name).chmod(0o644)
    Path(name).replace(file)
