"""Routers without training: features chosen one by one, their weights by least squares.

A router is `|R2 relu(R1 x)|`. Candidates for the rows of R1 are the block's own neurons and the directions that
predict the experts' norms linearly, each with both signs. Orthogonal forward selection (Chen, Cowan & Grant 1991) keeps
those that together explain the targets best, and R2 is a ridge regression on them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ...config.options import RouterConfig
from ...measure.observe import run_observed
from ...moe.gating import set_gate
from ...moe.layer import DynamicFFN, layers
from ..ridge import ridge
from .targets import RouterTarget

CANDIDATES = 512  # neurons tried per block, each with both signs
RIDGE = 1e-4  # relative to the diagonal


@torch.no_grad()
def fit_routers(model: nn.Module, batches: Sequence, config: RouterConfig) -> None:
    """Fit the routers of all layers in two passes over the dense model.

    Args:
        model: Converted model; only its routers change.
        batches: Calibration batches.
        config: `router_target`, `seed`.
    """
    converted = layers(model)
    target = RouterTarget(model, batches, config.router_target)
    width = [layer.block.d_model for layer in converted]
    linear = _moments(model, batches, target, [torch.eye(d) for d in width], lambda x, basis: x @ basis.T)
    bases = []
    for index, layer in enumerate(converted):
        directions = ridge(*linear[index], RIDGE).float().T  # (experts, d)
        rows = torch.cat([directions, _neurons(layer, config.seed * 1000 + index)])
        rows = torch.nn.functional.normalize(rows, dim=1)
        bases.append(torch.cat([rows, -rows]))
    moments = _moments(model, batches, target, bases, lambda x, basis: torch.relu(x @ basis.T))
    for index, layer in enumerate(converted):
        gram, cross = moments[index]
        chosen = select_features(gram, cross, layer.router.hidden.shape[0])
        layer.router.hidden.data.zero_()
        layer.router.score.data.zero_()
        layer.router.hidden.data[: len(chosen)] = bases[index][chosen].to(layer.router.hidden)
        weights = ridge(gram[chosen][:, chosen], cross[chosen], RIDGE).float()
        layer.router.score.data[:, : len(chosen)] = weights.T.to(layer.router.score)


def _neurons(layer: DynamicFFN, seed: int) -> torch.Tensor:
    """Input rows of some of the block's neurons ``(n, d_model)``, of the gate in a GLU."""
    weight = layer.up_weight if layer.gate_weight is None else layer.gate_weight
    rows = weight.data.float().cpu().transpose(1, 2).flatten(0, 1)[: layer.block.width]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return rows[order[:CANDIDATES]]


def _moments(model, batches, target, bases, features) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """`(F^T F, F^T T)` of every layer's features against its router's targets, in double precision."""
    experts = [layer.block.experts for layer in layers(model)]
    sums = [
        (torch.zeros(len(basis), len(basis), dtype=torch.float64), torch.zeros(len(basis), count, dtype=torch.float64))
        for basis, count in zip(bases, experts, strict=True)
    ]

    def collect(index, layer, x, hidden, scores, run):
        rows = features(x.float(), bases[index].to(x.device)).cpu()
        sums[index][0].add_((rows.T @ rows).double())
        sums[index][1].add_((rows.T @ target(index, layer, x, hidden).float().cpu()).double())

    with set_gate(model, tau=0):
        run_observed(model, batches, collect, name="routers")
    return sums


def select_features(gram: torch.Tensor, cross: torch.Tensor, count: int) -> torch.Tensor:
    """Greedy choice of regressors, each the one that lowers the squared error most given those before it.

    Args:
        gram: ``(n, n)``, double.
        cross: ``(n, targets)``, double.
        count: How many.

    Returns:
        Their numbers, at most ``(count,)``; fewer where the rest adds nothing.
    """
    left, cross = gram.diagonal().clone(), cross.clone()
    floor = 1e-9 * left.max().clamp_min(1e-12)
    factor = torch.zeros(len(gram), 0, dtype=gram.dtype)
    chosen: list[int] = []
    while len(chosen) < min(count, len(gram)):
        gain = cross.square().sum(1) / left.clamp_min(floor)
        gain[left <= floor] = -1.0
        best = int(gain.argmax())
        if gain[best] <= 0:
            break
        column = (gram[:, best] - factor @ factor[best]) / left[best].sqrt()
        cross -= torch.outer(column, cross[best] / left[best].sqrt())
        left -= column.square()
        left[best] = 0.0
        factor = torch.cat([factor, column[:, None]], dim=1)
        chosen.append(best)
    return torch.tensor(chosen, dtype=torch.long)
