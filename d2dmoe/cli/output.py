"""The figures of a verb: printed, and written as JSON if it was asked to."""

from __future__ import annotations

import argparse


def emit(arguments: argparse.Namespace, command: list[str], seed: int, rows: list[dict], text: str) -> None:
    """Print the text; write the rows where `--json` says."""
    from ..report import envelope, write_json

    print(text)
    if arguments.json:
        write_json(arguments.json, envelope(["d2dmoe", *command], seed, rows))
