"""Which rows of a batch are tokens and which are padding, for the encoder's and for the decoder's blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

IGNORED = -100  # the label that transformers leaves out of every loss
Sides = dict[str, torch.Tensor | None]


def decoder_prefix(model: nn.Module) -> str | None:
    """Module path of the decoder of an encoder-decoder model, with a final dot; `None` for any other model."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    decoder = model.get_decoder()
    return next((f"{name}." for name, module in model.named_modules() if module is decoder and name), None)


def token_masks(batch: Mapping[str, Any]) -> Sides:
    """Masks ``(batch, length)`` of the two sides, 1 for a token; `None` where nothing is padding.

    `main` is the encoder, or the whole model where there is one stack only. `decoder` comes from its own attention
    mask, or else from the labels, which are aligned with what the decoder reads.
    """
    labels = batch.get("labels")
    decoder = batch.get("decoder_attention_mask")
    if decoder is None and isinstance(labels, torch.Tensor) and labels.ndim == 2:
        decoder = labels != IGNORED
    main = batch.get("attention_mask")
    return {
        "main": main if isinstance(main, torch.Tensor) and main.ndim == 2 else None,
        "decoder": decoder if isinstance(decoder, torch.Tensor) and decoder.ndim == 2 else None,
    }


def token_counts(batch: Mapping[str, Any]) -> torch.Tensor:
    """Tokens of a batch on both sides, ``(2,)`` in the order main, decoder: the weights of its means in a larger batch.

    Where there is no mask every row counts alike, and the number of samples or of ids does as well.
    """
    main = batch.get("input_ids")
    if main is None:
        main = next(v for v in batch.values() if isinstance(v, torch.Tensor) and v.ndim)
    unmasked = main.numel() if main.ndim == 2 and not main.is_floating_point() else len(main)
    counts = []
    for mask in token_masks(batch).values():
        counts.append(float(unmasked if mask is None else mask.sum()))
    return torch.tensor(counts, dtype=torch.float64)


def rows_kept(mask: torch.Tensor | None, rows: int) -> torch.Tensor | None:
    """The mask as ``(rows,)``, or `None` where it does not speak of these rows (image patches, unpadded tokens)."""
    return mask.reshape(-1) if mask is not None and mask.numel() == rows else None
