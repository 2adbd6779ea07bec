"""How sparse the hidden activations of a dense model are."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ..config.record import Block
from ..data.batches import Batches
from ..measure.observe import model_inputs, pieces, trunk_below
from ..progress import progress
from .masks import token_masks
from .options import SparsityConfig
from .terms import SparsityTerm


@torch.no_grad()
def activation_shares(
    model: PreTrainedModel, blocks: list[Block], batches: Batches, *, on: str = "activation"
) -> list[dict[str, float]]:
    """Shares of hidden activations that are not zero, and that are at most 1 % of the token's largest one.

    Args:
        model: Dense model, in evaluation mode.
        blocks: Of that model.
        batches: What it runs on; padding is left out.
        on: For gated blocks, `activation` or `intermediate`.

    Returns:
        `{"block", "nonzero", "near_zero"}` for each block.
    """
    term = SparsityTerm(model, blocks, SparsityConfig(regulariser="none", sparsify_on=on))
    body = trunk_below(model, [block.up for block in blocks])
    term.counting = True
    try:
        for batch in pieces(progress(batches, desc="sparsity")):
            with term.collecting(token_masks(batch)):
                body(**model_inputs(body, batch))
    finally:
        term.remove()
    shares = term.shares[:, :2] / term.shares[:, 2:].clamp_min(1)
    return [
        {"block": block.name, "nonzero": float(nonzero), "near_zero": float(near)}
        for block, (nonzero, near) in zip(blocks, shares, strict=True)
    ]
