"""The one error that a user's mistake raises, and the exit codes of the command line."""

from __future__ import annotations


class UserError(Exception):
    """What the user brought cannot be used.

    Its text is one line: the file (or option), what was seen, what to do about it. The
    command line prints it without a traceback and exits with ``EXIT_FAILED``.
    """


class UsageError(UserError):
    """An option has a value that it cannot have. The command line exits with ``EXIT_USAGE``."""


def one_line(problem: BaseException) -> str:
    """The first line of what ``problem`` says; its class where it says nothing."""
    lines = str(problem).strip().splitlines()
    return lines[0] if lines else type(problem).__name__


EXIT_OK = 0
EXIT_FAILED = 1
"""At least one case or the whole command failed; the reason was printed."""
EXIT_USAGE = 2
"""The command line itself was wrong (unknown option, value out of range)."""
EXIT_INTERRUPTED = 130
"""Ctrl-C (128 + SIGINT)."""
EXIT_TERMINATED = 143
"""SIGTERM (128 + 15)."""
