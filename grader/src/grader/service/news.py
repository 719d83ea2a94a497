"""Tells those who watch submissions that something has happened: one look at the database for all of them."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from sqlalchemy import func, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from grader.service.database import Database
from grader.service.models import Event

# How often the database is looked at, while anybody watches.
LOOK_S = 0.1
# How often a watcher looks for itself all the same: what has been deleted makes no news.
ANYWAY_S = 15.0


@dataclass(eq=False)
class _Waiter:
    submission_id: str
    after: int
    news: asyncio.Event = field(default_factory=asyncio.Event)


class News:
    """What the watchers of one server wait for."""

    def __init__(self, database: Database) -> None:
        """Prepare; the database is looked at while somebody waits."""
        self._database = database
        self._waiters: set[_Waiter] = set()
        self._looking: asyncio.Task[None] | None = None

    async def wait(self, submission_id: str, after: int) -> None:
        """Return once there may be events behind number `after`: soon after the next, and every `ANYWAY_S` seconds."""
        waiter = _Waiter(submission_id, after)
        self._waiters.add(waiter)
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
        try:
            async with asyncio.timeout(ANYWAY_S):
                await waiter.news.wait()
        except TimeoutError:
            pass
        finally:
            self._waiters.discard(waiter)

    async def _look(self) -> None:
        while self._waiters:
            await asyncio.sleep(LOOK_S)
            ids = sorted({waiter.submission_id for waiter in self._waiters})
            try:
                newest = await asyncio.to_thread(self._newest, ids)
            except (DBAPIError, PoolTimeout):
                # Each of them meets the trouble itself, and says so to its client.
                newest = {waiter.submission_id: waiter.after + 1 for waiter in self._waiters}
            for waiter in self._waiters:
                if newest.get(waiter.submission_id, 0) > waiter.after:
                    waiter.news.set()

    def _newest(self, submission_ids: Sequence[str]) -> dict[str, int]:
        with self._database.session() as session:
            found = session.execute(
                select(Event.submission_id, func.max(Event.number))
                .where(Event.submission_id.in_(submission_ids))
                .group_by(Event.submission_id)
            )
            return dict(found.tuples().all())
