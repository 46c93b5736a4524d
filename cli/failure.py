"""What ends the command early: one line on standard error, with the remedy, and an exit status."""

from enum import IntEnum

import click


class Status(IntEnum):
    """Exit statuses of every subcommand."""

    DONE = 0
    FAILED = 1  # refused, not found, or (`status`) degraded
    USAGE = 2
    UNREACHABLE = 3  # no answer from ipamd
    NOT_PERMITTED = 4  # this needs root


class Failure(click.ClickException):
    """Ends the command. `message` says what was wanted, what was found and what to do, in one line."""

    def __init__(self, message: str, status: Status = Status.FAILED) -> None:
        super().__init__(message)
        self.status = status


EPILOG = (
    "Exit status: 0 done (status: healthy), 1 refused or not found (status: degraded), 2 wrong usage, "
    "3 ipamd cannot be reached, 4 this needs root."
)
