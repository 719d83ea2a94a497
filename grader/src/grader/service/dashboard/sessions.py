"""Who a browser is signed in as.

A cookie holds `ID.SECRET`; the database has only the SHA-256 of the secret. A session that began with a token
ends when the token is revoked. On a laptop nobody needs a token: `topeka serve` prints a link that signs in once.
"""

import getpass
import hashlib
import hmac
import secrets
import threading
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import delete, select
from sqlalchemy.orm import Session
from starlette.requests import Request
from starlette.responses import Response

from grader.service.accounts import Identity
from grader.service.dashboard.browser import is_loopback, require_same_origin
from grader.service.models import BrowserSession, Role, Token, User, now
from grader.service.settings import Settings

LASTS = timedelta(days=30)


@dataclass(frozen=True)
class Visitor:
    """Who looks at a page.

    Attributes:
        identity: the user.
        is_local: whether this is the owner of this machine's own service, signed in by its link.
    """

    identity: Identity
    is_local: bool


def has_local_owner(settings: Settings) -> bool:
    """Whether this is one person's own service: one SQLite file, on loopback or said to be, behind no proxy."""
    embedded = settings.database_url.startswith("sqlite")
    own = settings.local_owner or is_loopback(settings.host)
    return embedded and own and settings.public_url is None


class LocalDoor:
    """Links that sign in the owner of this machine, each of them once."""

    def __init__(self) -> None:
        self._digests: set[str] = set()
        self._lock = threading.Lock()

    def new_secret(self) -> str:
        """Return a secret that opens once, until this process ends."""
        secret = secrets.token_urlsafe(32)
        with self._lock:
            self._digests.add(_digest(secret))
        return secret

    def open(self, secret: str) -> bool:
        """Whether `secret` opens; from now on it does not."""
        shown = _digest(secret)
        with self._lock:
            found = [kept for kept in self._digests if hmac.compare_digest(kept, shown)]
            self._digests.difference_update(found)
        return bool(found)


def local_owner(session: Session) -> User:
    """Return the user who owns this machine's own service, and make them if need be.

    They are an instructor, since it is their queue and their worker.
    """
    found = _owner_or_name(session)
    if isinstance(found, User):
        return found
    user = User(name=found, role=Role.INSTRUCTOR)
    session.add(user)
    session.flush()
    return user


def is_local_owner(session: Session, user_id: str) -> bool:
    """Whether that user owns this machine's own service."""
    found = _owner_or_name(session)
    return isinstance(found, User) and found.id == user_id


def _owner_or_name(session: Session) -> User | str:
    """Return the owner, or the name they will have: a learner may have the system's name for them."""
    name = getpass.getuser()
    while user := session.scalar(select(User).where(User.name == name)):
        if user.role == Role.INSTRUCTOR:
            return user
        name += " (owner)"
    return name


def begin(session: Session, user_id: str, token_id: str | None) -> str:
    """Sign a browser in, and return what its cookie holds.

    Args:
        session: a transaction.
        user_id: as whom.
        token_id: of the token that was shown; None for the owner of this machine.
    """
    moment = now()
    session.execute(delete(BrowserSession).where(BrowserSession.ends < moment))
    key, secret = secrets.token_hex(16), secrets.token_urlsafe(32)
    session.add(
        BrowserSession(
            id=key, user_id=user_id, token_id=token_id, digest=_digest(secret), ends=moment + LASTS
        )
    )
    return f"{key}.{secret}"


def visitor(session: Session, request: Request, settings: Settings) -> Visitor | None:
    """Return who sent the request, by its cookie; None if nobody is signed in there.

    Raises:
        Problem: the request changes something and comes from another site.
    """
    found = _find(session, request)
    if found is None:
        return None
    if found.token_id is None and not has_local_owner(settings):
        return None
    if found.token_id is not None and session.get_one(Token, found.token_id).revoked is not None:
        return None
    if request.method not in ("GET", "HEAD"):
        require_same_origin(request, settings)
    user = session.get_one(User, found.user_id)
    return Visitor(Identity(user.id, user.name, Role(user.role)), found.token_id is None)


def end(session: Session, request: Request) -> None:
    """Sign the request's browser out."""
    if found := _find(session, request):
        session.delete(found)


def set_cookie(response: Response, request: Request, value: str, settings: Settings) -> None:
    """Give the browser its cookie; an empty value takes it away."""
    secure = request.url.scheme == "https" or (settings.public_url or "").startswith("https:")
    response.set_cookie(
        _cookie_name(request),
        value,
        max_age=int(LASTS.total_seconds()) if value else 0,
        httponly=True,
        samesite="strict",
        secure=secure,
    )


def _find(session: Session, request: Request) -> BrowserSession | None:
    key, _, secret = request.cookies.get(_cookie_name(request), "").partition(".")
    found = session.get(BrowserSession, key) if key else None
    if found is None or not hmac.compare_digest(found.digest, _digest(secret)) or found.ends < now():
        return None
    return found


def _cookie_name(request: Request) -> str:
    # Browsers send a host's cookies to all of its ports; two services on one laptop must not mix.
    return f"topeka_session_{request.url.port or request.url.scheme}"


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
