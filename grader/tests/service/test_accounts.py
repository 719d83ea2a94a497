"""Tokens: what is kept of them, and whom they let in."""

import pytest
from grader.errors import UsageError
from grader.service import accounts
from grader.service.database import Database
from grader.service.models import Role, Token
from sqlalchemy import select


def test_a_token_identifies_its_user_until_it_is_revoked(database: Database):
    with database.session() as session:
        token = accounts.create_token(session, "ada", Role.LEARNER)
    with database.session() as session:
        found = accounts.identify(session, token)
        assert found is not None
        assert (found.name, found.teaches) == ("ada", False)
        accounts.revoke(session, token.split("_")[1])
    with database.session() as session:
        assert accounts.identify(session, token) is None


def test_the_database_does_not_hold_the_token(database: Database):
    with database.session() as session:
        token = accounts.create_token(session, "ada", Role.LEARNER)
    secret = token.split("_")[2]
    with database.session() as session:
        [kept] = session.scalars(select(Token))
        assert secret not in (kept.id, kept.digest)
    assert secret.encode() not in (database.engine.url.database or "").encode()
    with open(str(database.engine.url.database), "rb") as file:  # noqa: PTH123 (any file of the database)
        assert secret.encode() not in file.read()


@pytest.mark.parametrize(
    "change", [lambda t: t[:-1], lambda t: t + "0", lambda t: t.upper(), lambda t: t[7:], lambda t: ""]
)
def test_nearly_a_token_is_nobody(database: Database, change):
    with database.session() as session:
        token = accounts.create_token(session, "ada", Role.LEARNER)
        assert accounts.identify(session, change(token)) is None


def test_names_and_roles_are_checked(database: Database):
    with database.session() as session:
        accounts.create_token(session, "ada", Role.LEARNER)
        for name, role in (
            ("", Role.LEARNER),
            ("a\nb", Role.LEARNER),
            ("x" * 201, Role.LEARNER),
            ("ada", Role.INSTRUCTOR),
        ):
            with pytest.raises(UsageError):
                accounts.create_token(session, name, role)
        with pytest.raises(UsageError, match="topeka token list"):
            accounts.revoke(session, "nothing")
