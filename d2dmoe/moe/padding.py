"""The zero neurons that fill up the last expert. They never count, whatever training or an adapter makes of them."""

from __future__ import annotations

import torch

from ..config.record import Block


def padding(block: Block) -> int:
    """Zero neurons at the end of the last expert."""
    return block.slots - block.width


def without_padding(hidden: torch.Tensor, *, block: Block) -> torch.Tensor:
    """Hidden activations ``(experts, tokens, size)`` with zeros for the zero neurons: these get no gradients either.

    An adapter adds a product of matrices to all rows of a packed weight, those of the zero neurons included, and no
    file keeps these rows.
    """
    if not padding(block):
        return hidden
    neurons = torch.arange(block.slots, device=hidden.device).view(block.experts, 1, block.size)
    return hidden.masked_fill(neurons >= block.width, 0)


def without_padding_rows(down_weight: torch.Tensor, block: Block) -> torch.Tensor:
    """The down projection ``(experts, size, d_out)`` with zero rows for the zero neurons; itself if they are zero."""
    count = padding(block)
    if not count:
        return down_weight
    if not torch.compiler.is_compiling() and not down_weight[-1, block.size - count :].any():
        return down_weight
    neurons = torch.arange(block.slots, device=down_weight.device).view(block.experts, block.size, 1)
    return down_weight.masked_fill(neurons >= block.width, 0)
