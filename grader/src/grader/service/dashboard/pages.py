"""The routes of the dashboard. Every page but signing in needs a session; programs use the API."""

import base64
import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import parse_qs, quote

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session
from starlette.exceptions import HTTPException

from grader.background import write_private
from grader.catalog import Chapter, Lab
from grader.service import accounts, submissions
from grader.service.dashboard import browser, sessions, views
from grader.service.dashboard.reading import FIGURES, Library, code_as_html
from grader.service.dashboard.sessions import LocalDoor, Visitor
from grader.service.models import User
from grader.service.problems import Problem
from grader.service.records import visible
from grader.submission import SubmissionError, read_code

if TYPE_CHECKING:
    from grader.service.api import Service

_STATIC = Path(__file__).parent / "static"
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; object-src 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    # Not no-referrer: with it, forms would not say which page they come from.
    "Referrer-Policy": "same-origin",
}
# A figure opened by itself is a document; it may style itself and nothing else.
_FIGURE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; sandbox"
_MAX_FORM_BYTES = 4096
_MEDIA_TYPES = {
    "css": "text/css",
    "js": "text/javascript",
    "svg": "image/svg+xml",
    "txt": "text/plain",
    "woff2": "font/woff2",
}


class _SignInNeeded(Exception):
    """Nobody is signed in."""


def install(app: FastAPI, service: "Service") -> None:
    """Add the dashboard to the service's application."""
    door = LocalDoor()
    app.state.door = door
    draw = _Pages()
    app.include_router(_routes(service, draw, door), include_in_schema=False)
    app.add_middleware(browser.HostCheck, settings=service.settings)
    _errors_as_pages(app, draw)


def sign_in_link(app: Any, address: str) -> str | None:
    """Return a link that signs in the owner of this machine once; None where there is no such person.

    Where a file for it is set, the link is there from now on.

    Args:
        app: the service's application.
        address: of the server, such as `http://127.0.0.1:8300`.
    """
    if not sessions.has_local_owner(app.state.service.settings):
        return None
    link = f"{address}/sign-in?once={app.state.door.new_secret()}"
    if file := app.state.service.settings.link_file:
        write_private(file, link + "\n")
    return link


class _Pages:
    """The templates.

    Attributes:
        static: style sheet, scripts and fonts by name.
        version: changes with any of them.
    """

    def __init__(self) -> None:
        files = sorted(file for file in _STATIC.rglob("*") if file.is_file())
        # Kept in memory: the first page waits for several of them.
        self.static = {file.relative_to(_STATIC).as_posix(): file.read_bytes() for file in files}
        self.version = hashlib.sha256(b"".join(self.static.values())).hexdigest()[:12]
        self._templates = Environment(
            loader=PackageLoader("grader.service.dashboard"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.globals |= {
            "WORDS": views.WORDS,
            "number": views.number,
            "static": lambda name: f"/static/{self.version}/{name}",
        }
        self._templates.filters |= {
            "seconds": _seconds,
            "figures": _figures,
            "breakable": _breakable,
            "code": code_as_html,
        }

    def __call__(
        self, template: str, visitor: Visitor | None, *, status: int = 200, **values: Any
    ) -> HTMLResponse:
        text = self._templates.get_template(template).render(visitor=visitor, **values)
        return HTMLResponse(text, status, headers=_HEADERS)


def _routes(service: "Service", draw: _Pages, door: LocalDoor) -> APIRouter:
    router = APIRouter(default_response_class=HTMLResponse)
    settings, catalog = service.settings, service.catalog
    library = Library(catalog)

    def session() -> Iterator[Session]:
        with service.database.session() as opened:
            yield opened

    Transaction = Annotated[Session, Depends(session, scope="function")]

    def visitor_of(opened: Transaction, request: Request) -> Visitor:
        found = sessions.visitor(opened, request, settings)
        if found is None:
            raise _SignInNeeded
        return found

    Who = Annotated[Visitor, Depends(visitor_of)]

    def teacher_of(visitor: Who) -> Visitor:
        if not visitor.identity.teaches:
            raise Problem(403, "only instructors may see this page")
        return visitor

    Teacher = Annotated[Visitor, Depends(teacher_of)]

    @router.get(f"/static/{draw.version}/{{name:path}}")
    async def static(name: str) -> Response:
        """Send a file that pages need. Its version is in the address, so browsers keep it."""
        if name not in draw.static:
            raise Problem(404, f"there is no file {name}")
        headers = {"Cache-Control": "max-age=31536000, immutable"}
        media_type = _MEDIA_TYPES[name.rpartition(".")[2]]
        return Response(draw.static[name], media_type=media_type, headers=headers)

    # --- signing in ---------------------------------------------------------------------------------

    def welcome(request: Request, value: str, next_page: str) -> Response:
        response = RedirectResponse(next_page, 303, headers=_HEADERS)
        sessions.set_cookie(response, request, value, settings)
        return response

    def ask(error: str, next_page: str, status: int) -> Response:
        return draw(
            "sign_in.html",
            None,
            status=status,
            error=error,
            next_page=next_page,
            local=sessions.has_local_owner(settings),
        )

    @router.get("/sign-in")
    def sign_in(request: Request, opened: Transaction, once: str = "", next: str = "/") -> Response:
        """Sign in by the link that `topeka serve` printed, or ask for a token."""
        here = sessions.visitor(opened, request, settings)
        if here and (here.is_local or not once):
            return RedirectResponse(_own_page(next), 303, headers=_HEADERS)
        if not once:
            return ask("", _own_page(next), 200)
        if not sessions.has_local_owner(settings) or not door.open(once):
            return ask(
                "This link was used already, or is of an earlier start. Take the newest one that topeka serve "
                "has printed.",
                _own_page(next),
                403,
            )
        owner = sessions.local_owner(opened)
        address = str(request.base_url).rstrip("/")
        print(f"Signed in. For another browser: {sign_in_link(request.app, address)}", flush=True)
        return welcome(request, sessions.begin(opened, owner.id, None), _own_page(next))

    @router.post("/sign-in")
    async def sign_in_by_token(request: Request) -> Response:
        """Sign in by a token."""
        browser.require_same_origin(request, settings)
        form = parse_qs((await request.body())[:_MAX_FORM_BYTES].decode(errors="replace"))
        token = form.get("token", [""])[0].strip()
        next_page = _own_page(form.get("next", ["/"])[0])
        with service.database.session() as opened:
            found = accounts.identify(opened, token)
            if found:
                value = sessions.begin(opened, found.user_id, token.split("_")[1])
                return welcome(request, value, next_page)
        return ask("This is no valid token. Copy all of it, from topeka_ on.", next_page, 403)

    @router.post("/sign-out")
    def sign_out(request: Request, opened: Transaction) -> Response:
        """End this browser's session."""
        browser.require_same_origin(request, settings)
        sessions.end(opened, request)
        response = RedirectResponse("/sign-in", 303, headers=_HEADERS)
        sessions.set_cookie(response, request, "", settings)
        return response

    # --- the course -----------------------------------------------------------------------------------

    def chapter_named(chapter: str) -> Chapter:
        for found in catalog.chapters:
            if found.id == chapter:
                return found
        raise Problem(404, f"there is no chapter {chapter}")

    def lab_named(lab: str) -> Lab:
        if found := service.labs.get(lab):
            return found
        raise Problem(404, f"there is no lab {lab}")

    def lectures(chapter: Chapter) -> list[tuple[str, str]]:
        """The chapter's lectures: name in the address, and title."""
        files = sorted((chapter.path / "docs").glob("*.md"))
        texts = [(file.stem, library.text(file)) for file in files]
        return [(name, text.title or name) for name, text in texts if text]

    @router.get("/")
    def course_map(opened: Transaction, visitor: Who) -> Response:
        """Show all labs by phase and chapter."""
        return draw("map.html", visitor, course=views.course_map(opened, service, visitor))

    @router.get("/chapters/{chapter}")
    def chapter_page(chapter: str, opened: Transaction, visitor: Who) -> Response:
        """Show a chapter's overview, its lectures and labs."""
        found = chapter_named(chapter)
        shown = views.course_map(opened, service, visitor)
        [view] = [each for each in shown.chapters if each.chapter.id == chapter]
        text = library.text(found.path / "README.md")
        return draw("chapter.html", visitor, view=view, text=text, lectures=lectures(found))

    @router.get("/chapters/{chapter}/lectures/{name}")
    def lecture(chapter: str, name: str, visitor: Who) -> Response:
        """Show a lecture."""
        found = chapter_named(chapter)
        listed = lectures(found)
        names = [each for each, _ in listed]
        if name not in names:
            raise Problem(404, f"{chapter} has no lecture {name}")
        place = names.index(name)
        return draw(
            "lecture.html",
            visitor,
            chapter=found,
            text=library.text(found.path / "docs" / f"{name}.md"),
            before=listed[place - 1] if place else None,
            after=listed[place + 1] if place + 1 < len(listed) else None,
        )

    @router.get("/chapters/{chapter}/docs/{path:path}")
    def figure(chapter: str, path: str, visitor: Who) -> Response:
        """Send a figure of a lecture."""
        folder = (chapter_named(chapter).path / "docs").resolve()
        # resolve() follows links too: whatever the name says, the file lies in the folder or is not sent.
        file = (folder / path).resolve() if "\0" not in path else folder
        if not file.is_relative_to(folder) or file.suffix not in FIGURES or not file.is_file():
            raise Problem(404, "there is no such figure")
        headers = {"Content-Security-Policy": _FIGURE_POLICY, "Cache-Control": "private, max-age=60"}
        return FileResponse(file, media_type=FIGURES[file.suffix], headers=headers)

    @router.get("/labs/{chapter}/{lab}")
    def lab_page(chapter: str, lab: str, opened: Transaction, visitor: Who) -> Response:
        """Show a lab: what to do, and how far one is."""
        found = lab_named(f"{chapter}/{lab}")
        history = views.attempts(opened, visitor.identity.user_id, found.id)
        order = [each.id for each in catalog.labs]
        place = order.index(found.id)
        return draw(
            "lab.html",
            visitor,
            lab=found,
            chapter=views.chapter_of(service, found),
            lab_status=views.statuses(opened, service, visitor)[found.id],
            text=None if found.planned else library.text(found.path / "README.md"),
            lectures=lectures(views.chapter_of(service, found)),
            history=history,
            result=views.result(opened, service, history[0][0]) if history else None,
            before=catalog.labs[place - 1] if place else None,
            after=catalog.labs[place + 1] if place + 1 < len(order) else None,
        )

    @router.get("/labs/{chapter}/{lab}/history")
    def lab_history(chapter: str, lab: str, opened: Transaction, visitor: Who) -> Response:
        """Show one's attempts at a lab, as a part of its page."""
        found = lab_named(f"{chapter}/{lab}")
        history = views.attempts(opened, visitor.identity.user_id, found.id)
        return draw("_history.html", visitor, history=history, with_user=False, with_lab=False)

    @router.get("/labs/{chapter}/{lab}/files")
    def my_files(chapter: str, lab: str, visitor: Who) -> Response:
        """Return the working copy in `src/`, ready to submit: to the owner of this machine only."""
        if not visitor.is_local:
            raise Problem(403, "only the owner of this machine may grade its files")
        found = lab_named(f"{chapter}/{lab}")
        try:
            code = read_code(found, found.path / "src")
        except SubmissionError as error:
            raise Problem(409, str(error)) from error
        files = {name: base64.b64encode(content).decode() for name, content in code.items()}
        return JSONResponse({"lab": found.id, "files": files})

    # --- submissions ------------------------------------------------------------------------------------

    @router.get("/submissions")
    def attempts(
        opened: Transaction, visitor: Who, user: str | None = None, lab: str | None = None
    ) -> Response:
        """List submissions: one's own, or for instructors somebody's."""
        if user is None or not visitor.identity.teaches:
            user = visitor.identity.name
        owner = opened.scalar(select(User).where(User.name == user))
        if owner is None:
            raise Problem(404, f"there is no user {user}")
        return draw(
            "submissions.html",
            visitor,
            owner=owner,
            lab=lab_named(lab) if lab else None,
            history=views.attempts(opened, owner.id, lab, limit=200),
        )

    @router.get("/submissions/{submission_id}")
    def submission(submission_id: str, opened: Transaction, visitor: Who) -> Response:
        """Show one submission: its results, as they come, and its code."""
        found = visible(opened, visitor.identity, submission_id)
        code = submissions.code_of(found)
        return draw(
            "submission.html",
            visitor,
            result=views.result(opened, service, found),
            lab=service.labs.get(found.lab),
            code={name: content.decode(errors="replace") for name, content in code.items()},
        )

    @router.get("/submissions/{submission_id}/result")
    def result(submission_id: str, opened: Transaction, visitor: Who) -> Response:
        """Show the result of a submission, as a part of a page."""
        found = visible(opened, visitor.identity, submission_id)
        return draw("_result.html", visitor, result=views.result(opened, service, found))

    # --- for instructors ----------------------------------------------------------------------------------

    @router.get("/queue")
    def queue(opened: Transaction, visitor: Teacher) -> Response:
        """Show the queue and the workers."""
        return draw("queue.html", visitor, queue=views.queue(opened, service))

    @router.get("/gradebook")
    def gradebook(
        opened: Transaction, visitor: Teacher, sort: str = "name", descending: bool = False
    ) -> Response:
        """Show the class."""
        labs = [lab for lab in catalog.labs if not lab.planned]
        if sort not in ("name", "verified", *(lab.id for lab in labs)):
            raise Problem(404, f"the gradebook has no column {sort}")
        return draw(
            "gradebook.html",
            visitor,
            rows=views.gradebook(opened, sort, descending),
            labs=labs,
            sort=sort,
            descending=descending,
        )

    return router


def _own_page(address: str) -> str:
    """Return `address` if it is a page of this server, else the map: nobody is sent elsewhere."""
    inside = address.startswith("/") and not address.startswith("//")
    return address if inside and address.isprintable() and "\\" not in address else "/"


# --- errors ---------------------------------------------------------------------------------------------


def _errors_as_pages(app: FastAPI, draw: _Pages) -> None:
    """Show errors as pages to browsers that asked for a page; the API's stay problem details."""

    def visitor_at(request: Request) -> Visitor | None:
        service: Service = app.state.service
        try:
            with service.database.session() as opened:
                return sessions.visitor(opened, request, service.settings)
        except (Problem, SQLAlchemyError):  # what the page tells of matters more than who reads it
            return None

    def wrap(kind: Any) -> None:
        as_problem: Any = app.exception_handlers[kind]

        async def handler(request: Request, error: Exception) -> Response:
            answer: JSONResponse = await as_problem(request, error)
            wants_page = "text/html" in request.headers.get("accept", "")
            if request.url.path.startswith(("/api/", "/static/")) or not wants_page:
                return answer
            visitor = None if answer.status_code >= 500 else await run_in_threadpool(visitor_at, request)
            detail = getattr(error, "detail", "") if isinstance(error, Problem | HTTPException) else ""
            detail = str(error) if isinstance(error, Problem) else detail
            return draw(
                "error.html", visitor, status=answer.status_code, code=answer.status_code, detail=detail
            )

        app.add_exception_handler(kind, handler)

    for kind in (Problem, HTTPException, RequestValidationError, Exception):
        wrap(kind)

    @app.exception_handler(_SignInNeeded)
    async def sign_in(request: Request, _: _SignInNeeded) -> Response:
        if request.method != "GET" or "text/html" not in request.headers.get("accept", ""):
            return await _problem(app, request, Problem(401, "sign in first"))
        page = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        target = "/sign-in" if page == "/" else f"/sign-in?next={quote(page, safe='')}"
        return RedirectResponse(target, 303, headers=_HEADERS)


async def _problem(app: FastAPI, request: Request, error: Problem) -> Response:
    handler: Any = app.exception_handlers[Problem]
    answer: Response = await handler(request, error)
    return answer


# --- how numbers and names are written ------------------------------------------------------------


def _breakable(name: str) -> Markup:
    """Let a long name go on in the next line behind an underscore."""
    return escape(name).replace("_", Markup("_<wbr>"))


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    if value < 1:
        return f"{value * 1000:.0f} ms"
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s"


def _figures(value: float) -> str:
    """Write a measurement with three figures, small and large ones as powers of ten."""
    if 1000 <= abs(value) < 1e6:
        return f"{value:,.0f}"
    if value == 0 or 0.001 <= abs(value) < 1000 or not math.isfinite(value):
        return f"{value:.3g}"
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    mantissa = mantissa.rstrip("0").rstrip(".")
    raised = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{raised}" if mantissa == "1" else f"{mantissa} × 10{raised}"
