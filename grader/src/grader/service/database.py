"""Connections to the database, and its schema brought up to date.

SQLite: one file in WAL mode, so that readers never wait for a writer; writers take the lock when they
begin, so that none finds out half-way that another was first. PostgreSQL: psycopg 3.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy
from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from filelock import FileLock
from sqlalchemy import Engine, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.orm import Session

from grader.errors import TopekaError, UsageError

# Any number that others hold no advisory lock on: the digits of "topeka" on a telephone.
_MIGRATION_LOCK = 867352


class DatabaseUnusable(TopekaError):
    """The database cannot be reached or used; the message says what was tried."""


class Database:
    """A database, and sessions on it.

    Attributes:
        url: as SQLAlchemy takes it, with the driver.
        engine: its connections.
    """

    def __init__(self, url: str) -> None:
        """Prepare connections; none is made yet.

        Raises:
            UsageError: the URL is none of SQLite or PostgreSQL.
        """
        try:
            parsed = make_url(url)
        except ArgumentError as error:
            raise UsageError(f"TOPEKA_DATABASE_URL: {error}") from error
        match parsed.get_backend_name():
            case "sqlite":
                if not parsed.database or parsed.database == ":memory:":
                    raise UsageError("TOPEKA_DATABASE_URL: SQLite needs a file, sqlite:///path/to/file")
                Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
            case "postgresql":
                parsed = parsed.set(drivername="postgresql+psycopg")
            case other:
                raise UsageError(f"TOPEKA_DATABASE_URL: {other} is neither sqlite nor postgresql")
        self.url = parsed.render_as_string(hide_password=False)
        try:
            self.engine = _engine(parsed)
        except NoSuchModuleError as error:
            raise UsageError(f"TOPEKA_DATABASE_URL: {error}") from error

    @property
    def is_sqlite(self) -> bool:
        """Whether this is one file on one machine."""
        return self.engine.dialect.name == "sqlite"

    @contextmanager
    def session(self) -> Iterator[Session]:
        """A transaction: committed at the end, rolled back if anything is raised."""
        with Session(self.engine, expire_on_commit=False) as session, session.begin():
            yield session

    def upgrade(self) -> None:
        """Bring the tables to this program's version; several programs may try at once.

        Raises:
            DatabaseUnusable: the database cannot be reached, or was made by a newer program.
        """
        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        try:
            with self._one_at_a_time(), self.engine.connect() as connection:
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
        except DBAPIError as error:
            raise DatabaseUnusable(f"the database cannot be used: {error.orig}") from error
        except CommandError as error:
            raise DatabaseUnusable(
                f"the database was made by another version of topeka: {error}; install that one or newer"
            ) from error

    @contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        if self.is_sqlite:
            with FileLock(f"{self.engine.url.database}.lock"):
                yield
            return
        with self.engine.connect() as connection:
            connection.execute(text("SELECT pg_advisory_lock(:n)"), {"n": _MIGRATION_LOCK})
            try:
                yield
            finally:
                connection.execute(text("SELECT pg_advisory_unlock(:n)"), {"n": _MIGRATION_LOCK})

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()


def _engine(url: sqlalchemy.URL) -> Engine:
    if url.get_backend_name() != "sqlite":
        return sqlalchemy.create_engine(url, pool_pre_ping=True, pool_size=10, max_overflow=10)
    engine = sqlalchemy.create_engine(url)

    @sqlalchemy.event.listens_for(engine, "connect")
    def prepare(connection: Any, _: object) -> None:
        connection.isolation_level = "IMMEDIATE"
        connection.execute("PRAGMA busy_timeout=30000")
        connection.execute("PRAGMA journal_mode=WAL")
        # An accepted submission must survive a power cut, so every commit reaches the disk.
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")

    return engine
