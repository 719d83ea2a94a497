"""The exact set of tests a lab must pass: what pytest collects with the course's own solution.

Collecting takes a fork, so the answer is kept in `.topeka/cache/` under a hash of everything it
depends on.
"""

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from grader.catalog import Catalog, Lab
from grader.runner.protocol import Job, Limits
from grader.sandbox import Isolation, Sandbox, SandboxFailed
from grader.submission import pack, read_code


class ExpectedTest(BaseModel):
    """One test of the expected set.

    Attributes:
        name: below the lab's folder.
        slow: whether it runs only with `--slow`.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    slow: bool


_TESTS = TypeAdapter(tuple[ExpectedTest, ...])


def expected_tests(
    catalog: Catalog, lab: Lab, sandbox: Callable[[], Sandbox], cache: Path | None
) -> tuple[ExpectedTest, ...]:
    """Return the lab's tests in order.

    Args:
        catalog: the course.
        lab: the lab.
        sandbox: gives a sandbox to collect in; called only if the cache has no answer.
        cache: folder for answers; None or a read-only folder means none are kept.

    Raises:
        SandboxFailed: the tests cannot be collected even with the solution.
    """
    kept = None
    if cache:
        kept = (
            cache / f"{lab.path.parent.name}-{lab.path.name}-{_key(catalog, lab, sandbox().isolation)}.json"
        )
    if kept is not None:
        try:
            return _TESTS.validate_json(kept.read_bytes())
        except (OSError, ValidationError):
            pass  # not there, or left half-written by another version: collect again
    tests = _collect(catalog, lab, sandbox())
    if kept is not None:
        _keep(kept, tests)
    return tests


def _collect(catalog: Catalog, lab: Lab, sandbox: Sandbox) -> tuple[ExpectedTest, ...]:
    job = Job(
        id=f"collect-{lab.id}",
        folder=f"{lab.path.parent.name}/{lab.path.name}",
        mode="collect",
        preload=lab.preload,
        limits=Limits(timeout_s=120.0, memory_bytes=None),
    )
    tests: tuple[ExpectedTest, ...] | None = None
    problems: list[str] = []
    for event in sandbox.run(job, pack(catalog, lab, read_code(lab, lab.path / "solutions"))):
        if event["event"] == "collected":
            tests = _TESTS.validate_python(event["tests"])
        elif event["event"] == "collect_error":
            problems.append(str(event["message"]))
        elif event["event"] == "finished":
            if event["end"] != "exited":
                problems.append(f"collecting ended with {event['end']}")
            elif tests is None and not problems:
                problems.append(
                    f"pytest ended with exit status {event['code']}{_last_words(event['output'])}"
                )
    if not tests or problems:
        raise SandboxFailed(
            f"the tests of {lab.id} cannot be collected: {'; '.join(problems) or 'none found'}"
        )
    return tests


def _last_words(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    # What follows pytest's own error are errors that come of it.
    mark = "INTERNALERROR> "
    lines = [line.removeprefix(mark) for line in lines if line.startswith(mark)] or lines
    return f": {lines[-1]}" if lines else ""


def _key(catalog: Catalog, lab: Lab, place: Isolation) -> str:
    import shared

    # An image stands for everything in it; here the interpreter does.
    environment = place.image_digest or platform.python_version()
    digest = hashlib.sha256(f"{environment} {lab!r}".encode())
    folders = [lab.path / "tests", lab.path / "solutions", Path(shared.__file__).parent]
    files = [f for folder in folders for f in sorted(folder.rglob("*.py"))]
    for file in [catalog.root / "pyproject.toml", *files]:
        digest.update(file.name.encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _keep(file: Path, tests: tuple[ExpectedTest, ...]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        for old in file.parent.glob(f"{file.name.rsplit('-', 1)[0]}-*.json"):
            old.unlink(missing_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent)
        with os.fdopen(handle, "wb") as stream:
            stream.write(json.dumps([t.model_dump() for t in tests]).encode())
        Path(name).replace(file)
    except OSError:
        return  # a read-only checkout grades as well, a little slower
