"""The dense model in a converted folder, and folders that have become dense models again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
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
    if hub.is_converted(config) and Path(name).is_dir():
        hub.check_safetensors(name)
        shapes = shapes_in(weight_files(Path(name)))
        dense = [f"{block.down}.weight" for block in hub.conversion_record(config).blocks]
        if is_stripped(shapes) and all(any(name.endswith(tensor) for name in shapes) for tensor in dense):
            return hub.without_record(config)
    return config
