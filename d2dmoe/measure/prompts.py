"""What a model is timed on: random tokens, or pieces of real text and images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .. import hub
from ..config.options import DataConfig
from ..data.reading import read_batches
from ..discovery.inputs import dummy_inputs
from ..discovery.positions import fit_to_positions
from ..errors import UserError

INPUTS = 8  # different ones, used in turn
Prompts = Callable[[nn.Module, int], list[dict[str, torch.Tensor]]]


def random_prompts(length: int) -> Prompts:
    """Texts of so many random tokens, or random images."""
    return lambda model, batch: [dummy_inputs(model, batch, length, seed) for seed in range(INPUTS)]


def real_prompts(name: str, config: Any, processor: Any, data: DataConfig, most: int) -> Prompts:
    """Texts that are joined and cut into pieces of `max_length` tokens, or of the model's limit; or images as they are.

    Args:
        name: The model: hub id or folder.
        config: Its config.
        processor: Its tokenizer or image processor.
        data: What to read, and the length.
        most: Samples of the largest batch.

    Raises:
        UserError: If the model reads and writes (an encoder-decoder), or the data cannot be read or is too little.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"--data {data.data}: an encoder-decoder is timed on random tokens; leave --data out")
    data = fit_to_positions(data, hub.model_class(config, name), config)
    wanted, facts = INPUTS * most * data.max_length, hub.token_facts(name, config)
    found = read_batches(replace(data, sequences="packed"), "all", processor, packed=True, tokens=wanted, **facts)
    items = [item for item in found.items if "image" in item or len(item["input_ids"]) == data.max_length]
    if len(items) < most:
        raise UserError(
            f"--data {data.data}: {len(items)} pieces of {data.max_length} tokens, and --batch {most} takes as many; "
            f"give more text, a shorter --length or a smaller --batch"
        )

    def prompts(model: nn.Module, batch: int) -> list[dict[str, torch.Tensor]]:
        like = next(model.parameters())
        batches = [found.collate(items[n * batch : (n + 1) * batch]) for n in range(min(INPUTS, len(items) // batch))]
        if "pixel_values" in batches[0]:
            return [{"pixel_values": inputs["pixel_values"].to(like)} for inputs in batches]
        return [{"input_ids": inputs["input_ids"].to(like.device)} for inputs in batches]

    return prompts
