"""Print the figures of a verb, and write them as JSON on request."""

from __future__ import annotations

import argparse


def emit(arguments: argparse.Namespace, command: list[str], seed: int, rows: list[dict], text: str) -> None:
    """Print the text, and write the rows to the file of `--json`."""
    from ..report import envelope, write_json

    print(text)
    if arguments.json:
        write_json(arguments.json, envelope(["d2dmoe", *command], seed, rows))
