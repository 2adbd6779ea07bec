"""Refits of output projections, one after the other: each on what it gets from the converted layers before it, for
what it gives in the dense model. It then makes up for what was lost before it, as far as it can.

Bases are fitted on inputs as the dense model has them, and know nothing of each other's errors, which add up.
(Quantisation does likewise with weights: GPTAQ, arXiv 2504.02692.) For the stand-ins of feed-forward blocks the same
was tried and brought nothing (LAB.md, 2026-11-29).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import nn

from ..config.projections import ProjectionState
from ..config.record import D2DMoEConfig
from ..data.batches import Batches
from ..measure.walk import Rows, Walk
from ..moe.projection import DynamicProjection, around_attention
from ..progress import progress
from .ridge import ridge
from .standins import HELD_OUT_EVERY, RIDGES, Moments

ROUNDING = 1e-5  # of a moment: what sums in single precision may miss of it
Pairs = Iterable[tuple[Rows, Rows]]  # of each piece: what the layer reads and writes in the dense model, and converted


@torch.no_grad()
def compensate(
    model: nn.Module, batches: Batches, config: D2DMoEConfig, number: int, *, folder: Path | None = None,
    memory: int | None = None, penalties: Sequence[float] = RIDGES,
) -> None:  # fmt: skip
    """Refit the converted output projections of one budget, each on what it gets at that budget.

    The last thin product of each, and its constant (of `channels` that alone), by ridge regressions, of which the one
    counts that leaves least on tokens kept from it. Projections that run more than once in a forward pass stay as they
    are.

    Args:
        model: Converted model with thresholds and settings of projections.
        batches: Calibration batches.
        config: Its record.
        number: Of the budget.
        folder, memory: See `Walk`.
        penalties: Of the ridge regressions, tried one after the other.
    """
    found = [x for x in output_projections(model) if config.budgets[number].methods[x.number] != "dense"]
    if not found:
        return
    dense, ours = (Walk(model, batches, found, gate, folder, memory) for gate in ({"active": 1}, {"budget": number}))
    for layer in progress(ours.order, desc="output projections"):
        states = _states(layer, config)
        layer.set_refit(states, number, *_nothing(layer))
        pairs = zip(dense.at(layer), ours.at(layer), strict=True)
        *moments, offset = _moments(layer, states[number], pairs)
        theta = best_refit(*moments, penalties)
        layer.set_refit(states, number, theta[:-1], theta[-1] - offset.double() @ theta[:-1])


def output_projections(model: nn.Module) -> list[DynamicProjection]:
    """Those behind the heads."""
    return [layer for layer in around_attention(model) if layer.projection.role == "o"]


def forget_refits(model: nn.Module, config: D2DMoEConfig, number: int) -> None:
    """Refit nothing at one budget, whose settings of projections are new."""
    for layer in output_projections(model):
        if layer.projection.refits:
            layer.set_refit(_states(layer, config), number, *_nothing(layer))


def _states(layer: DynamicProjection, config: D2DMoEConfig) -> list[ProjectionState]:
    return [budget.projection_states[layer.number] for budget in config.budgets]


def _nothing(layer: DynamicProjection) -> tuple[torch.Tensor, torch.Tensor]:
    outputs = layer.projection.outputs
    return layer.weight.new_zeros(0, outputs), layer.weight.new_zeros(outputs)


def _moments(layer: DynamicProjection, state: ProjectionState, pairs: Pairs) -> tuple[Moments, Moments, torch.Tensor]:
    """Of what the last thin product gets less an offset, a one, and what is missing at the output.

    Returns:
        Moments of the pieces to fit on, and of those to check on; and the offset, about the mean: sums in single
        precision would not do with large ones.
    """
    p = layer.projection
    found = tuple(Moments.empty(p.thin(state.method, state.ranks) + 1, p.outputs) for _ in range(2))
    offset = None
    for turn, ((_, wanted), (x, given)) in enumerate(pairs, 1):
        thin = layer.thin(x, state).float()
        offset = thin.mean(0) if offset is None else offset
        regressors = torch.cat([thin - offset, thin.new_ones(len(thin), 1)], 1)
        found[turn % HELD_OUT_EVERY == 0].add(regressors, (wanted - given).float())
    for held in found:
        held.complete()
    return *found, offset.cpu()


def best_refit(fit_on: Moments, check_on: Moments, penalties: Sequence[float]) -> torch.Tensor:
    """Coefficients ``(n, outputs)``, of a constant last, that leave least on the tokens kept from the fit.

    Args:
        fit_on: Moments with a constant as the last regressor.
        check_on: The same of other tokens.
        penalties: On all but the constant.
    """
    check = check_on if check_on.tokens else fit_on
    best, least = torch.zeros(fit_on.cross.shape, dtype=torch.float64), check.energy
    gram, cross = fit_on.gram.double(), fit_on.cross.double()
    mean, constant = gram[-1, :-1] / max(fit_on.tokens, 1), cross[-1] / max(fit_on.tokens, 1)
    centred = gram[:-1, :-1] - torch.outer(mean, mean) * fit_on.tokens
    centred.diagonal().add_(ROUNDING * gram.diagonal()[:-1])
    tried = [torch.zeros_like(cross[:-1])]
    if len(centred):
        left = cross[:-1] - torch.outer(mean, constant) * fit_on.tokens
        tried += [ridge(centred, left, penalty) for penalty in penalties]
    for weights in tried:
        theta = torch.cat([weights, (constant - mean @ weights)[None]])
        scale, error = check.best_scale(theta)
        if error < least:
            best, least = scale * theta, error
    return best
