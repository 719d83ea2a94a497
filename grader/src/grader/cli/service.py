"""Commands of the grader as a service."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grader.cli import start
from grader.cli.start import SandboxName, StackName
from grader.errors import TopekaError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from grader.catalog import Catalog, Lab
    from grader.sandbox import Sandbox
    from grader.service.settings import Settings

commands = typer.Typer()


Database = Annotated[
    str | None,
    typer.Option(
        "--database", metavar="URL", help="sqlite:///FILE or postgresql://...; also TOPEKA_DATABASE_URL"
    ),
]


def _service_settings(catalog: "Catalog", **chosen: object) -> "Settings":
    try:
        from grader.service.settings import Settings
    except ImportError as error:
        raise TopekaError(
            f"the service is not installed here ({error.name} is missing): make setup"
        ) from error
    return Settings.from_environment(start.state_folder(catalog), **chosen)


@commands.command()
def serve(
    host: Annotated[str | None, typer.Option(help="address to listen on; 127.0.0.1 unless chosen")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="8300 unless chosen")] = None,
    link_file: Annotated[
        Path | None, typer.Option(help="keep the link that signs you in there too, for your eyes only")
    ] = None,
    database: Database = None,
    sandbox: Annotated[SandboxName, typer.Option(envvar="TOPEKA_SANDBOX")] = SandboxName.AUTO,
) -> None:
    """Serve the grader's API; with SQLite, the default, grade on this machine too."""
    catalog = start.catalog()
    settings = _service_settings(catalog, host=host, port=port, link_file=link_file, database_url=database)
    from grader.service.serve import serve as run

    written = [lab for lab in catalog.labs if not lab.planned]
    run(catalog, settings, lambda: start.sandbox(sandbox, None, written), start.cache(catalog))


@commands.command()
def worker(
    stacks: Annotated[
        StackName | None, typer.Option("--stacks", help="the largest stack to take work for; what is here")
    ] = None,
    slot: Annotated[int, typer.Option(min=0, help="number of this worker on its machine")] = 0,
    database: Database = None,
    sandbox: Annotated[SandboxName, typer.Option(envvar="TOPEKA_SANDBOX")] = SandboxName.AUTO,
) -> None:
    """Grade what waits in the queue of TOPEKA_DATABASE_URL, as far as this machine can verify it."""
    catalog = start.catalog()
    settings = _service_settings(catalog, database_url=database)
    from grader.service.serve import work as run

    written = [lab for lab in catalog.labs if not lab.planned]
    run(
        catalog,
        settings,
        lambda: _worker_sandbox(sandbox, stacks, written),
        stacks,
        slot,
        start.cache(catalog),
    )


def _worker_sandbox(
    name: SandboxName, stack: StackName | None, labs: "Sequence[Lab]"
) -> "tuple[Sandbox, str]":
    """Return the sandbox for the stack; whether the GPUs suffice is seen from within it."""
    if name is not SandboxName.LOCAL and start.may_have_engine(name):
        return start.sandbox(name, stack, labs)
    return start.local_sandbox(), start.local_stack(None)


@commands.command()
def backup(
    file: Annotated[Path, typer.Argument(help="where the backup goes; it replaces what is there")],
    database: Database = None,
) -> None:
    """Back up the service's database to one file, while it runs; the queue is part of it."""
    settings = _service_settings(start.catalog(), database_url=database)
    from grader.service import backup as backups
    from grader.service.serve import open_database

    made = backups.backup(open_database(settings), file)
    print(f"{file}: {sum(made.rows.values()):,} rows of {len(made.rows)} tables, checked; keep it private")


@commands.command()
def restore(
    file: Annotated[Path, typer.Argument(help="made by `topeka backup`")],
    force: Annotated[bool, typer.Option("--force", help="replace a database that is not empty")] = False,
    database: Database = None,
) -> None:
    """Restore a backup, all of it or nothing. End servers and workers first; what waited then is graded after."""
    settings = _service_settings(start.catalog(), database_url=database)
    from grader.service import backup as backups
    from grader.service.database import Database as Opened

    opened = Opened(settings.database_url)
    made = backups.restore(opened, file, force=force)
    opened.upgrade()  # a backup may be of an older version
    print(f"Restored {sum(made.rows.values()):,} rows of {len(made.rows)} tables as of {made.created}")


@commands.command()
def retention(
    days: Annotated[
        float | None, typer.Option(min=0.001, help="instead of TOPEKA_KEEP_DAYS; older ones are deleted")
    ] = None,
    database: Database = None,
) -> None:
    """Delete final submissions older than so many days, now; the server does it every hour."""
    settings = _service_settings(start.catalog(), database_url=database, keep_days=days)
    if settings.keep_days is None:
        raise UsageError("say how many days are kept: --days 365, or TOPEKA_KEEP_DAYS")
    from grader.service.serve import open_database
    from grader.service.upkeep import retain
    from grader.service.work_queue import WorkQueue

    opened = open_database(settings)
    print(f"Deleted {retain(opened, WorkQueue(opened), settings.keep_days):,} submissions.")


token_app = typer.Typer(help="Tokens of the service's users.", no_args_is_help=True, rich_markup_mode=None)
commands.add_typer(token_app, name="token")


@token_app.command("create")
def token_create(
    name: Annotated[str, typer.Argument(help="of the user")],
    instructor: Annotated[bool, typer.Option("--instructor", help="who sees the class")] = False,
    database: Database = None,
) -> None:
    """Make a token and print it; it is shown this once."""
    from grader.service import accounts
    from grader.service.models import Role
    from grader.service.serve import open_database

    opened = open_database(_service_settings(start.catalog(), database_url=database))
    with opened.session() as session:
        print(accounts.create_token(session, name, Role.INSTRUCTOR if instructor else Role.LEARNER))


@token_app.command("list")
def token_list(database: Database = None) -> None:
    """List tokens: id, user, role, when made, when revoked. The tokens themselves are nowhere."""
    from grader.service import accounts
    from grader.service.serve import open_database

    opened = open_database(_service_settings(start.catalog(), database_url=database))
    with opened.session() as session:
        for token, user in accounts.tokens(session):
            ended = f"revoked {token.revoked:%Y-%m-%d %H:%M}" if token.revoked else "valid"
            print(f"{token.id}  {user.name}  {user.role}  {token.created:%Y-%m-%d %H:%M}  {ended}")


@token_app.command("revoke")
def token_revoke(
    token: Annotated[str, typer.Argument(help="its id, as in `topeka token list`, or the token")],
    database: Database = None,
) -> None:
    """End a token at once."""
    from grader.service import accounts
    from grader.service.serve import open_database

    opened = open_database(_service_settings(start.catalog(), database_url=database))
    with opened.session() as session:
        accounts.revoke(session, token)
    print("Revoked.")
