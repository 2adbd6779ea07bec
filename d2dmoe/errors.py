"""The one error that is shown to the user as a sentence, and the part of other errors that is quoted in it."""

from __future__ import annotations

from collections.abc import Iterator


class UserError(Exception):
    """A mistake the user can mend. The message is one sentence that says what was wrong and what to do next."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text; the name of its class where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
