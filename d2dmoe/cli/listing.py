"""`d2dmoe list`."""

from __future__ import annotations

import argparse

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
    from .. import hub
    from ..discovery import discover, find_projections, skeleton
    from ..pipeline.plan import describe
    from ..report import list_table

    model_config = hub.read_config(arguments.model, arguments.revision)
    model = skeleton(hub.model_class(model_config, arguments.model), model_config)
    rows = describe(discover(model), find_projections(model))
    emit(arguments, command, 0, rows, list_table(rows))
    if not any(row["converted"] and row["kind"] != "attention" for row in rows):
        raise UserError(f"--model {arguments.model}: no feed-forward block found; give another model")
    return 0
