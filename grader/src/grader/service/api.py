"""The HTTP interface, under /api/v1. Whoever asks shows a token: `Authorization: Bearer topeka_...`.

Learners see their own work, instructors the class. What somebody may not see does not exist for them: 404.
"""

import asyncio
import base64
import csv
import io
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from sqlalchemy import select
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session
from sse_starlette import EventSourceResponse, ServerSentEvent

from grader.catalog import Catalog, Lab
from grader.errors import UsageError
from grader.service import accounts, dashboard, problems, records, submissions
from grader.service.accounts import Identity
from grader.service.dashboard import sessions
from grader.service.database import Database
from grader.service.hardware import queue_of
from grader.service.metrics import Metrics
from grader.service.models import FINAL, Report, State, Submission, User, Worker
from grader.service.news import News
from grader.service.problems import Problem, documented
from grader.service.records import best, visible
from grader.service.settings import Settings
from grader.service.waiting import waiting
from grader.service.work_queue import WorkQueue

_LAB_ID = r"^ch\d\d/lab\d\d$"
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
# More than any lab has files.
_MAX_PARTS = 20


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True)


class WaitingAnswer(_Answer):
    """What a submission waits for."""

    needs: str = Field(description="what a machine must have to verify the lab; empty if any can")
    workers: int = Field(description="alive that take such work; with none it waits until one comes")
    ahead: int = Field(description="submissions of the same queue before this one")


class SubmissionAnswer(_Answer):
    """A submission, without its code and report."""

    id: str
    user: str
    lab: str
    state: State
    status: str | None = Field(description="of the report: verified, failed and so on; null before")
    passed: int | None
    tests: int | None
    created: datetime
    started: datetime | None
    finished: datetime | None
    worker: str | None
    attempts: int
    regrade_of: str | None
    waiting: WaitingAnswer | None = Field(
        default=None, description="while it is queued, and in the answer about this one submission only"
    )


class SubmitRequest(BaseModel):
    """Code to grade."""

    model_config = ConfigDict(extra="forbid")

    lab: str = Field(pattern=_LAB_ID, examples=["ch01/lab01"])
    files: dict[str, str] = Field(description="each of the lab's source files by name, in base64")
    slow: bool = Field(default=False, description="run tests marked slow too")


@dataclass(frozen=True)
class _Code:
    """What both forms of a submission come to."""

    lab: str
    files: dict[str, bytes]
    slow: bool


class LabAnswer(_Answer):
    """A lab of the catalogue, and how far the asker is with it."""

    id: str
    title: str
    summary: str
    stack: str
    minutes: int
    planned: bool
    files: tuple[str, ...]
    status: str | None = Field(
        description="the best so far: verified if any submission was; null without one"
    )


class ChapterAnswer(_Answer):
    """A chapter of the catalogue."""

    id: str
    title: str
    phase: str
    summary: str
    labs: tuple[LabAnswer, ...]


class GradebookRow(_Answer):
    """One learner's labs."""

    user: str
    verified: int
    labs: dict[str, str]


class WorkerAnswer(_Answer):
    """A worker."""

    id: str
    host: str
    queues: list[str]
    seen: datetime
    alive: bool
    draining: bool
    graded: int


class Health(_Answer):
    """Whether the service works."""

    status: Literal["ok"]
    workers: int = Field(description="alive")


class Service:
    """What the routes need."""

    def __init__(self, database: Database, settings: Settings, catalog: Catalog, queue: WorkQueue) -> None:
        self.database, self.settings, self.catalog, self.queue = database, settings, catalog, queue
        self.labs = {lab.id: lab for lab in catalog.labs}
        self.limiter = MovingWindowRateLimiter(MemoryStorage())
        self.metrics = Metrics(settings)
        self.news = News(database)


def create_app(service: Service) -> FastAPI:
    """Return the application."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.queue.close()

    app = FastAPI(
        title="Topeka's grader",
        version="1",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.service = service
    problems.install(app)
    app.include_router(_routes(service), prefix="/api/v1")
    dashboard.install(app, service)

    @app.middleware("http")
    async def guard(request: Request, call_next: Any) -> Response:
        length = request.headers.get("content-length", "")
        if request.method in ("POST", "PUT", "PATCH"):
            if not length.isdigit():
                return problems.problem(411, "say how long the request is: Content-Length")
            if int(length) > service.settings.max_request_bytes:
                return problems.problem(
                    413, f"a request may have {service.settings.max_request_bytes:,} bytes"
                )
        started = time.monotonic()
        response: Response = await call_next(request)
        # The route's template, since ids would make a series each.
        route = getattr(request.scope.get("route"), "path", "none")
        # Nor can clients make series by methods that they think up.
        method = request.method if request.method in _METHODS else "other"
        service.metrics.http.labels(method, route, response.status_code).observe(time.monotonic() - started)
        response.headers.setdefault("X-Content-Type-Options", "nosniff")
        response.headers.setdefault("Referrer-Policy", "no-referrer")
        response.headers.setdefault("X-Frame-Options", "DENY")
        response.headers.setdefault("Content-Security-Policy", "default-src 'self'; frame-ancestors 'none'")
        response.headers.setdefault("Cache-Control", "no-store")
        return response

    return app


def _routes(service: Service) -> APIRouter:
    router = APIRouter()
    bearer = HTTPBearer(auto_error=False, description="a token of `topeka token create`")

    def session() -> Iterator[Session]:
        with service.database.session() as opened:
            yield opened

    # Committed before the response leaves: what a client is told has happened.
    Transaction = Annotated[Session, Depends(session, scope="function")]

    def who(
        request: Request,
        opened: Transaction,
        shown: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
    ) -> Identity:
        if shown:
            found = accounts.identify(opened, shown.credentials)
        else:  # a page of the dashboard asks
            visitor = sessions.visitor(opened, request, service.settings)
            found = visitor.identity if visitor else None
        if found is None:
            raise Problem(
                401,
                "show a valid token: Authorization: Bearer topeka_...; `topeka token create NAME` makes one",
                {"WWW-Authenticate": "Bearer"},
            )
        return found

    Asker = Annotated[Identity, Depends(who)]

    def teacher(asker: Asker) -> Identity:
        if not asker.teaches:
            raise Problem(403, "only instructors may see this")
        return asker

    Teacher = Annotated[Identity, Depends(teacher)]
    SubmissionId = Annotated[str, Depends(_submission_id)]

    def answer(opened: Session, found: Submission) -> SubmissionAnswer:
        return SubmissionAnswer(
            id=found.id,
            user=opened.get_one(User, found.user_id).name,
            lab=found.lab,
            state=State(found.state),
            status=found.status,
            passed=found.passed,
            tests=found.tests,
            created=found.created,
            started=found.started,
            finished=found.finished,
            worker=found.worker_id,
            attempts=found.attempts,
            regrade_of=found.regrade_of,
        )

    def accept(
        opened: Session, user_id: str, lab: Lab, code: dict[str, bytes], slow: bool, regrade_of: str | None
    ) -> tuple[Submission, bool]:
        found, new = submissions.submit(
            opened,
            user_id,
            lab,
            queue_of(lab),
            code,
            slow=slow,
            duplicate_window_s=service.settings.duplicate_window_s,
            enqueue=lambda submission_id, queue: service.queue.put(opened, submission_id, queue),
            regrade_of=regrade_of,
        )
        if new:
            service.metrics.accepted.labels(lab.id).inc()
        return found, new

    @router.post(
        "/submissions",
        status_code=201,
        responses={
            200: {"description": "the same content again", "model": SubmissionAnswer},
            201: {"links": _LINKS},
            **documented(400, 401, 404, 411, 413, 415, 422, 429),
        },
        openapi_extra={"requestBody": _SUBMIT_BODY},
    )
    def submit(
        code: Annotated[_Code, Depends(_read_code)], opened: Transaction, asker: Asker, response: Response
    ) -> SubmissionAnswer:
        """Submit code for a lab. The same content within a minute is the same submission."""
        limit = RateLimitItemPerMinute(service.settings.submissions_per_minute)
        if not service.limiter.hit(limit, asker.user_id):
            reset = service.limiter.get_window_stats(limit, asker.user_id).reset_time
            wait = max(1, round(reset - time.time()))
            raise Problem(
                429, f"at most {limit.amount} submissions a minute; wait {wait} s", {"Retry-After": str(wait)}
            )
        lab = service.labs.get(code.lab)
        if lab is None:
            raise Problem(404, f"there is no lab {code.lab}")
        try:
            submissions.check_code(lab, code.files)
        except UsageError as error:
            raise Problem(422, str(error)) from error
        found, new = accept(opened, asker.user_id, lab, code.files, code.slow, None)
        response.status_code = 201 if new else 200
        response.headers["Location"] = f"/api/v1/submissions/{found.id}"
        return answer(opened, found)

    @router.get("/submissions", responses=documented(401, 422))
    def list_submissions(
        opened: Transaction,
        asker: Asker,
        lab: Annotated[str | None, Query(pattern=_LAB_ID)] = None,
        user: Annotated[str | None, Query(max_length=200)] = None,
        limit: Annotated[int, Query(ge=1, le=200)] = 50,
        before: Annotated[AwareDatetime | None, BeforeValidator(_iso_8601)] = None,
    ) -> list[SubmissionAnswer]:
        """List submissions, the newest first: one's own, or for instructors all. `before` pages on."""
        query = select(Submission).order_by(Submission.created.desc(), Submission.id).limit(limit)
        if not asker.teaches:
            query = query.where(Submission.user_id == asker.user_id)
        if user is not None:
            query = query.join(User, User.id == Submission.user_id).where(User.name == user)
        if lab is not None:
            query = query.where(Submission.lab == lab)
        if before is not None:
            query = query.where(Submission.created < before)
        return [answer(opened, found) for found in opened.scalars(query)]

    @router.get("/submissions/{submission_id}", responses=documented(401, 404))
    def status(submission_id: SubmissionId, opened: Transaction, asker: Asker) -> SubmissionAnswer:
        """Return a submission's state, and while it is queued what it waits for."""
        found = visible(opened, asker, submission_id)
        reason = waiting(opened, found, service.labs.get(found.lab), service.settings)
        known = answer(opened, found)
        return known.model_copy(update={"waiting": WaitingAnswer(**asdict(reason))}) if reason else known

    @router.get("/submissions/{submission_id}/report", responses=documented(401, 404, 409))
    def report(submission_id: SubmissionId, opened: Transaction, asker: Asker) -> dict[str, Any]:
        """Return the report, the same document as `topeka grade --json`."""
        found = visible(opened, asker, submission_id)
        document = opened.get(Report, submission_id)
        if document is None:
            raise Problem(409, f"there is no report yet: the submission is {found.state}")
        return document.document

    @router.post(
        "/submissions/{submission_id}/regrade", status_code=201, responses=documented(401, 404, 409, 411)
    )
    def regrade(submission_id: SubmissionId, opened: Transaction, asker: Asker) -> SubmissionAnswer:
        """Grade the same code again, as a submission of its own; the old report stays."""
        found = visible(opened, asker, submission_id)
        lab = service.labs.get(found.lab)
        if lab is None:
            raise Problem(409, f"the course has no lab {found.lab} any more")
        again, _ = accept(opened, found.user_id, lab, submissions.code_of(found), found.slow, found.id)
        return answer(opened, again)

    @router.post("/submissions/{submission_id}/cancel", responses=documented(401, 404, 409, 411))
    def cancel(submission_id: SubmissionId, opened: Transaction, asker: Asker) -> SubmissionAnswer:
        """Cancel a submission that is not graded yet."""
        found = visible(opened, asker, submission_id)
        if not submissions.cancel(opened, submission_id):
            raise Problem(409, f"too late: the submission is {found.state}")
        opened.refresh(found)
        return answer(opened, found)

    @router.get(
        "/submissions/{submission_id}/events",
        response_class=EventSourceResponse,
        responses=documented(401, 404),
    )
    async def events(
        submission_id: SubmissionId,
        request: Request,
        asker: Asker,
        last_event_id: Annotated[str | None, Header()] = None,
    ) -> EventSourceResponse:
        """Stream what happens: server-sent events, resumed behind the header Last-Event-ID; ends when graded."""

        def look(after: int) -> tuple[list[ServerSentEvent], int, bool]:
            with service.database.session() as opened:
                final = visible(opened, asker, submission_id).state in FINAL
                found = submissions.events_after(opened, submission_id, after)
            told = [ServerSentEvent(json.dumps(e.data), event=e.kind, id=str(e.number)) for e in found]
            return told, found[-1].number if found else after, final and not found

        after = (
            int(last_event_id)
            if last_event_id and last_event_id.isdecimal() and len(last_event_id) < 10
            else 0
        )
        first = await asyncio.to_thread(look, after)

        async def told() -> AsyncIterator[ServerSentEvent]:
            news, last, done = first
            while True:
                for event in news:
                    service.metrics.events.labels(event.event).inc()
                    yield event
                if done or await request.is_disconnected():
                    return
                if not news:
                    await service.news.wait(submission_id, last)
                try:
                    news, last, done = await asyncio.to_thread(look, last)
                except (OperationalError, PoolTimeout):
                    return  # the database is away; the watcher comes back with Last-Event-ID

        async def counted() -> AsyncIterator[ServerSentEvent]:
            with service.metrics.streams.track_inprogress():
                async for event in told():
                    yield event

        return EventSourceResponse(counted())

    @router.get("/catalog", responses=documented(401))
    def catalog(opened: Transaction, asker: Asker) -> list[ChapterAnswer]:
        """Return all chapters and labs, with one's own progress."""
        mine = best(opened, asker.user_id)
        return [
            ChapterAnswer(
                id=chapter.id,
                title=chapter.title,
                phase=chapter.phase,
                summary=chapter.summary,
                labs=tuple(
                    LabAnswer(
                        id=lab.id,
                        title=lab.title,
                        summary=lab.summary,
                        stack=lab.stack,
                        minutes=lab.minutes,
                        planned=lab.planned,
                        files=lab.files,
                        status=mine.get(lab.id),
                    )
                    for lab in chapter.labs
                ),
            )
            for chapter in service.catalog.chapters
        ]

    @router.get("/progress", responses=documented(401))
    def progress(opened: Transaction, asker: Asker) -> dict[str, str]:
        """Return the best status of every lab one has submitted."""
        return best(opened, asker.user_id)

    def rows(opened: Session) -> list[GradebookRow]:
        return [
            GradebookRow(user=user.name, verified=list(labs.values()).count("verified"), labs=labs)
            for user, labs in records.gradebook(opened)
        ]

    @router.get("/gradebook", responses=documented(401, 403))
    def gradebook(opened: Transaction, _: Teacher) -> list[GradebookRow]:
        """Return the best status of every lab, of every learner and of whoever else has submitted."""
        return rows(opened)

    @router.get(
        "/gradebook.csv",
        response_class=Response,
        responses={200: {"content": {"text/csv": {}}}, **documented(401, 403)},
    )
    def gradebook_csv(opened: Transaction, _: Teacher) -> Response:
        """Return the gradebook as a table for spreadsheets."""
        text = io.StringIO()
        writer = csv.writer(text)
        labs = [lab.id for lab in service.catalog.labs if not lab.planned]
        writer.writerow(["user", "verified", *labs])
        for row in rows(opened):
            # A name that begins like a formula would be computed by the spreadsheet.
            name = f"'{row.user}" if row.user[0] in "=+-@\t" else row.user
            writer.writerow([name, row.verified, *(row.labs.get(lab, "") for lab in labs)])
        return Response(text.getvalue(), media_type="text/csv; charset=utf-8")

    @router.get("/workers", responses=documented(401, 403))
    def workers(opened: Transaction, _: Teacher) -> list[WorkerAnswer]:
        """Return the workers, and whether they live."""
        found = opened.scalars(select(Worker).order_by(Worker.id))
        return [
            WorkerAnswer(
                id=worker.id,
                host=worker.host,
                queues=worker.queues,
                seen=worker.seen,
                alive=worker.is_alive(service.settings.lost_after_s),
                draining=worker.draining,
                graded=worker.graded,
            )
            for worker in found
        ]

    @router.get("/health")
    def health(opened: Transaction) -> Health:
        """Say whether database and workers answer; no token is needed."""
        alive = [w for w in opened.scalars(select(Worker)) if w.is_alive(service.settings.lost_after_s)]
        return Health(status="ok", workers=len(alive))

    @router.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}}, **documented(401, 403)},
    )
    def metrics(opened: Transaction, _: Teacher) -> Response:
        """Return measurements in Prometheus's text format."""
        return Response(service.metrics.render(opened), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


# What a client can do next with the id of a new submission.
_LINKS = {
    name: {"operationId": name, "parameters": {"submission_id": "$response.body#/id"}}
    for name in ("status", "report", "events", "regrade", "cancel")
}

_SUBMIT_BODY = {
    "required": True,
    "content": {
        "application/json": {"schema": SubmitRequest.model_json_schema()},
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["lab", "files"],
                "additionalProperties": False,
                "properties": {
                    "lab": {"type": "string", "pattern": _LAB_ID},
                    "slow": {"type": "boolean", "default": False},
                    "files": {
                        "description": "each of the lab's source files, with its name",
                        "type": "array",
                        "items": {"type": "string", "format": "binary"},
                    },
                },
            }
        },
    },
}


async def _read_code(request: Request) -> _Code:
    """Read a submission, from JSON or from a form.

    By hand, since FastAPI gives a route one kind of body.
    """
    match request.headers.get("content-type", "").split(";")[0].strip().lower():
        case "application/json":
            content = await request.body()
            sent = _valid(lambda: SubmitRequest.model_validate_json(content))
            return _Code(
                sent.lab, {name: _decoded(name, text) for name, text in sent.files.items()}, sent.slow
            )
        case "multipart/form-data":
            return await _read_form(request)
        case _:
            raise Problem(415, "send application/json or multipart/form-data")


async def _read_form(request: Request) -> _Code:
    files: dict[str, bytes] = {}
    fields: dict[str, object] = {"files": {}}
    async with request.form(max_files=_MAX_PARTS, max_fields=_MAX_PARTS) as form:
        for key, value in form.multi_items():
            if isinstance(value, str) == (key == "files"):
                raise Problem(422, f"{key}: the parts called files are files, and no others are")
            if isinstance(value, str):
                fields[key] = value
                continue
            name = value.filename or ""
            if name in files:
                raise Problem(422, f"{name} was sent twice")
            files[name] = await value.read()
    sent = _valid(lambda: SubmitRequest.model_validate(fields))
    return _Code(sent.lab, files, sent.slow)


def _valid(validate: Callable[[], SubmitRequest]) -> SubmitRequest:
    try:
        return validate()
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error


def _decoded(name: str, text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise Problem(422, f"files.{name}: not base64: {error}") from error


def _iso_8601(text: object) -> object:
    # Pydantic would take a bare number for seconds since 1970.
    if isinstance(text, str) and "T" not in text.upper():
        raise ValueError("give a moment with its zone, such as 2026-11-25T12:00:00Z")
    return text


def _submission_id(submission_id: str) -> str:
    if len(submission_id) != 32 or not set(submission_id) <= set("0123456789abcdef"):
        raise Problem(404, "there is no such submission")
    return submission_id
