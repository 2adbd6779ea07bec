"""The one error that is shown to the user as a sentence, and the part of other errors that is quoted in it."""

from __future__ import annotations


class UserError(Exception):
    """A mistake the user can mend. The message is one sentence that says what was wrong and what to do next."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text; the name of its class where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
