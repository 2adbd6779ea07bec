"""Small valid inputs for a model, from its config alone."""

from __future__ import annotations

import torch
from torch import nn


def dummy_inputs(model: nn.Module, samples: int = 2, length: int = 9) -> dict[str, torch.Tensor]:
    """Small valid inputs for a Hugging Face model, from its config and the signature of its forward."""
    import inspect

    config, device = model.config, next(model.parameters()).device
    accepted = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    generator = torch.Generator().manual_seed(0)

    def ids(vocabulary: int) -> torch.Tensor:
        return torch.randint(min(5, vocabulary - 1), vocabulary, (samples, length), generator=generator)

    text, vision = config.get_text_config(), getattr(config, "vision_config", getattr(config, "encoder", config))
    length = min(length, getattr(text, "max_position_embeddings", None) or length)
    inputs: dict[str, torch.Tensor] = {}
    if main == "pixel_values" or (hasattr(config, "vision_config") and "pixel_values" in accepted):
        size = getattr(vision, "image_size", 224)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        inputs["pixel_values"] = torch.randn(
            samples, getattr(vision, "num_channels", 3), height, width, generator=generator
        )
    if main == "input_features":
        frames = 2 * getattr(config, "max_source_positions", 1500)
        inputs[main] = torch.randn(samples, config.num_mel_bins, frames, generator=generator)
    if main == "input_values":
        inputs[main] = torch.randn(samples, 4000, generator=generator)
    if ("input_ids" in accepted and main not in inputs) or ("input_ids" in accepted and "pixel_values" in inputs):
        inputs["input_ids"] = ids(text.vocab_size)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = ids(config.get_text_config(decoder=True).vocab_size)
    dtype = next(model.parameters()).dtype
    return {k: v.to(device, dtype if v.is_floating_point() else None) for k, v in inputs.items()}
