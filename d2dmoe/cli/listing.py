"""`d2dmoe list`."""

from __future__ import annotations

import argparse
from contextlib import suppress

from ..errors import UserError
from .output import emit

NAME = "list"
HELP = "what would be converted in a model, what not, and why"


def add_flags(sub: argparse.ArgumentParser) -> None:
    """The verb's own flags."""
    sub.add_argument("--model", required=True, help="hub id or local folder")
    sub.add_argument("--revision", help="branch, tag or commit of a hub model")


def run(arguments: argparse.Namespace, command: list[str]) -> int:
    """Run the verb; returns the exit code."""
    from ..discovery import find_projections
    from ..discovery.head import find_head
    from ..pipeline.plan import check_fed, describe, none_found, survey
    from ..report import list_table
    from ..twin import read_dense_config

    model, discovery = survey(read_dense_config(arguments.model, arguments.revision), arguments.model)
    refused = None
    try:
        check_fed(model, discovery, arguments.model)
    except UserError as error:
        refused = error
    head = None
    with suppress(UserError):
        head = find_head(model)[0]
    rows = describe(discovery, find_projections(model) if discovery.blocks else None, head)
    emit(arguments, command, 0, rows, list_table(rows))
    if refused:
        raise refused
    if not any(row["converted"] for row in rows):
        raise UserError(f"--model {arguments.model}: {none_found(model, discovery)}; give another model")
    return 0
