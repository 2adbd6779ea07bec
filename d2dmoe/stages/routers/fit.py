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
from ...measure.layer_inputs import LayerInputs
from ...moe.layer import DynamicFFN, layers
from ..ridge import ridge
from .targets import RouterTarget

CANDIDATES = 512  # neurons tried per block, each with both signs
RIDGE = 1e-4  # relative to the diagonal
LEAST_SHARE = 1e-5  # of the square of a projection that lies on one side of 0


@torch.no_grad()
def fit_routers(
    model: nn.Module, batches: Sequence, config: RouterConfig, *, inputs: LayerInputs | None = None
) -> None:
    """Fit the routers of all layers in two passes over what they read.

    Args:
        model: Converted model; only its routers change.
        batches: Calibration batches.
        config: `router_target`, `seed`.
        inputs: The layers' inputs on these batches.
    """
    inputs = inputs or LayerInputs(model, batches)
    converted = layers(model)
    target = RouterTarget(model, batches, config.router_target)
    linear = _moments(inputs, target, [torch.eye(layer.block.d_model) for layer in converted], rectified=False)
    bases = []
    for index, layer in enumerate(converted):
        directions = ridge(*linear[index][:2], RIDGE).float().T  # (experts, d)
        rows = torch.cat([directions, _neurons(layer, config.seed * 1000 + index)])
        bases.append(torch.nn.functional.normalize(rows, dim=1))
    positive = _moments(inputs, target, bases, rectified=True)
    for index, layer in enumerate(converted):
        gram, cross = both_signs(bases[index].double(), *linear[index][:2], *positive[index])
        rows = torch.cat([bases[index], -bases[index]])
        chosen = select_features(gram, cross, layer.router.hidden.shape[0])
        layer.router.hidden.data.zero_()
        layer.router.score.data.zero_()
        layer.router.hidden.data[: len(chosen)] = rows[chosen].to(layer.router.hidden)
        weights = ridge(gram[chosen][:, chosen], cross[chosen], RIDGE).float()
        layer.router.score.data[:, : len(chosen)] = weights.T.to(layer.router.score)


def _neurons(layer: DynamicFFN, seed: int) -> torch.Tensor:
    """Input rows of some of the block's neurons ``(n, d_model)``, of the gate in a GLU."""
    weight = layer.up_weight if layer.gate_weight is None else layer.gate_weight
    rows = weight.data.float().cpu().transpose(1, 2).flatten(0, 1)[: layer.block.width]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return rows[order[:CANDIDATES]]


def _moments(inputs, target, bases, *, rectified) -> list[tuple[torch.Tensor, ...]]:
    """`(F^T F, F^T T)` of every layer's features against its router's targets, in double precision.

    The features `F` are products of the inputs `X` with the rows of a basis; rectified ones come with `X^T F` too.
    """
    experts, sums = [layer.block.experts for layer in layers(inputs.model)], []
    for basis, count in zip(bases, experts, strict=True):
        n, d = basis.shape
        shapes = [(n, n), (n, count), (d, n)] if rectified else [(n, n), (n, count)]
        sums.append(tuple(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    def collect(index, layer, x, hidden, scores, run):
        x = x.float()
        rows = (torch.relu(x @ bases[index].to(x.device).T) if rectified else x).cpu()
        others = [rows, target(index, layer, x, hidden).float().cpu()]
        for held, other in zip(sums[index], others, strict=False):
            held.add_((rows.T @ other).double())
        if rectified:
            sums[index][2].add_((x.cpu().T @ rows).double())

    inputs.observe(collect, name="routers")
    return sums


def both_signs(
    basis: torch.Tensor, inputs: torch.Tensor, targets: torch.Tensor, gram: torch.Tensor, cross: torch.Tensor,
    mixed: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Moments of `[relu(Z), relu(-Z)]` with `Z = X B^T`, from those of `relu(Z)` alone: `relu(-Z) = relu(Z) - Z`.

    Args:
        basis: Rows `B` ``(n, d)``, double like everything here.
        inputs: `X^T X` ``(d, d)``.
        targets: `X^T T` ``(d, targets)``.
        gram: `relu(Z)^T relu(Z)` ``(n, n)``.
        cross: `relu(Z)^T T` ``(n, targets)``.
        mixed: `X^T relu(Z)` ``(d, n)``.

    Returns:
        The Gram matrix ``(2 n, 2 n)`` and the moments with the targets ``(2 n, targets)``. A feature that next to never
        differs from 0 is all zero: what the subtraction leaves of it is rounding.
    """
    linear, ours = basis @ inputs @ basis.T, basis @ mixed  # Z^T Z, and Z^T relu(Z)
    negative = linear - ours - ours.T + gram
    between = gram - ours.T
    whole = torch.cat([torch.cat([gram, between], 1), torch.cat([between.T, negative], 1)])
    crosses = torch.cat([cross, cross - basis @ targets])
    silent = whole.diagonal() < LEAST_SHARE * linear.diagonal().repeat(2)
    return whole.masked_fill(silent[:, None] | silent, 0.0), crosses.masked_fill(silent[:, None], 0.0)


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
