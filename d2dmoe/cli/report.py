"""`d2dmoe report`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import UserError
from .output import emit

NAME = "report"
HELP = "make report.html of a converted folder again, or put several conversions side by side on one page"


def add_flags(sub: argparse.ArgumentParser) -> None:
    """The verb's own flags."""
    sub.add_argument("folders", nargs="+", metavar="DIR", help="folder that convert has written")
    place = "page to write (default: report.html in the folder; of several folders, in the current one)"
    sub.add_argument("--output", metavar="FILE", help=place)


def run(arguments: argparse.Namespace, command: list[str]) -> int:
    """Run the verb; returns the exit code."""
    from ..report.page import PAGE, refresh_card, write_report

    folders = list(dict.fromkeys(arguments.folders))
    only = folders[0] if len(folders) == 1 else None
    output = Path(arguments.output or (Path(only) / PAGE if only else PAGE))
    if output.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--output {output}: the name must end in .html")
    try:
        files = write_report(folders, output)
        if only and not arguments.output:
            refresh_card(only)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror}); name another file") from None
    count = len(files) - 1
    pictures = f", and {count} picture{'s' * (count > 1)} in {output.with_suffix('')}" if count else ""
    emit(arguments, command, 0, [{"file": str(file)} for file in files], f"{output}{pictures}")
    return 0
