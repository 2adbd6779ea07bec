"""What every neuron does on calibration tokens, as short sketches that a split can cluster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..config.record import Block
from ..measure.observe import model_inputs, pieces, real_rows, trunk_below
from ..moe.packing import Neurons
from ..progress import progress

SKETCH = 256  # numbers kept per neuron


class Profile(NamedTuple):
    """What the neurons of one block do: sketches ``(width, SKETCH)``, and magnitudes ``(width,)`` over tokens."""

    rows: torch.Tensor
    magnitudes: torch.Tensor

    def largest(self, count: int) -> torch.Tensor:
        """The neurons that contribute most on average."""
        return self.magnitudes.topk(count).indices


@torch.no_grad()
def activation_profiles(
    model: nn.Module, blocks: list[Block], batches: Sequence[dict[str, Any]], *, signed: bool, seed: int = 0
) -> dict[str, Profile]:
    """Sketch of each neuron's contribution over tokens, `|a_n(x)| ||w2_n||` or, signed, `(a_n(x) - mean) ||w2_n||`.

    A random projection of the token axis keeps distances between neurons (Johnson-Lindenstrauss) and takes
    ``(width, SKETCH)`` per block however many tokens there are. Rows are centred over tokens, which for the magnitudes
    too leaves what neurons do *together*, not how large they are on average.

    Args:
        model: Dense model in evaluation mode.
        blocks: Its blocks.
        batches: Calibration batches; padding is left out.
        signed: Keep the sign of the activation.
        seed: Of the projection.

    Returns:
        Profiles by block name.
    """
    generator = torch.Generator().manual_seed(seed)
    sums = {b.name: torch.zeros(b.width, SKETCH, dtype=torch.float64) for b in blocks}
    means = {b.name: torch.zeros(b.width, dtype=torch.float64) for b in blocks}
    projected = {b.name: torch.zeros(SKETCH, dtype=torch.float64) for b in blocks}
    tokens = dict.fromkeys(means, 0)
    current: dict[str, Any] = {}

    def watch(name: str):
        def hook(_: nn.Module, args: tuple) -> None:
            hidden = args[0].reshape(-1, args[0].shape[-1])
            wanted = real_rows(current.get("attention_mask"), len(hidden))
            hidden = hidden if wanted is None else hidden[wanted]
            hidden = hidden.float() if signed else hidden.float().abs()
            omega = torch.randn(len(hidden), SKETCH, generator=generator)
            sums[name] += (hidden.T.cpu() @ omega).double()
            means[name] += hidden.sum(0).double().cpu()
            projected[name] += omega.sum(0).double()
            tokens[name] += len(hidden)

        return hook

    handles = [model.get_submodule(b.down).register_forward_pre_hook(watch(b.name)) for b in blocks]
    try:
        for batch in pieces(progress(batches, desc="profiles")):
            current.update(attention_mask=batch.get("attention_mask"))
            inputs = model_inputs(model, batch)
            trunk_below(model, [b.down for b in blocks])(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    out = {}
    for block in blocks:
        centred = sums[block.name] - torch.outer(means[block.name] / max(tokens[block.name], 1), projected[block.name])
        norms = _down_norms(model, block)
        out[block.name] = Profile((centred * norms[:, None]).float(), means[block.name].abs() * norms)
    return out


def _down_norms(model: nn.Module, block: Block) -> torch.Tensor:
    """`||w2_n||` of every neuron ``(width,)``."""
    weight, layout = Neurons(model, block).dense()["down_weight"]
    return weight.detach().double().norm(dim=0 if layout == "down_linear" else 1).cpu()
