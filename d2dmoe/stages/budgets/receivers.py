"""Who shares the projections' work out, and what their ways cost the output, measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ...data.batches import Batches
from ...moe.projection import around_attention
from .costs import Trial, output_costs
from .heads import Attention, Heads, mixtures_of
from .projections import LEVELS, Group, channel_scores, falling

KINDS = {  # by `--attention`; `heads` where they can be narrower
    "low-rank": ("low-rank",),
    "channels": ("channels", "channels+"),
    "heads": ("low-rank", "heads"),
    "auto": ("low-rank", "channels", "channels+", "heads"),
}
Receiver = Group | Attention


@dataclass
class Measured:
    """The ways of all projections around attention, with their costs.

    Attributes:
        parts: What was measured.
        mixtures: Of the parts, for each set of projections that belong together, with their numbers.
    """

    parts: list[Group | Heads]
    mixtures: list[tuple[list[int], list[list[Group | Heads]]]]

    def receivers(self, attention: str) -> list[Receiver]:
        """Those that share the work out, and may take the ways of this key of `KINDS`."""
        kinds, found = KINDS[attention], []
        layers = {n: layer for part in self.parts for n, layer in zip(part.members, part.layers, strict=True)}
        for part in self.parts:
            if isinstance(part, Group):
                part.kinds = tuple(kind for kind in kinds if kind in part.costs)
        for members, mixtures in self.mixtures:
            plain, *others = mixtures
            if "heads" in kinds and others:
                found.append(Attention(members, [layers[n] for n in members], mixtures))
            else:
                found += plain
        return found


@torch.no_grad()
def measure_ways(
    model: nn.Module, batches: Batches, spectra: Sequence[list[torch.Tensor]], heads: Mapping[str, torch.Tensor],
    attention: str,
) -> Measured:  # fmt: skip
    """Measure the costs of the ways of a model whose bases are fitted: one part at a time at a level, the rest dense.

    Args:
        model: Converted model.
        batches: Calibration batches; the costs are measured on the last of them, see `output_costs`.
        spectra: Of the bases of its projections, see `attention.bases.Basis`.
        heads: Of its heads, see `attention.heads.fit_heads`.
        attention: Key of `KINDS`.
    """
    layers, kinds = around_attention(model), KINDS[attention]
    parts, mixtures = mixtures_of(layers, channel_scores(model, batches), spectra, heads if "heads" in kinds else {})
    for part in parts:
        part.kinds = tuple(kind for kind in part.kinds if kind in kinds)
    _measure(model, batches, parts)
    return Measured(parts, mixtures)


def _measure(model: nn.Module, batches: Batches, parts: Sequence[Group | Heads]) -> None:
    """Fill `costs`: with one part at a time at a level, everything else dense."""
    trials = [
        Trial(n, part.layers, part.states(level, kind))
        for n, part in enumerate(parts)
        for kind in part.kinds
        for level in LEVELS
    ]
    found = iter(output_costs(model, batches, [part.layers[0] for part in parts], trials, "projection costs").tolist())
    for part in parts:
        for kind in part.kinds:
            part.costs[kind] = falling([next(found) for _ in LEVELS])
