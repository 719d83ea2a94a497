"""The durable queue: the only module that knows DBOS Transact.

A submission's work is a DBOS workflow whose id is the submission's, so it cannot be queued twice. It is enqueued in
the transaction that stores the submission. A worker is a DBOS executor with a stable id: after a crash it takes
up what it had begun. The work of a worker that never comes back is resumed on its queue by whoever notices
(`requeue_of`). A workflow may therefore run more than once; `submissions` makes sure that one report counts.
"""

import math
import threading
from collections.abc import Callable, Sequence

from dbos import DBOS, DBOSClient
from sqlalchemy.orm import Session

from grader.service.database import Database

# Every worker runs the same workflow, whatever release it is from: work waits for any of them.
APPLICATION, VERSION = "topeka", "1"
_WORKFLOW = "grade_submission"
# How often an idle worker looks, on one machine and on many: each look costs a query, and nobody notices the wait
# where tests take seconds, as in every queue but the first.
POLL_S, POLL_MANY_S, FIRST_QUEUE, POLL_OTHERS_S = 0.2, 0.1, "cpu", 1.0


def prepare(database: Database) -> None:
    """Create or migrate DBOS's own tables, beside ours in the same database."""
    DBOS.migrate(database.url)


class WorkQueue:
    """What the server does with the queue: put work in, take it out, look at it."""

    def __init__(self, database: Database) -> None:
        """Connect; `prepare` has been called."""
        # Whoever asks has a better idea of how long to wait for a database than the client, which waits for ever.
        self._client = DBOSClient(
            system_database_engine=database.engine,
            application_name=APPLICATION,
            lazy=True,
            retry_connection_errors=False,
        )

    def put(self, session: Session, submission_id: str, queue: str) -> None:
        """Enqueue the submission in the transaction of `session`."""
        self._client.enqueue_in_transaction(
            session,
            {
                "queue_name": queue,
                "workflow_name": _WORKFLOW,
                "workflow_id": submission_id,
                "app_version": VERSION,
                "application_name": APPLICATION,
            },
            submission_id,
        )

    def cancel(self, submission_id: str) -> None:
        """Take the submission out, if it still waits."""
        self._client.cancel_workflow(submission_id)

    def depth(self) -> dict[str, int]:
        """Return how many submissions wait, by queue."""
        waiting = self._client.list_workflows(
            status="ENQUEUED", name=_WORKFLOW, load_input=False, load_output=False
        )
        found: dict[str, int] = {}
        for workflow in waiting:
            found[workflow.queue_name or ""] = found.get(workflow.queue_name or "", 0) + 1
        return found

    def requeue_of(
        self, worker_ids: Sequence[str], queue_of_submission: Callable[[str], str | None]
    ) -> list[str]:
        """Put back what lost workers had begun, each on the queue it came from.

        Args:
            worker_ids: of the lost ones.
            queue_of_submission: by its id; None if there is no such submission any more.

        Returns:
            ids of the submissions put back.
        """
        if not worker_ids:
            return []
        begun = self._client.list_workflows(
            status="PENDING",
            name=_WORKFLOW,
            executor_id=list(worker_ids),
            load_input=False,
            load_output=False,
        )
        back = []
        for workflow in begun:
            if queue := queue_of_submission(workflow.workflow_id):
                self._client.resume_workflow(workflow.workflow_id, queue_name=queue)
                back.append(workflow.workflow_id)
        return back

    def put_back(self, submission_id: str, queue: str) -> None:
        """Put the submission on a queue again, whoever had taken it; no effect once its work has ended."""
        self._client.resume_workflow(submission_id, queue_name=queue)

    def ended(self, submission_ids: Sequence[str]) -> set[str]:
        """Return those of the submissions whose work nobody will do any more: it ended, or there is none."""
        live = self._client.list_workflows(
            workflow_ids=list(submission_ids),
            status=["ENQUEUED", "PENDING", "DELAYED"],
            load_input=False,
            load_output=False,
        )
        return set(submission_ids) - {workflow.workflow_id for workflow in live}

    def forget(self, submission_ids: Sequence[str]) -> None:
        """Delete what the queue knows of submissions whose work has ended."""
        if submission_ids:
            self._client.delete_workflows(list(submission_ids))

    def close(self) -> None:
        """Disconnect."""
        self._client.destroy()


class Consumer:
    """What a worker does with the queue: take one submission after the other. One in a process."""

    def __init__(
        self, database: Database, worker_id: str, queues: Sequence[str], work: Callable[[str], None]
    ) -> None:
        """Set up, without taking anything yet.

        Args:
            database: where the queue is; `prepare` has been called.
            worker_id: stable over restarts, unique among living workers.
            queues: what this machine can verify.
            work: called with the id of each submission, in a thread; never two at a time. What it raises ends the
                submission's work, so it raises nothing.
        """
        self._queues, self._work = tuple(queues), work
        self._poll_s = POLL_S if database.is_sqlite else POLL_MANY_S
        self._one_at_a_time = threading.Lock()
        DBOS(
            config={
                "name": APPLICATION,
                "system_database_engine": database.engine,
                "system_database_url": database.url,
                "executor_id": worker_id,
                "application_version": VERSION,
                "run_migrations": False,
                "enable_otlp": False,
                "log_level": "WARNING",
                "notification_listener_polling_interval_sec": 1.0,
            }
        )
        DBOS.listen_queues(self._queues)

        @DBOS.workflow(name=_WORKFLOW)
        def grade_submission(submission_id: str) -> None:
            with self._one_at_a_time:
                DBOS.run_step({"name": "grade"}, self._work, submission_id)

    def start(self) -> None:
        """Begin to take submissions; first those that a worker of this id had begun."""
        DBOS.launch()
        for queue in self._queues:
            DBOS.register_queue(
                queue,
                worker_concurrency=1,
                polling_interval_sec=self._poll_s if queue == FIRST_QUEUE else POLL_OTHERS_S,
                on_conflict="always_update",
            )

    def stop(self, drain_s: float) -> None:
        """Take nothing more, and give what has begun `drain_s` seconds to end."""
        DBOS.destroy(destroy_registry=True, workflow_completion_timeout_sec=math.ceil(drain_s))
