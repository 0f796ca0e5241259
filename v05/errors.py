"""Errors that are the user's to mend: the command line prints them without a traceback and exits with status 2."""

from __future__ import annotations


class InputError(ValueError):
    """Something given to a command is not allowed; the message says what, where and what is."""


class BadLine(InputError):
    """A line of a JSON Lines file is malformed.

    Attributes:
        path: the file as given.
        line: number of the line, from 1.
        reason: what is wrong and what is allowed.
    """

    def __init__(self, path: str, line: int, reason: str) -> None:
        super().__init__(f"{path}:{line}: {reason}")
        self.path, self.line, self.reason = path, line, reason
