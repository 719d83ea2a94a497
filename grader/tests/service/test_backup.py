"""Backup and restore, on real databases, by the command."""

import os
import signal
import sqlite3
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from grader.catalog import Catalog
from grader.service import backup as backups
from grader.service.database import Database
from grader.service.models import Submission
from grader.service.serve import open_database
from grader.service.settings import Settings
from sqlalchemy import func, make_url, select, text

from .conftest import Running, url_of
from .own import RunningWorker, submit, until

Topeka = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def topeka(course: Catalog) -> Topeka:
    def run(where: str, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "grader.cli", *arguments],
            cwd=course.root,
            env=os.environ | {"TOPEKA_DATABASE_URL": where} | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


def opened(where: str) -> Database:
    return open_database(Settings(database_url=where))


def count(where: str) -> int:
    database = opened(where)
    with database.session() as session:
        found = session.scalar(select(func.count()).select_from(Submission))
    database.close()
    return found or 0


def states(where: str) -> set[tuple[str, str | None]]:
    database = opened(where)
    with database.session() as session:
        found = {(s.state, s.status) for s in session.scalars(select(Submission))}
    database.close()
    return found


def test_on_sqlite_what_was_queued_at_the_backup_is_graded_after_the_restore(
    course: Catalog, topeka: Topeka, tmp_path: Path
):
    database = opened(url_of(course))
    for n in range(2):
        submit(database, course.labs[n], name=f"learner {n}")
    file = tmp_path / "backup"
    made = topeka(url_of(course), "backup", str(file))
    assert made.returncode == 0, made.stderr
    assert file.stat().st_mode & 0o777 == 0o600
    submit(database, course.labs[0], name="too late")
    database.close()

    other = f"sqlite:///{tmp_path}/other.sqlite3"
    done = topeka(other, "restore", str(file))
    assert done.returncode == 0, done.stderr
    assert count(other) == 2
    server = Running(course, environment={"TOPEKA_DATABASE_URL": other})
    server.start()
    try:
        until(lambda: {state for state, _ in states(other)} == {"graded"})
        # The server holds what says that the database is in use.
        with pytest.raises(backups.BackupFailed, match="is in use: end `topeka serve` first"):
            backups.restore(Database(other), file, force=True)
    finally:
        assert server.end() == 0
    with pytest.raises(backups.BackupFailed, match=r"the database is not empty \(2 users\): --force"):
        backups.restore(Database(other), file)
    assert count(other) == 2
    backups.restore(Database(other), file, force=True)
    assert states(other) == {("queued", None)}


def test_on_postgresql_what_was_queued_at_the_backup_is_graded_after_the_restore(
    course: Catalog, tmp_path: Path, postgresql: Any, url: str
):
    database = opened(url)
    submitted = submit(database, course.labs[0])
    file = tmp_path / "backup"
    backups.backup(database, file)
    submit(database, course.labs[0], name="too late")

    with database.session() as session:
        session.execute(text("SELECT 1"))
        with pytest.raises(
            backups.BackupFailed, match="connections use this database: end every `topeka serve`"
        ):
            backups.restore(Database(url), file, force=True)
    database.close()
    with pytest.raises(backups.BackupFailed, match=r"the database is not empty \(2 users\): --force"):
        backups.restore(Database(url), file)
    backups.restore(Database(url), file, force=True)
    assert count(url) == 1

    empty = postgresql.create("restored")
    backups.restore(Database(empty), file)
    worker = RunningWorker(course, empty, "north").begin()
    try:
        until(lambda: states(empty) == {("graded", "verified")})
    finally:
        worker.kill()
    database = opened(empty)
    with database.session() as session:
        assert session.get_one(Submission, submitted).worker_id == "north/0"
    database.close()


def test_the_password_is_in_no_command_line():
    url = make_url("postgresql+psycopg://topeka:p%40ss@database:5433/topeka?sslmode=require")
    assert backups.for_libpq(url) == ("postgresql://topeka@database:5433/topeka?sslmode=require", "p@ss")


def test_without_the_programs_of_postgresql_a_sentence_says_what_to_install(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "backup"
    file.write_text("the old one")
    monkeypatch.setenv("PATH", "/nonexistent")
    database = Database(url)
    with pytest.raises(
        backups.BackupFailed, match=r"pg_dump is not installed here \(Debian: apt-get install"
    ):
        backups.backup(database, file)
    assert file.read_text() == "the old one", "the old backup stays when no new one can be made"
    database.close()


@pytest.fixture
def small(course: Catalog, tmp_path: Path) -> tuple[Database, Path]:
    """A database with one submission, and its backup."""
    database = opened(url_of(course))
    submit(database, course.labs[0])
    backups.backup(database, tmp_path / "backup")
    return database, tmp_path / "backup"


def rewritten(file: Path, change: Callable[[bytes], bytes]) -> Path:
    """A backup whose database was changed, and its manifest not."""
    folder = file.parent / "unpacked"
    with tarfile.open(file) as tar:
        tar.extractall(folder, filter="data")
    content = folder / "database"
    content.write_bytes(change(content.read_bytes()))
    damaged = file.with_name("damaged")
    with tarfile.open(damaged, "w") as tar:
        for name in ("manifest.json", "database"):
            tar.add(folder / name, arcname=name)
    return damaged


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda file: rewritten(file, lambda b: b[:5000] + b"x" + b[5001:]), "is damaged: its content"),
        (lambda file: rewritten(file, lambda b: b[:-4096]), "is damaged: its content"),
        (lambda file: file.with_name("short"), "is no backup of `topeka backup`, or was cut short"),
        (lambda file: Path(__file__), "is no backup of `topeka backup`"),
        (lambda file: file.with_name("nowhere"), "No such file"),
    ],
    ids=["one byte", "a page less", "cut short", "something else", "nothing"],
)
def test_a_damaged_backup_restores_nothing(
    small: tuple[Database, Path], damage: Callable[[Path], Path], words: str
):
    database, file = small
    file.with_name("short").write_bytes(file.read_bytes()[:3000])
    with pytest.raises(Exception, match=words):
        backups.restore(database, damage(file), force=True)
    with database.session() as session:
        assert session.scalar(select(func.count()).select_from(Submission)) == 1
    assert not list(Path(str(database.engine.url.database)).parent.glob(".restore-*"))


def test_a_damaged_database_is_not_backed_up(small: tuple[Database, Path]):
    database, file = small
    name = str(database.engine.url.database)
    database.close()
    with sqlite3.connect(name) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        root = connection.execute(
            "SELECT rootpage FROM sqlite_schema WHERE name = 'ix_submissions_created'"
        ).fetchone()
        size = connection.execute("PRAGMA page_size").fetchone()[0]
    connection.close()
    with Path(name).open("r+b") as stream:
        stream.seek((root[0] - 1) * size)
        stream.write(b"\0" * size)
    before = file.read_bytes()
    with pytest.raises(backups.BackupFailed, match="the database is damaged"):
        backups.backup(Database(f"sqlite:///{name}"), file)
    assert file.read_bytes() == before
    assert [f.name for f in file.parent.iterdir() if f.name.startswith(".backup")] == []


def test_a_backup_of_another_kind_of_database_is_refused(
    small: tuple[Database, Path],
    url: str,
):
    other = Database(url)
    with pytest.raises(backups.BackupFailed, match="was made from sqlite, and this database is postgresql"):
        backups.restore(other, small[1], force=True)
    other.close()


def test_a_restore_killed_half_way_leaves_the_old_content(
    course: Catalog,
    postgresql: Any,
    url: str,
    tmp_path: Path,
):
    database = opened(url)
    for n in range(30):
        submit(database, course.labs[0], name=f"learner {n}")
    backups.backup(database, tmp_path / "backup")
    submit(database, course.labs[0], name="one more")
    database.close()
    command = [sys.executable, "-m", "grader.cli", "restore", str(tmp_path / "backup"), "--force"]
    watcher = Database(url)
    with subprocess.Popen(
        command, cwd=course.root, env=os.environ | {"TOPEKA_DATABASE_URL": url}, start_new_session=True
    ) as restoring:
        deadline = time.monotonic() + 60
        pids: list[int] = []
        # From outside, since a connection to the database itself is one that the restore refuses.
        outside = Database(postgresql.url)
        while not pids and restoring.poll() is None and time.monotonic() < deadline:
            with outside.engine.connect() as connection:
                found = connection.execute(
                    text(
                        "SELECT pid FROM pg_stat_activity WHERE application_name = 'pg_restore' AND datname = :name"
                    ),
                    {"name": watcher.engine.url.database},
                )
                pids = [row[0] for row in found]
        assert pids, "pg_restore was seen at work"
        os.killpg(restoring.pid, signal.SIGKILL)
    outside.close()
    # Either it had not committed, and everything is old, or it had, and everything is new; never half.
    assert count(url) in (30, 31)
    rows = opened(url)
    with rows.session() as session:
        ids = set(session.scalars(select(Submission.id)))
        queued = set(session.scalars(text("SELECT workflow_uuid FROM dbos.workflow_status")))
    assert ids == queued
    rows.close()
    watcher.close()
