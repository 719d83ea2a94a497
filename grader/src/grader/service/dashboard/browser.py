"""What a request must be before it is answered.

A page elsewhere can make a browser send requests to this machine. Two things stop it: a server on loopback
answers to loopback's own names only, so that a foreign name that resolves to 127.0.0.1 reaches nothing (DNS
rebinding); and what changes something must come from a page of this server.
"""

from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from grader.service import problems
from grader.service.problems import Problem
from grader.service.settings import Settings

_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


def is_loopback(host: str) -> bool:
    """Whether a server on `host` is reached from its own machine only."""
    return host in _LOOPBACK


class HostCheck:
    """Refuses requests for a host that this server is not."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        public = urlsplit(settings.public_url).hostname if settings.public_url else None
        restricted = public is not None or is_loopback(settings.host)
        self._names = {*_LOOPBACK, *filter(None, [public])} if restricted else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or refuse."""
        if scope["type"] == "http" and self._names is not None:
            try:
                named = urlsplit(f"//{Headers(scope=scope).get('host', '')}").hostname
            except ValueError:  # brackets without an address
                named = None
            if named not in self._names:
                refusal = problems.problem(
                    421, f"this server is not {named}; TOPEKA_PUBLIC_URL names the address behind a proxy"
                )
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)


def require_same_origin(request: Request, settings: Settings) -> None:
    """Refuse a request that changes something and does not come from a page of this server.

    Raises:
        Problem: it comes from elsewhere, or does not say from where.
    """
    if site := request.headers.get("sec-fetch-site"):
        if site == "same-origin":
            return
    elif origin := request.headers.get("origin"):
        own = {f"{request.url.scheme}://{request.url.netloc}"}
        if settings.public_url:
            own.add("{0.scheme}://{0.netloc}".format(urlsplit(settings.public_url)))
        if origin in own:
            return
    raise Problem(403, "this must come from a page of this server; programs show a token instead")
