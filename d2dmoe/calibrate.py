"""From a budget to thresholds, and the closed-form fits of what stands in for skipped experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from .config import Budget, D2DMoEConfig
from .data import Batches
from .experts import layers
from .gating import set_gate, taus_on_curve
from .observe import ActiveCounter, run_observed
from .routing import GATES, select
from .standins import fit_stand_ins

GRID = (0.02, 0.05, 0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 0.95, 0.98)
BINS = 8192
REGRESSED = ("constants", "refit", "linear")
SEARCH_STEPS = 8
SEARCH_TOLERANCE = 0.005  # relative
SEARCH_TOKENS = 8192


def calibrate(model: nn.Module, batches: Sequence, config: D2DMoEConfig, actives: list[float], thresholds: str) -> None:
    """Fill `config.curve` and `config.budgets`, and the stand-ins of the model's layers.

    Args:
        model: Converted model with trained routers; `config` is the one it carries.
        batches: Calibration batches.
        config: Filled in place.
        actives: Active fractions to store, each in (0, 1).
        thresholds: `global` (one tau for all layers, as in the paper) or `per-layer`.
    """
    config.budgets = []
    config.curve = threshold_curve(model, batches, config.gate, thresholds)
    wanted = sorted({a for a in actives if a < 1})
    config.budgets = [Budget(active, taus_on_curve(config, active)) for active in wanted]
    fit_constants(model, batches, config)
    for budget in config.budgets:
        budget.taus, budget.measured = _search(model, batches, config, budget)
    if config.stand_in in REGRESSED:
        fit_stand_ins(model, batches, config)
        for budget in config.budgets:
            budget.taus, budget.measured = _search(model, batches, config, budget)
    else:
        fit_constants(model, batches, config)
    config.default_active = _nearest(wanted, 0.5) if wanted else 1.0


def _nearest(values: list[float], wanted: float) -> float:
    return min(values, key=lambda v: abs(v - wanted))


@torch.no_grad()
def threshold_curve(model: nn.Module, batches: Sequence, gate: str, thresholds: str) -> list[list]:
    """`[[active, [tau per layer]], …]`: quantiles of the gate's priorities on the inputs of the dense model."""
    count = len(layers(model))
    if gate == "topk":  # priorities are ranks, so the quantile is known
        return [[active, [1.0 - active] * count] for active in GRID]
    histograms = torch.zeros(count, BINS, dtype=torch.float64)

    def collect(index, layer, x, hidden, scores, run):
        priority = GATES[gate](layer.router(x).float())
        histograms[index] += torch.histc(priority, bins=BINS, min=0.0, max=1.0).double().cpu()

    with set_gate(model, tau=0):
        run_observed(model, batches, collect, name="thresholds")
    if thresholds == "global":
        histograms = histograms.sum(0, keepdim=True).expand(count, -1)
    above = histograms.flip(1).cumsum(1).flip(1) / histograms.sum(1, keepdim=True)  # share at or above each bin's start
    edges = torch.arange(BINS, dtype=torch.float64) / BINS
    curve = []
    for active in GRID:
        taus = [float(edges[int((above[i] >= active).sum()) - 1].clamp_min(0.5 / BINS)) for i in range(count)]
        curve.append([active, taus])
    return curve


@torch.no_grad()
def fit_constants(model: nn.Module, batches: Sequence, config: D2DMoEConfig) -> None:
    """Conditional means: `c_e` = mean of `E_e(x)` over the calibration tokens that skip `e`, for each stored budget.

    Only sums of hidden activations are kept, ``(budgets, E, s)``; the down projection is applied once at the end.
    """
    if config.stand_in == "zero":
        return
    sums: dict[int, torch.Tensor] = {}
    counts: dict[int, torch.Tensor] = {}

    def collect(index, layer, x, hidden, scores, run):
        router_scores = layer.router(x)
        for number, budget in enumerate(config.budgets):
            skipped = ~select(
                router_scores, config.gate, budget.taus[index], config.min_experts, config.max_experts
            )  # (tokens, E)
            if index not in sums:
                shape = (len(config.budgets), *hidden.shape[::2])
                sums[index] = torch.zeros(shape, dtype=torch.float64, device=x.device)
                counts[index] = torch.zeros(shape[:2], dtype=torch.float64, device=x.device)
            sums[index][number] += torch.einsum("ets,te->es", hidden, skipped.to(hidden.dtype)).double()
            counts[index][number] += skipped.sum(0)

    with set_gate(model, tau=0):
        run_observed(model, batches, collect, name="stand-ins")
    for index, layer in enumerate(layers(model)):
        if index in sums:
            mean = sums[index] / counts[index].clamp_min(1)[..., None]
            layer.constants.data = torch.einsum("bes,esd->bed", mean, layer.down_weight.double()).to(layer.constants)


def measure_active(model: nn.Module, batches: Sequence) -> float:
    """Active fraction of the model as it is set, over all layers and tokens."""
    counter = ActiveCounter()
    run_observed(model, batches, counter)
    return counter.fraction


def _search(model: nn.Module, batches: Sequence, config: D2DMoEConfig, budget: Budget) -> tuple[list[float], float]:
    """Thresholds along the curve whose active fraction, with the gate on in every layer, is the budget's."""

    def measure(point: float) -> float:
        budget.taus = taus_on_curve(config, point)
        with set_gate(model, active=budget.active):
            return measure_active(model, batches)

    batches = batches.first(SEARCH_TOKENS) if isinstance(batches, Batches) else batches
    if config.gate == "topk":
        return taus_on_curve(config, budget.active), measure(budget.active)
    point, value = bisect(measure, budget.active, low=GRID[0], high=1.0, start=budget.active)
    return taus_on_curve(config, point), value


def bisect(
    measure: Callable[[float], float], target: float, *, low: float, high: float, start: float
) -> tuple[float, float]:
    """Argument at which a rising function reaches `target`, within `SEARCH_TOLERANCE`; the best of the points tried."""
    point, best = start, (start, float("inf"))
    before: tuple[float, float] | None = None
    slope = 1.0  # the curve is nearly the identity; corrected by what is measured
    for _ in range(SEARCH_STEPS):
        value = measure(point)
        if abs(value - target) < abs(best[1] - target):
            best = (point, value)
        if abs(value - target) <= SEARCH_TOLERANCE * target:
            break
        low, high = (point, high) if value < target else (low, point)
        if before is not None:
            slope = (value - before[1]) / (point - before[0])
        before = (point, value)
        step = point + (target - value) / slope if slope > 0 else low
        point = step if low < step < high else (low + high) / 2
    return best
