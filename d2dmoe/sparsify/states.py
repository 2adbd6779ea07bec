"""Training states on disk: which of them are whole, and what makes a resumed training repeat an uninterrupted one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, set_seed

from ..files import write_text

COMPLETE = "complete"  # the file that lists what belongs to a training state, written last


class Marks(TrainerCallback):
    """Lists the files of a training state once all processes have written theirs."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called after everything is on disk."""
        processes = PartialState()
        processes.wait_for_everyone()
        if processes.is_main_process:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_text(folder / COMPLETE, json.dumps(_sizes(folder)))


class Epochs(TrainerCallback):
    """Seeds everything random at the start of each epoch, so that the order of its samples does not depend on where a
    resumed training came in, and is the same in all processes."""

    def __init__(self, collate: Any):
        self.collate = collate

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called before the samples are put in order."""
        epoch = int(state.epoch or 0)
        set_seed((args.seed * 1_000_003 + epoch) % 2**32)
        if hasattr(self.collate, "epoch"):
            self.collate.epoch = epoch


def last_complete(folder: Path) -> str | None:
    """The newest training state that is whole; newer ones, half written, and any that is half deleted are removed.

    The first process looks, and tells the others.
    """
    processes, found = PartialState(), [None]
    if processes.is_main_process:
        for state in sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2])):
            if found[0] is None and _whole(state):
                found[0] = str(state)
            elif found[0] is None or not _whole(state):
                shutil.rmtree(state)
    return broadcast_object_list(found)[0]


def any_state(work: Path) -> bool:
    """Whether a run could go on from what lies in this working folder."""
    return any(_whole(state) for state in (work / "training").glob("checkpoint-*"))


def _whole(folder: Path) -> bool:
    try:
        listed = json.loads((folder / COMPLETE).read_text())
    except (OSError, ValueError):
        return False
    present = _sizes(folder)
    return all(present.get(name) == size for name, size in listed.items())


def _sizes(folder: Path) -> dict[str, int]:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(COMPLETE))
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}
