"""Two workers must not have one id at a time: the queue would give the work of one to the other.

The claim ends with the program that holds it, however that ends: on SQLite it is a lock on a file, on PostgreSQL an
advisory lock of a connection that stays open.
"""

import contextlib
import hashlib

from filelock import FileLock, Timeout
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from grader.service.database import Database


class Claim:
    """A worker's claim on its id."""

    def __init__(self, database: Database, worker_id: str) -> None:
        """Prepare; nothing is claimed yet.

        Args:
            database: where the queue is.
            worker_id: to be claimed.
        """
        self._database = database
        digest = hashlib.sha256(f"topeka worker {worker_id}".encode()).digest()
        self._number = int.from_bytes(digest[:8], "big", signed=True)
        self._file: FileLock | None = None
        self._connection: Connection | None = None
        if database.is_sqlite:
            self._file = FileLock(f"{database.engine.url.database}.{digest.hex()[:12]}.worker")

    def take(self) -> bool:
        """Claim the id; False if another program has it.

        Raises:
            DBAPIError: the database does not answer.
        """
        if self._file is not None:
            try:
                self._file.acquire(timeout=0)
            except Timeout:
                return False
            return True
        self.release()
        connection = self._database.engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        try:
            # A machine that vanishes without a word loses its claim within half a minute.
            for name, seconds in (("idle", 10), ("interval", 5), ("count", 4)):
                connection.execute(text(f"SET tcp_keepalives_{name} = {seconds}"))
            taken = connection.scalar(text("SELECT pg_try_advisory_lock(:n)"), {"n": self._number})
        except DBAPIError:
            connection.invalidate()
            connection.close()
            raise
        self._connection = connection
        if not taken:
            self.release()
        return bool(taken)

    def keep(self) -> bool:
        """Whether the id is still ours; claims it again where the database was restarted meanwhile.

        Raises:
            DBAPIError: the database does not answer.
        """
        if self._file is not None:
            return True
        if self._connection is not None:
            with contextlib.suppress(DBAPIError):
                self._connection.execute(text("SELECT 1"))
                return True
        return self.take()

    def release(self) -> None:
        """Give the id up."""
        if self._file is not None:
            self._file.release()
        if self._connection is not None:
            connection, self._connection = self._connection, None
            with contextlib.suppress(DBAPIError):
                connection.invalidate()  # closes it, and with it the lock
                connection.close()
