"""The regulariser on a live model: forward hooks that turn hidden activations into one number for each block.

A hook computes its block's penalty at once, inside the forward pass of its layer, and keeps the number alone. So the
wide activations are not held longer than the layer holds them, and gradient checkpointing recomputes them with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers.activations import ACT2FN

from ..config.record import Block
from .masks import Sides, decoder_prefix, rows_kept
from .options import SparsityConfig
from .regularisers import REGULARISERS, locality

NEAR_ZERO = 0.01  # of the largest activation of the same token


class SparsityTerm:
    """Penalty and statistics of the hidden activations of a model's feed-forward blocks.

    Attributes:
        blocks: What is regularised.
        shares: While `counting`, sums over tokens of the shares of non-zero and of near-zero activations, and the
            number of tokens: ``(blocks, 3)``. Near zero is what is at most 1 % of the token's largest activation.
        blind: Whether blocks of a training model ran without gradients, as under reentrant checkpointing.
    """

    def __init__(self, model: nn.Module, blocks: list[Block], config: SparsityConfig):
        """Hook every block.

        Args:
            model: Not wrapped; adapters may be in place already.
            blocks: From `discover`, with paths that are the model's.
            config: Regulariser, what it looks at, and locality. `none` collects statistics alone.
        """
        self.model, self.blocks, self.config = model, blocks, config
        self.regulariser = REGULARISERS.get(config.regulariser)
        self.counting = self.blind = False
        self.shares = torch.zeros(len(blocks), 3)
        prefix = decoder_prefix(model)
        self._sides = ["decoder" if prefix and block.up.startswith(prefix) else "main" for block in blocks]
        self._masks: Sides = {"main": None, "decoder": None}
        self._collecting = False
        self._found: dict[str, list[torch.Tensor]] = {}
        self._half: dict[int, torch.Tensor] = {}
        self._handles = [handle for index in range(len(blocks)) for handle in self._hook(index)]

    def remove(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def collecting(self, masks: Sides) -> Iterator[dict[str, list[torch.Tensor]]]:
        """Collect the penalties of one forward pass.

        Args:
            masks: Of this batch, see `token_masks`.

        Yields:
            A mapping that holds, after the pass, for each side the means over its tokens, one scalar for each block and
            call.
        """
        self._masks, self._collecting, self._found, self.blind = masks, True, {}, False
        self._half.clear()
        try:
            yield self._found
        finally:
            self._collecting = False

    def _hook(self, index: int) -> list[torch.utils.hooks.RemovableHandle]:
        block = self.blocks[index]
        up = self.model.get_submodule(block.up)
        if block.kind == "glu" and not block.fused:
            gate = self.model.get_submodule(block.gate)
            return [
                up.register_forward_hook(lambda m, a, out: self._meet(index, "up", out)),
                gate.register_forward_hook(lambda m, a, out: self._meet(index, "gate", out)),
            ]
        return [up.register_forward_hook(lambda m, a, out: self._see(index, *self._halves(block, out)))]

    def _halves(self, block: Block, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not block.fused:
            return out, None
        first, second = out.chunk(2, dim=-1)
        return (first, second) if block.fused == "gate_up" else (second, first)

    def _meet(self, index: int, part: str, out: torch.Tensor) -> None:
        """Wait for the other one of two linear maps; which runs first is the model's choice."""
        other = self._half.pop(index, None)
        if other is None:
            self._half[index] = out
        else:
            self._see(index, *((out, other) if part == "gate" else (other, out)))

    def _see(self, index: int, z: torch.Tensor, up: torch.Tensor | None) -> None:
        """Pre-activations ``(…, neurons)`` of one call of a block, and the factor of a gated one."""
        if self._collecting and self.model.training and not torch.is_grad_enabled():
            self.blind = True
        training = torch.is_grad_enabled() and self.model.training and self.regulariser is not None
        if not training and not self._collecting:
            return
        z = z if z.dtype in (torch.float32, torch.float64) else z.float()
        kept = rows_kept(self._masks[self._sides[index]], z.numel() // z.shape[-1])
        if self.counting and self._collecting:  # not in an evaluation between two steps
            self._count(index, z.detach(), up, kept)
        if training:  # also while a checkpointed layer runs again: the same operations, in the same order
            penalty = self._penalty(index, z, up, kept)
            if self._collecting:
                self._found.setdefault(self._sides[index], []).append(penalty)

    def _activations(self, index: int, z: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
        """What the regulariser looks at, unless that is `z` itself. Computed anew: dropout may follow in the model."""
        a = ACT2FN[self.blocks[index].activation](z)
        return a * up.to(a.dtype) if up is not None and self.config.sparsify_on == "intermediate" else a

    def _penalty(self, index: int, z: torch.Tensor, up: torch.Tensor | None, kept: torch.Tensor | None) -> torch.Tensor:
        values = z if self.regulariser.before_activation else self._activations(index, z, up)
        penalty = _mean(self.regulariser.per_token(values).reshape(-1), kept)
        if self.config.locality and z.ndim == 3 and z.shape[1] > 1:
            mask = torch.ones(z.shape[:2], device=z.device) if kept is None else kept.reshape(z.shape[:2]).to(z)
            pairs = mask[:, :-1] * mask[:, 1:]
            apart = (locality(z) * pairs).sum() / mask.sum().clamp_min(1)  # per token, as everything else here
            penalty = penalty + self.config.locality * apart
        return penalty

    @torch.no_grad()
    def _count(self, index: int, z: torch.Tensor, up: torch.Tensor | None, kept: torch.Tensor | None) -> None:
        a = self._activations(index, z, None if up is None else up.detach()).flatten(0, -2).abs()
        a = a if kept is None else a[kept.bool()]
        nonzero = (a > 0).sum().double() / a.shape[-1]
        near = (a <= NEAR_ZERO * a.amax(-1, keepdim=True)).sum().double() / a.shape[-1]
        row = torch.stack([nonzero, near, torch.tensor(float(len(a)), dtype=torch.float64, device=a.device)])
        self.shares = self.shares.to(row)
        self.shares[index] += row


def _mean(values: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    """Mean over the rows that are kept; 0 where none is."""
    if kept is None:
        return values.mean()
    kept = kept.to(values)
    return (values * kept).sum() / kept.sum().clamp_min(1)
