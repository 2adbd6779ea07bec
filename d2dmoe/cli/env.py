"""`d2dmoe env`."""

from __future__ import annotations

import argparse

from ..version import __version__
from .output import emit

NAME = "env"
HELP = "versions, machine and which kernel backends work here"


def add_flags(sub: argparse.ArgumentParser) -> None:
    """No flags of its own."""


def run(arguments: argparse.Namespace, command: list[str]) -> int:
    """Run the verb; returns the exit code."""
    from ..kernels import backends
    from ..report import machine, table

    facts = {"d2dmoe": __version__, **machine()}
    rows = [{"backend": name, "live": live, "why": why} for name, live, why in backends()]
    text = table(["fact", "value"], [[k, v] for k, v in facts.items()])
    text += "\n\n" + table(
        ["backend", "live", "why"], [[r["backend"], "yes" if r["live"] else "no", r["why"]] for r in rows]
    )
    emit(arguments, command, 0, rows, text)
    return 0
