"""What Prometheus is told. `docker/grafana-dashboard.json` draws it.

Workers serve no HTTP: how long submissions waited and were graded, and how they came out, is read from the database
when somebody asks, each submission once. So these count from the start of the server, as counters of Prometheus do;
scrape one server, since each of several tells of all submissions.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from datetime import timedelta

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from grader.service.models import State, Submission, Worker, now
from grader.service.settings import Settings

_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
_HTTP_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
# A worker stamps a submission a moment before others can see it.
_LATE = timedelta(seconds=60)


class Metrics:
    """The service's measurements."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._queues: set[str] = set()
        self._since = now()
        self._counted: OrderedDict[str, None] = OrderedDict()
        self._registry = registry = CollectorRegistry()
        self.accepted = Counter("topeka_submissions", "Submissions accepted", ["lab"], registry=registry)
        self.streams = Gauge("topeka_event_streams", "Watchers of submissions right now", registry=registry)
        self.events = Counter("topeka_events_sent", "Events sent to watchers", ["kind"], registry=registry)
        self.http = Histogram(
            "topeka_http_seconds",
            "From a request to its response; of streams, to their beginning",
            ["method", "route", "status"],
            buckets=_HTTP_SECONDS,
            registry=registry,
        )
        self._depth = Gauge("topeka_queue_depth", "Submissions that wait", ["queue"], registry=registry)
        self._oldest = Gauge(
            "topeka_queue_oldest_seconds", "How long the oldest of them waits", ["queue"], registry=registry
        )
        self._running = Gauge("topeka_running", "Submissions being graded", ["queue"], registry=registry)
        self._workers = Gauge("topeka_workers", "Workers alive", registry=registry)
        self._takers = Gauge(
            "topeka_queue_workers", "Workers alive that take from a queue", ["queue"], registry=registry
        )
        self._draining = Gauge(
            "topeka_workers_draining", "Workers alive that take nothing more", registry=registry
        )
        self._waited = Histogram(
            "topeka_waiting_seconds",
            "From acceptance to the attempt that counts",
            ["queue"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._graded = Histogram(
            "topeka_grading_seconds",
            "Of the attempt that counts, to its report",
            ["queue"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._outcomes = Counter("topeka_outcomes", "Reports", ["queue", "status"], registry=registry)
        self._again = Counter(
            "topeka_attempts_repeated",
            "Attempts that did not count: workers and sandboxes that ended",
            registry=registry,
        )

    def render(self, session: Session) -> bytes:
        """Return everything in Prometheus's text format."""
        with self._lock:
            self._look_at_workers(session.scalars(select(Worker)).all())
            self._look_at_queues(session)
            self._count_finished(session)
            return generate_latest(self._registry)

    def _look_at_queues(self, session: Session) -> None:
        for queue in self._queues:  # an empty queue is a line at zero, not a gap
            for gauge in (self._depth, self._oldest, self._running):
                gauge.labels(queue).set(0)
        rows = session.execute(
            select(Submission.queue, Submission.state, func.count(), func.min(Submission.created))
            .where(Submission.state.in_((State.QUEUED, State.RUNNING)))
            .group_by(Submission.queue, Submission.state)
        )
        for queue, state, count, oldest in rows:
            self._queues.add(queue)
            if state == State.QUEUED:
                self._depth.labels(queue).set(count)
                self._oldest.labels(queue).set((now() - oldest).total_seconds())
            else:
                self._running.labels(queue).set(count)

    def _look_at_workers(self, workers: Sequence[Worker]) -> None:
        lost_after_s = self._settings.lost_after_s
        alive = [worker for worker in workers if worker.is_alive(lost_after_s)]
        self._workers.set(len(alive))
        self._draining.set(sum(worker.draining for worker in alive))
        self._queues |= {queue for worker in workers for queue in worker.queues}
        for queue in self._queues:
            self._takers.labels(queue).set(sum(w.takes_from(queue, lost_after_s) for w in alive))

    def _count_finished(self, session: Session) -> None:
        started = now()
        rows = session.execute(
            select(
                Submission.id,
                Submission.queue,
                Submission.status,
                Submission.created,
                Submission.started,
                Submission.finished,
                Submission.attempts,
            )
            .where(Submission.state == State.GRADED, Submission.finished >= self._since - _LATE)
            .order_by(Submission.finished)
        )
        for found, queue, status, created, begun, finished, attempts in rows:
            if found in self._counted or begun is None or finished is None:
                continue
            self._counted[found] = None
            self._waited.labels(queue).observe((begun - created).total_seconds())
            self._graded.labels(queue).observe((finished - begun).total_seconds())
            self._outcomes.labels(queue, status).inc()
            self._again.inc(max(0, attempts - 1))
        self._since = started
        while len(self._counted) > 100_000:
            self._counted.popitem(last=False)
