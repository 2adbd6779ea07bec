"""The dense model in a converted folder, and folders that have become dense models again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub import errors
from transformers import PreTrainedModel

from . import hub
from .tensors import is_stripped, shapes_in, weight_files


def open_dense(
    name: str, config: Any, dtype: torch.dtype | str = torch.float32
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The dense twin, and which tensors were missing, of another shape or unknown to it."""
    model, info = hub.model_class(config, name).from_pretrained(
        name, config=hub.without_record(config), dtype=dtype, output_loading_info=True
    )
    return model.eval(), info


def read_dense_config(name: str, revision: str | None = None) -> Any:
    """The config of a model to convert. A converted folder that lost its routers is the dense model once more.

    A program without d2dmoe saves such a folder: it keeps the record in `config.json`, and not the routers.

    Raises:
        UserError: As `hub.read_config`.
    """
    config = hub.read_config(name, revision)
    if hub.is_converted(config):
        hub.check_safetensors(name)
        shapes = shapes_in(weight_files(Path(name))) if Path(name).is_dir() else _shapes_on_hub(name, revision)
        dense = [f"{block.down}.weight" for block in hub.conversion_record(config).blocks]
        if is_stripped(shapes) and all(any(name.endswith(tensor) for name in shapes) for tensor in dense):
            return hub.without_record(config)
    return config


def _shapes_on_hub(name: str, revision: str | None = None) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a hub model, by the headers of its safetensors files; empty where they cannot be had.

    Only the headers are fetched. Without the hub those of an earlier download are read.
    """
    try:
        if not hub.local_only(name):
            files = huggingface_hub.get_safetensors_metadata(name, revision=revision).files_metadata.values()
            return {key: tuple(entry.shape) for file in files for key, entry in file.tensors.items()}
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, local_files_only=True, allow_patterns="*.safetensors"
        )
        return shapes_in(weight_files(Path(folder)))
    except (OSError, ValueError, errors.NotASafetensorsRepoError, errors.SafetensorsParsingError):
        return {}
