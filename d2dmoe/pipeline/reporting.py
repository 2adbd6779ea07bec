"""The report at the end of a conversion: what it counts on the model, and its files in the folder to publish."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..data.batches import Batches
from ..errors import first_line
from ..files import write_text
from ..measure.usage import collect_usage
from ..report.conversions import USAGE
from ..report.page import PAGE, write_report

Say = Callable[[str], None]


def usage_of(
    model: PreTrainedModel, held_out: Batches | None, processor: Any, samples: int, say: Say
) -> dict[str, Any] | None:
    """Use of experts on a little held-out data; `None` without any."""
    found = None
    if held_out is not None:
        with _not_fatal(say):
            found = collect_usage(model, held_out, processor, samples=samples)
    return found


def add_report(folder: Path, name: str, usage: dict[str, Any] | None, say: Say) -> None:
    """Write `report.json`, `report.html` and, where matplotlib is, `report/*.png` into a folder that is complete else.

    Args:
        folder: Holds everything but the report.
        name: What the folder will be called.
        usage: From `usage_of`.
        say: Receives progress messages.
    """
    if usage is not None:
        write_text(folder / USAGE, json.dumps(usage, separators=(",", ":"), ensure_ascii=False) + "\n")
    with _not_fatal(say):
        write_report([folder], folder / PAGE, name=name)


@contextmanager
def _not_fatal(say: Say) -> Iterator[None]:
    """A fault in the report costs the report and not the conversion; a disk that is full is told as ever."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        say(f"without a report: {type(error).__name__}: {first_line(error)} (d2dmoe report DIR tries again)")
