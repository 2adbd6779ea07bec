"""The calibration curve: which thresholds give which active fraction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ...config.budgets import LEAST_ACTIVE, Curve
from ...config.record import D2DMoEConfig
from ...kernels.gates import GATES
from ...measure.layer_inputs import LayerInputs
from ...moe.layer import layers

GRID = (
    LEAST_ACTIVE,
    0.02,
    0.05,
    0.1,
    0.125,
    0.15,
    0.2,
    0.25,
    0.3,
    0.4,
    0.5,
    0.6,
    0.7,
    0.75,
    0.8,
    0.9,
    0.95,
    0.98,
    0.99,
)
CURVE_TOKENS = 4096  # tokens of every layer whose priorities are kept for the quantiles


@torch.no_grad()
def threshold_curve(
    model: nn.Module, batches: Sequence, config: D2DMoEConfig, thresholds: str, *, inputs: LayerInputs | None = None
) -> Curve:
    """Quantiles of the gate's priorities on the inputs of the dense model, which are `inputs` if they are known."""
    converted, shared = layers(model), config.shared_experts
    if config.gate == "topk":  # priorities are ranks, so the quantile is known
        return Curve([[active, config.equal_thresholds(active)] for active in GRID])
    kept: list[list[torch.Tensor]] = [[] for _ in converted]
    stride = max(1, getattr(batches, "tokens", 0) // CURVE_TOKENS)

    def collect(index, layer, x, hidden, scores, run):
        kept[index].append(GATES[config.gate](layer.router(x[::stride]).float()[:, shared:]).cpu())

    collect.needs_hidden = False
    (inputs or LayerInputs(model, batches)).observe(collect, name="thresholds")
    pools = [torch.cat(rows).flatten().sort(descending=True).values for rows in kept]
    if thresholds == "global":
        pools = [torch.cat(pools).sort(descending=True).values] * len(pools)
    points = []
    for active in GRID:
        taus = []
        for layer, pool in zip(converted, pools, strict=True):
            share = (active * layer.block.experts - shared) / (layer.block.experts - shared)
            place = min(max(round(share * len(pool)) - 1, 0), len(pool) - 1)
            between = (pool[place] + pool[min(place + 1, len(pool) - 1)]) / 2  # away from where rounding decides
            taus.append(float(between.clamp_min(1e-12)))
        points.append([active, taus])
    return Curve(points)
