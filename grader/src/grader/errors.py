"""What every expected error has in common: a sentence that says what to do, and an exit code."""

OK, FAILED, USAGE, COULD_NOT_RUN = 0, 1, 2, 3


class TopekaError(Exception):
    """An error that is the user's to mend; its message is a sentence for them.

    Attributes:
        exit_code: of the command that ends with it.
    """

    exit_code = COULD_NOT_RUN


class UsageError(TopekaError):
    """The command was given something it cannot take."""

    exit_code = USAGE
