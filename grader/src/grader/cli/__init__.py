"""The command `topeka`.

Heavy modules are imported inside the commands that need them: every command must start in less
than 0.3 s, and torch is imported by the runner's own process only.
"""

import os
import sys

import typer

from grader.cli import authoring, labs, service, start, surroundings
from grader.errors import COULD_NOT_RUN, FAILED, TopekaError

__all__ = ["app", "main"]

app = typer.Typer(
    name="topeka",
    help="A course on transformers, from dot-product attention to Triton kernels.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help: drawing boxes would double the start-up time
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for part in (labs, surroundings, service, authoring):  # the order of the help
    app.add_typer(part.commands)


def main() -> None:
    """Run the command; every expected error is one sentence on standard error."""
    try:
        app()
    except TopekaError as error:
        start.fail(str(error), error.exit_code)
    except BrokenPipeError:
        # The reader went away (`topeka list | head`); nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILED)
    except KeyboardInterrupt:
        start.fail("stopped", 130)
    except OSError as error:
        start.fail(f"{error.filename or 'the system'}: {error.strerror or error}", COULD_NOT_RUN)
