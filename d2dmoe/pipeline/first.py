"""The first stage of `convert --sparsify`: the training, in a folder of its own in the working folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.options import ConvertConfig
from ..errors import UserError
from ..measure.observe import release_memory
from ..sparsify.options import SparsifyConfig, sparsify_stage, training_arguments
from ..training import wait_for_everyone
from .sparsify import Job, prepare, sparsify

Say = Callable[[str], None]


@dataclass
class SparsifyStage:
    """The training that precedes the conversion, and the folder of its result."""

    config: SparsifyConfig
    training: dict[str, Any]
    job: Job

    @property
    def folder(self) -> str:
        """Folder of the complete sparsified dense model."""
        return self.config.output_dir

    def run(self, resume: bool, say: Say) -> dict[str, Any]:
        """Train, unless an earlier run got past this stage; returns what `sparsify` found."""
        results = Path(self.folder, "results.json")
        if not (resume and results.exists()):
            interrupted = Path(f"{self.folder}.partial").exists()
            wait_for_everyone()
            sparsify(self.config, self.training, resume=resume and interrupted, overwrite=True, say=say)
            release_memory()
        return {k: v for k, v in json.loads(results.read_text()).items() if k in ("task", "minutes", "rows", "log")}


def prepare_sparsify(config: ConvertConfig, work: Path) -> SparsifyStage:
    """The options and data of the training, checked before any long work."""
    own, training = check_sparsify(config, work)
    return SparsifyStage(own, training, prepare(own))


def check_sparsify(config: ConvertConfig, work: Path) -> tuple[SparsifyConfig, dict[str, Any]]:
    """The options of the training, checked; no data and no model is read.

    Raises:
        UserError: If one of them is wrong; it says that they are those with `--sparsify-` before them.
    """
    try:
        own, training = sparsify_stage(config, str(work / "sparsified"))
        training_arguments(training, own, str(work / "unused"))
    except UserError as error:
        raise UserError(f"sparsify, whose flags have --sparsify- before them: {error}") from None
    return own, training
