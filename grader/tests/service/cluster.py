"""A real PostgreSQL for the tests of the service; conftest.py hands its fixtures to all of them."""

import importlib.util
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from grader.service.serve import open_database
from grader.service.settings import Settings
from shared.plugin import NOT_VERIFIED_HERE

ROOT = Path(__file__).resolve().parents[3]


def script(name: str) -> ModuleType:
    """Return scripts/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def postgresql() -> Iterator[Any]:
    """A cluster whose database `topeka` has the tables, as the template of those that tests get."""
    own_postgresql = script("own_postgresql")
    try:
        cluster = own_postgresql.OwnPostgresql(fsync=False)
    except own_postgresql.NoPostgresql as error:
        pytest.skip(f"{NOT_VERIFIED_HERE}: {error}")
    try:
        open_database(Settings(database_url=cluster.url)).close()
        yield cluster
    finally:
        cluster.remove()


@pytest.fixture
def url(postgresql: Any, request: pytest.FixtureRequest) -> str:
    """URL of a database of the test's own, with tables."""
    return str(postgresql.create(f"t{zlib.crc32(request.node.name.encode()):x}", template="topeka"))
