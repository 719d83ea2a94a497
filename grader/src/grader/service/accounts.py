"""Users and their tokens.

A token is `topeka_ID_SECRET`. The database has only the SHA-256 of the secret: with 256 random bits nothing slower
is needed. The comparison takes the same time whatever is wrong.
"""

import hashlib
import hmac
import secrets
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from grader.errors import UsageError
from grader.service.models import Role, Token, User, now

PREFIX = "topeka"


@dataclass(frozen=True)
class Identity:
    """Who is asking.

    Attributes:
        user_id: of the user.
        name: their name.
        role: what they may see.
    """

    user_id: str
    name: str
    role: Role

    @property
    def teaches(self) -> bool:
        """Whether they see the class."""
        return self.role is Role.INSTRUCTOR


def create_token(session: Session, name: str, role: Role) -> str:
    """Return a new token of a user, whom this makes if there is none of that name.

    Raises:
        UsageError: the name is empty or too long, or belongs to a user of another role.
    """
    name = name.strip()
    if not name or len(name) > 200 or not name.isprintable():
        raise UsageError(f"{name!r} is no name: 1 to 200 printable characters")
    user = session.scalar(select(User).where(User.name == name))
    if user is None:
        user = User(name=name, role=role)
        session.add(user)
        session.flush()
    elif user.role != role:
        raise UsageError(f"{name} is {user.role} already; give the {role} another name")
    token_id, secret = secrets.token_hex(6), secrets.token_hex(32)
    session.add(Token(id=token_id, user_id=user.id, digest=_digest(secret)))
    return f"{PREFIX}_{token_id}_{secret}"


def identify(session: Session, token: str) -> Identity | None:
    """Return whose token this is; None if it is nobody's, or revoked."""
    prefix, _, rest = token.partition("_")
    token_id, _, secret = rest.partition("_")
    known = session.get(Token, token_id) if prefix == PREFIX else None
    # Also an unknown id costs one hash and one comparison.
    matches = hmac.compare_digest(known.digest if known else _digest(""), _digest(secret))
    if known is None or not matches or known.revoked is not None:
        return None
    user = session.get_one(User, known.user_id)
    return Identity(user.id, user.name, Role(user.role))


def revoke(session: Session, token_id: str) -> None:
    """End a token: whoever shows it is nobody from now on.

    Args:
        session: a transaction.
        token_id: the part of the token between the first two underscores, or the whole token.

    Raises:
        UsageError: there is no such token.
    """
    if token_id.startswith(f"{PREFIX}_"):
        token_id = token_id.split("_")[1]
    token = session.get(Token, token_id)
    if token is None:
        raise UsageError(f"there is no token {token_id}; `topeka token list` shows all")
    token.revoked = token.revoked or now()


def tokens(session: Session) -> list[tuple[Token, User]]:
    """Return all tokens with their users, in the order they were made."""
    rows = session.execute(select(Token, User).join(User, User.id == Token.user_id).order_by(Token.created))
    return [(token, user) for token, user in rows]


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
