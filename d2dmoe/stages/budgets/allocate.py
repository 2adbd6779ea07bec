"""Share an active fraction out among the layers, by what skipping in each of them costs the model's output."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from torch import nn

from ...config.record import D2DMoEConfig
from ...data.batches import Batches
from ...measure.flops import dense_cost
from ...measure.observe import model_inputs, pieces
from ...moe.gating import gate_state
from ...moe.layer import layers
from .costs import Trial, output_costs

SPREAD = 3.0  # no layer gets less than a third of the average share
SLOPE = -5.0  # of log(cost) against the active fraction where there is only one budget to measure


def allocate(model: nn.Module, batches: Batches, config: D2DMoEConfig) -> Callable[[float], list[float]]:
    """Measure what skipping costs in each layer; returns the rule that shares an active fraction out among them.

    The cost of a layer at a budget is the distance from the dense model's output with the gate on in that layer alone.
    The costs of layers are taken to add up; experts are given out one at a time where the next one saves most per FLOP.

    Args:
        model: Converted model with thresholds and stand-ins fitted at equal shares.
        batches: Calibration batches.
        config: Its record, with budgets by rising active fraction.

    Returns:
        From an active fraction to that of every layer, their average being the fraction asked for.
    """
    costs = layer_costs(model, batches, config)
    measured = [budget.active for budget in config.budgets]
    actives = sorted(set(measured))  # goals that are searched for start at the same fraction
    costs = costs[:, [measured.index(active) for active in actives]]
    rows = dense_cost(model, model_inputs(model, next(pieces(batches)))).rows
    weights = [x.block.width * x.block.calls * count for x, count in zip(layers(model), rows, strict=True)]
    experts = [layer.block.experts for layer in layers(model)]
    return lambda active: share_out(active, actives, costs, experts, weights, config.shared_experts)


def layer_costs(model: nn.Module, batches: Batches, config: D2DMoEConfig) -> np.ndarray:
    """Cost for the output ``(layers, budgets)`` with the gate on in one layer at a time, see `output_costs`."""
    converted, budgets = layers(model), range(len(config.budgets))
    trials = [
        Trial(index, [layer], [gate_state(config, config.budgets[number].taus[index], number)])
        for index, layer in enumerate(converted)
        for number in budgets
    ]
    return output_costs(model, batches, converted, trials, "layer costs").reshape(len(converted), len(budgets))


def share_out(
    active: float,
    actives: Sequence[float],
    costs: np.ndarray,
    experts: Sequence[int],
    weights: Sequence[float],
    shared: int = 0,
) -> list[float]:
    """Active fractions by layer for an average of `active`.

    Args:
        active: The average wanted, weighted by the layers' widths and rows.
        actives: Fractions at which costs were measured, rising.
        costs: ``(layers, len(actives))``.
        experts: Experts of each layer.
        weights: Neurons of each layer, times its rows for each token.
        shared: Experts of each layer that always run.
    """
    least = [least_experts(active, count, shared) for count in experts]
    return give_out(active, cost_curves(actives, costs, experts), weights, least)


def least_experts(active: float, experts: int, shared: int = 0) -> int:
    """The experts that a layer gets in any case."""
    return min(max(1, shared, math.floor(active / SPREAD * experts)), experts)


def cost_curves(actives: Sequence[float], costs: np.ndarray, experts: Sequence[int]) -> list[list[float]]:
    """Cost of each layer with 0, 1, … experts, from its costs at some active fractions."""
    return [
        [_interpolate(actives, row, n / count) for n in range(count + 1)]
        for row, count in zip(costs, experts, strict=True)
    ]


def give_out(
    active: float, curves: Sequence[Sequence[float]], weights: Sequence[float], least: Sequence[int]
) -> list[float]:
    """Share work out, one unit after the other to whom it saves most per unit of work, see `savings`.

    Args:
        active: The share of all work to give out.
        curves: For each receiver its cost with 0, 1, … of its units; the last is everything.
        weights: Work of each receiver with all its units.
        least: Units that each receiver gets in any case.

    Returns:
        The share of each receiver's units.
    """
    counts, chosen = [len(curve) - 1 for curve in curves], list(least)
    sizes = [weight / count for weight, count in zip(weights, counts, strict=True)]
    hulls = [savings(curve[n:]) for curve, n in zip(curves, least, strict=True)]
    room = active * sum(weights) - sum(n * size for n, size in zip(chosen, sizes, strict=True))
    while True:
        gains = [
            saved[n - first] / size if n < count and size <= room + size / 2 else -1.0
            for saved, n, first, count, size in zip(hulls, chosen, least, counts, sizes, strict=True)
        ]
        best = int(np.argmax(gains))
        if gains[best] < 0:
            return [n / count for n, count in zip(chosen, counts, strict=True)]
        chosen[best] += 1
        room -= sizes[best]


def savings(curve: Sequence[float]) -> np.ndarray:
    """What each further unit saves on the lower convex hull of a curve, falling.

    On the curve itself a receiver whose next units save little would never be given those after them that save much
    (Shoham and Gersho, 1988, on sharing bits out).
    """
    corners = [0]
    for n in range(1, len(curve)):
        while len(corners) > 1 and _slope(curve, *corners[-2:]) >= _slope(curve, corners[-2], n):
            corners.pop()
        corners.append(n)
    return -np.diff(np.interp(np.arange(len(curve)), corners, [curve[n] for n in corners]))


def _slope(curve: Sequence[float], start: int, end: int) -> float:
    return (curve[end] - curve[start]) / (end - start)


def _interpolate(actives: Sequence[float], costs: np.ndarray, active: float) -> float:
    """Cost at an active fraction: log-linear between and beyond the measured ones, and nothing when everything runs."""
    logs = np.log(np.maximum.accumulate(np.maximum(costs, 1e-12)[::-1])[::-1])
    if active >= 1:
        return 0.0
    if active > actives[-1]:  # from the last point to zero at 1
        return float(np.exp(logs[-1]) * ((1 - active) / (1 - actives[-1])) ** 1.5)
    if len(actives) == 1:
        return float(np.exp(logs[0] + SLOPE * (active - actives[0])))
    if active < actives[0]:
        slope = (logs[1] - logs[0]) / (actives[1] - actives[0])
        return float(np.exp(logs[0] + min(slope, SLOPE / 5) * (active - actives[0])))
    return float(np.exp(np.interp(active, actives, logs)))
