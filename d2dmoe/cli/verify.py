"""`d2dmoe verify`."""

from __future__ import annotations

import argparse

from ..errors import UserError
from .output import emit

NAME = "verify"
HELP = "check that a converted folder is whole, and still the dense model"


def add_flags(sub: argparse.ArgumentParser) -> None:
    """The verb's own flags."""
    sub.add_argument("folder", metavar="DIR", help="folder that convert has written")


def run(arguments: argparse.Namespace, command: list[str]) -> int:
    """Run the verb; returns the exit code."""
    from ..pipeline.folder import check_folder
    from ..report import table

    rows = list(check_folder(arguments.folder))
    body = [[row["check"], "ok" if row["ok"] else "failed", row["found"]] for row in rows]
    emit(arguments, command, 0, rows, table(["check", "", "found"], body))
    if not rows[-1]["ok"]:
        raise UserError(f"{arguments.folder}: the check {rows[-1]['check']} failed: {rows[-1]['found']}")
    return 0
