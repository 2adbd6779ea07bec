"""The one error that is shown to the user as a sentence."""

from __future__ import annotations


class UserError(Exception):
    """A mistake the user can mend. The message is one sentence that says what was wrong and what to do next."""
