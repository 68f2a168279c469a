"""Errors that end a command in one line, and the exit codes they end it with."""

import sys

USER_ERROR = 2  # exit code for a mistake of the caller
RESTART = 75  # EX_TEMPFAIL of sysexits.h: run the same command again


class UserError(ValueError):
    """A mistake of the caller: the message says what was given, what is needed, what to change."""

    code = USER_ERROR


class RetryableError(UserError):
    """A failure that running the same command again recovers from."""

    code = RESTART


def print_error(message: object) -> None:
    """Print one line on standard error in a single write, since other threads may write there."""
    sys.stderr.write(f"error: {' '.join(str(message).split())}\n")
    sys.stderr.flush()
