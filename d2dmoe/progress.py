"""Progress for long work: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress(iterable: Iterable | None = None, **options: Any) -> tqdm:
    """`tqdm` on standard error; where that is not a terminal, at most one line every 15 seconds."""
    interactive = sys.stderr.isatty()
    if os.environ.get("RANK", "0") != "0":  # of several processes the first shows it
        options["disable"] = True
    options = {"dynamic_ncols": True, "mininterval": 0.1 if interactive else 15, **options}
    if not interactive:
        options.setdefault("ascii", True)
    return tqdm(iterable, file=sys.stderr, **options)
