"""Small valid inputs for a model: from its config alone, or else from the data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import nn

from ..errors import UserError, first_line

Result = TypeVar("Result")
Batch = Mapping[str, torch.Tensor]


class NoInputsError(UserError):
    """A model runs on no inputs that could be found for it."""


def on_small_inputs(model: nn.Module, run: Callable[[dict[str, torch.Tensor]], Result], batch: Batch | None) -> Result:
    """What `run` gives for the first inputs on which the model runs.

    They are made from the config, with text alone where it takes images as well; else they are a corner of the batch.

    Args:
        model: A skeleton suffices.
        run: Gets keyword arguments of a forward pass, and raises what that raises.
        batch: A batch of the data, if there is one.

    Raises:
        NoInputsError: With the reasons why it runs on none of them.
    """
    reasons: dict[str, str] = {}
    for kind, make in _ways(model, batch):
        try:
            return run(make())
        except Exception as error:
            reasons.setdefault(kind, first_line(error))
    last = reasons.get("data")
    raise NoInputsError(
        f"{type(model).__name__} does not run on inputs made from its config ({reasons['config']})"
        + (f", nor on those of the data ({last})" if last else "")
    )


def _ways(model: nn.Module, batch: Batch | None) -> Iterator[tuple[str, Callable[[], dict[str, torch.Tensor]]]]:
    def text_alone() -> dict[str, torch.Tensor]:
        return {k: v for k, v in dummy_inputs(model).items() if k.endswith("input_ids")}

    yield "config", lambda: dummy_inputs(model)
    if getattr(model, "main_input_name", "") == "input_ids":
        yield "config", text_alone
    if batch is not None:
        yield "data", lambda: model_inputs(model, corner(batch))


def corner(batch: Batch) -> dict[str, torch.Tensor]:
    """The first two samples of a batch, of texts the first 16 tokens."""
    return {k: v[:2, :16] if v.ndim == 2 else v[:2] for k, v in batch.items()}


def model_inputs(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    """The inputs of a batch that the model's forward accepts, on its device. A decoder gets the encoder's tokens."""
    accepted = inspect.signature(model.forward).parameters
    inputs = {k: v for k, v in batch.items() if k in accepted and k != "labels"}
    if getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted and "input_ids" in inputs:
        inputs.setdefault("decoder_input_ids", inputs["input_ids"])
    first = next(model.parameters())
    return {k: v.to(first.device, first.dtype if v.is_floating_point() else None) for k, v in inputs.items()}


def dummy_inputs(model: nn.Module, samples: int = 2, length: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
    """Small valid inputs for a Hugging Face model, from its config and the signature of its forward.

    Args:
        model: A skeleton suffices.
        samples: Texts, images or recordings.
        length: Tokens of each text; fewer where the config has a lower limit.
        seed: Of the random values.
    """
    config, device = model.config, next(model.parameters()).device
    accepted = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    generator = torch.Generator().manual_seed(seed)

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
