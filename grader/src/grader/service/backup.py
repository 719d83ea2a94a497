"""Backup and restore of everything the service knows: users, submissions, reports, and the queue.

A backup is one file: a tar with `manifest.json` (format, kind of database, schema, rows of every table, SHA-256 of the
rest) and the database, as SQLite's file or as PostgreSQL's `pg_dump` makes it. It is a snapshot of one moment, taken
while the service runs. What was queued or half graded then is graded after a restore.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy
from filelock import FileLock, Timeout
from sqlalchemy import Connection, inspect, text
from sqlalchemy.exc import DBAPIError

from grader.errors import TopekaError, UsageError
from grader.service.database import Database

FORMAT = 1
_MANIFEST, _CONTENT = "manifest.json", "database"


class BackupFailed(TopekaError):
    """No backup was made, or nothing was restored; the message says why."""


@dataclass(frozen=True)
class Manifest:
    """What a backup says about itself.

    Attributes:
        format: of the file.
        backend: `sqlite` or `postgresql`.
        schema: the revision of our tables.
        created: when, ISO 8601.
        sha256: of the database in it.
        rows: by table.
    """

    format: int
    backend: str
    schema: str
    created: str
    sha256: str
    rows: dict[str, int]


def backup(database: Database, file: Path) -> Manifest:
    """Write a backup to `file`, which appears only once it is whole and was checked.

    Raises:
        BackupFailed: the database is damaged, or `pg_dump` is missing or failed.
        UsageError: the file cannot be written there.
    """
    try:
        folder = tempfile.mkdtemp(dir=file.resolve().parent, prefix=f".{file.name}.")
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}") from error
    try:
        content = Path(folder) / _CONTENT
        rows, schema = (_dump_sqlite if database.is_sqlite else _dump_postgresql)(database, content)
        manifest = Manifest(
            format=FORMAT,
            backend=database.engine.dialect.name,
            schema=schema,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            sha256=_sha256(content),
            rows=rows,
        )
        (Path(folder) / _MANIFEST).write_text(json.dumps(vars(manifest), indent=2) + "\n")
        whole = Path(folder) / "whole"
        with tarfile.open(whole, "w") as tar:
            for name in (_MANIFEST, _CONTENT):
                tar.add(Path(folder) / name, arcname=name)
        whole.chmod(0o600)  # learners' code and the digests of tokens
        with whole.open("rb") as stream:
            os.fsync(stream.fileno())
        whole.replace(file)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return manifest


def restore(database: Database, file: Path, *, force: bool = False) -> Manifest:
    """Put the content of a backup into the database, all of it or nothing.

    Args:
        database: nobody else uses it meanwhile.
        file: made by `backup`, from the same kind of database.
        force: whether what is in the database may be lost.

    Raises:
        BackupFailed: the file is damaged or no backup, or the database is in use, not empty or of another kind.
        UsageError: the file cannot be read.
    """
    folder = Path(database.engine.url.database or "").resolve().parent if database.is_sqlite else None
    # Connections of one's own that lie idle would look like somebody else's.
    with contextlib.closing(database), tempfile.TemporaryDirectory(dir=folder, prefix=".restore-") as place:
        database.close()
        manifest, content = _unpacked(file, Path(place))
        if manifest.backend != database.engine.dialect.name:
            raise BackupFailed(
                f"{file} was made from {manifest.backend}, and this database is {database.engine.dialect.name}: "
                "restore it into the kind it came from"
            )
        if database.is_sqlite:
            _restore_sqlite(database, manifest, content, force)
        else:
            _restore_postgresql(database, manifest, content, force)
    return manifest


def _unpacked(file: Path, folder: Path) -> tuple[Manifest, Path]:
    try:
        with tarfile.open(file) as tar:
            for name in (_MANIFEST, _CONTENT):
                source = tar.extractfile(name)
                assert source is not None
                with (folder / name).open("wb") as target:
                    shutil.copyfileobj(source, target)
        manifest = Manifest(**json.loads((folder / _MANIFEST).read_text()))
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror or error}") from error
    except (tarfile.TarError, KeyError, ValueError, TypeError, AssertionError) as error:
        raise BackupFailed(
            f"{file} is no backup of `topeka backup`, or was cut short: nothing was restored"
        ) from error
    if manifest.format != FORMAT:
        raise BackupFailed(
            f"{file} has format {manifest.format}, this topeka reads {FORMAT}: use the one that made it"
        )
    if _sha256(folder / _CONTENT) != manifest.sha256:
        raise BackupFailed(
            f"{file} is damaged: its content is not what its manifest says (SHA-256); nothing was restored"
        )
    return manifest, folder / _CONTENT


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _rows(connection: Connection) -> dict[str, int]:
    """Count the rows of every table, ours and the queue's."""
    found: dict[str, int] = {}
    inspector = inspect(connection)
    for schema in [None] if connection.dialect.name == "sqlite" else ["public", "dbos"]:
        for table in sorted(inspector.get_table_names(schema=schema)):
            counted = sqlalchemy.select(sqlalchemy.func.count()).select_from(
                sqlalchemy.table(table, schema=schema)
            )
            found[f"{schema}.{table}" if schema else table] = connection.scalar(counted) or 0
    return found


def _refuse_unless_empty(connection: Connection, force: bool) -> None:
    if force or not inspect(connection).has_table("users"):
        return
    for table in ("users", "submissions"):
        if count := connection.scalar(text(f"SELECT count(*) FROM {table}")):
            raise BackupFailed(
                f"the database is not empty ({count} {table}): --force replaces all of it, for good"
            )


# --- SQLite ---------------------------------------------------------------------------------------


def _dump_sqlite(database: Database, content: Path) -> tuple[dict[str, int], str]:
    source = sqlite3.connect(f"file:{database.engine.url.database}?mode=ro", uri=True, timeout=30)
    with contextlib.closing(source), contextlib.closing(sqlite3.connect(content)) as target:
        source.backup(target)  # the online backup: a snapshot, whoever writes meanwhile
        target.execute("PRAGMA journal_mode=DELETE")
    return _examined(content)


def _examined(file: Path) -> tuple[dict[str, int], str]:
    """Return the rows and the schema of a SQLite file, after SQLite has looked at every page of it."""
    engine = sqlalchemy.create_engine(f"sqlite:///{file}")
    try:
        with engine.connect() as connection:
            said = connection.scalars(text("PRAGMA integrity_check")).all()
            if said != ["ok"]:
                raise BackupFailed(f"the database is damaged, SQLite says: {said[0]}")
            if broken := connection.execute(text("PRAGMA foreign_key_check")).all():
                raise BackupFailed(
                    f"the database is damaged: {len(broken)} rows name others that are not there"
                )
            schema = connection.scalar(text("SELECT version_num FROM alembic_version"))
            return _rows(connection), str(schema)
    except DBAPIError as error:
        raise BackupFailed(f"the database is damaged: {error.orig}") from error
    finally:
        engine.dispose()


def _restore_sqlite(database: Database, manifest: Manifest, content: Path, force: bool) -> None:
    rows, _ = _examined(content)
    if rows != manifest.rows:
        raise BackupFailed(
            "the backup is damaged: its tables do not have the rows of its manifest; nothing was restored"
        )
    file = Path(str(database.engine.url.database))
    with _not_in_use(file):
        if file.exists():
            with database.engine.connect() as connection:
                _refuse_unless_empty(connection, force)
            database.close()
        with content.open("rb") as stream:
            os.fsync(stream.fileno())
        # A log of the old database must not be applied to the new one.
        for suffix in ("-wal", "-shm"):
            Path(f"{file}{suffix}").unlink(missing_ok=True)
        content.replace(file)


@contextlib.contextmanager
def _not_in_use(file: Path) -> Iterator[None]:
    """Hold what a server with its worker holds while it runs."""
    with contextlib.ExitStack() as held:
        for lock in file.parent.glob(f"{file.name}.*.worker"):
            try:
                held.enter_context(FileLock(lock, timeout=0))
            except Timeout as error:
                raise BackupFailed(f"{file} is in use: end `topeka serve` first, then restore") from error
        yield


# --- PostgreSQL -----------------------------------------------------------------------------------


def _dump_postgresql(database: Database, content: Path) -> tuple[dict[str, int], str]:
    with database.engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
        # pg_dump sees the very moment in which the rows are counted.
        snapshot = connection.scalar(text("SELECT pg_export_snapshot()"))
        rows = _rows(connection)
        schema = connection.scalar(text("SELECT version_num FROM alembic_version"))
        _run(
            database,
            "pg_dump",
            "--format=custom",
            "--no-owner",
            f"--snapshot={snapshot}",
            f"--file={content}",
        )
    listed = _run(None, "pg_restore", "--list", str(content))
    for table in rows:
        schema_name, _, name = table.partition(".")
        if f"TABLE DATA {schema_name} {name} " not in listed:
            raise BackupFailed(f"pg_dump has left out the table {table}")
    return rows, str(schema)


def _restore_postgresql(database: Database, manifest: Manifest, content: Path, force: bool) -> None:
    with database.engine.connect() as connection:
        others = connection.scalar(
            text(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        )
        if others:
            raise BackupFailed(
                f"{others} other connections use this database: end every `topeka serve` and `topeka worker` first"
            )
        _refuse_unless_empty(connection, force)
    database.close()
    # One transaction: interrupted at any moment, the database is as it was before.
    _run(
        database,
        "pg_restore",
        "--single-transaction",
        "--exit-on-error",
        "--no-owner",
        "--clean",
        "--if-exists",
        str(content),
    )
    with database.engine.connect() as connection:
        if (rows := _rows(connection)) != manifest.rows:
            wrong = sorted(
                t for t in rows.keys() | manifest.rows.keys() if rows.get(t) != manifest.rows.get(t)
            )
            raise BackupFailed(
                f"restored, but these tables do not have the rows of the manifest: {', '.join(wrong)}"
            )


def for_libpq(url: sqlalchemy.URL) -> tuple[str, str | None]:
    """Return a URL as PostgreSQL's own programs take it, without the password, and the password."""
    bare = sqlalchemy.URL.create(
        "postgresql", url.username, None, url.host, url.port, url.database, url.query
    )
    return bare.render_as_string(hide_password=False), url.password


def _run(database: Database | None, program: str, *arguments: str) -> str:
    """Run one of PostgreSQL's programs; the password goes by the environment, which others cannot read."""
    if shutil.which(program) is None:
        raise BackupFailed(
            f"{program} is not installed here (Debian: apt-get install postgresql-client); it must be at least "
            "as new as the server"
        )
    environment: dict[str, Any] = dict(os.environ)
    options: list[str] = []
    if database is not None:
        url, password = for_libpq(database.engine.url)
        options = ["--dbname", url]
        if password is not None:
            environment["PGPASSWORD"] = password
    done = subprocess.run(
        [program, *options, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise BackupFailed(f"{program} failed: {said[0]}")
    return done.stdout
