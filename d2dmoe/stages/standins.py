"""Closed-form fits of what replaces skipped experts, checked on tokens that the fit has not seen.

With `H` the hidden activations of the experts that run, `S` the indicators of those that do not, and `x` the layer's
input, skipping loses `R = sum over skipped of E_e(x)`. The fit is one ridge regression of `R` on `[H, S, x]`: the
coefficients on `H` are a change of the down projection, those on `S` one constant vector per expert, those on `x` a
linear term. Moments are accumulated token block by token block; no activation is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..config.record import D2DMoEConfig
from ..measure.layer_inputs import LayerInputs
from ..measure.observe import EnoughSeen, release_memory
from ..moe.gating import gate_state
from ..moe.layer import DynamicFFN, layers
from ..progress import progress
from .ridge import ridge

RIDGES = (1e-3, 1e-2, 1e-1)  # relative to the diagonal
COLUMNS = 256  # of a Gram matrix computed at a time
HELD_OUT_EVERY = 5  # one block of tokens in five is for checking
MEMORY = 600 * 2**20  # bytes of moments held at a time, unless a single layer at a single budget takes more


@dataclass
class Moments:
    """Second moments of the regressors and of the target, `n` regressors and `d` outputs."""

    gram: torch.Tensor  # (n, n)
    cross: torch.Tensor  # (n, d)
    energy: float = 0.0
    tokens: int = 0

    @classmethod
    def empty(cls, n: int, d: int) -> Moments:
        """All zero."""
        return cls(torch.zeros(n, n), torch.zeros(n, d))

    def add(self, regressors: torch.Tensor, target: torch.Tensor) -> None:
        """Count the rows of ``(tokens, n)`` and ``(tokens, d)``; the part above the diagonal is left to `complete`."""
        rows = regressors.cpu()
        for start in range(0, rows.shape[1], COLUMNS):
            part = slice(start, start + COLUMNS)
            self.gram[start:, part].addmm_(rows[:, start:].T, rows[:, part])
        self.cross.addmm_(regressors.T.cpu(), target.cpu())
        self.energy += float(target.double().pow(2).sum())
        self.tokens += len(target)

    def complete(self) -> None:
        """Mirror the lower half of the Gram matrix, the only one that `add` has computed."""
        n = len(self.gram)
        for start in range(0, n, COLUMNS):
            part, below = slice(start, start + COLUMNS), slice(min(start + COLUMNS, n), n)
            self.gram[part, below] = self.gram[below, part].T

    def error(self, theta: torch.Tensor) -> float:
        """Squared error of `theta` ``(n, d)`` on these tokens."""
        return self.energy - 2 * _dot(theta, self.cross) + _dot(theta, self.gram @ theta.to(self.gram))

    def best_scale(self, theta: torch.Tensor) -> tuple[float, float]:
        """The shrinkage of `theta` ``(n, d)`` in [0, 1] with the least squared error on these tokens, and that error.

        A shrinkage of 0 is to replace skipped experts by nothing.
        """
        agreement, curvature = _dot(theta, self.cross), _dot(theta, self.gram @ theta.to(self.gram))
        scale = min(max(agreement / curvature, 0.0), 1.0) if curvature > 0 else 0.0
        return scale, self.energy - 2 * scale * agreement + scale**2 * curvature


def _dot(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() * b.double()).sum())


@dataclass
class Fit:
    """Coefficients of one layer at one budget, low-rank where they are stored so."""

    theta: torch.Tensor  # (width + experts + d_model, d)
    delta: tuple[torch.Tensor, torch.Tensor] | None
    linear: tuple[torch.Tensor, torch.Tensor] | None
    level: str = "zero"
    residual: float = 1.0  # held-out error as a share of what skipping loses


@torch.no_grad()
def fit_stand_ins(
    model: nn.Module, batches: Sequence, config: D2DMoEConfig, numbers: Sequence[int] | None = None,
    *, inputs: LayerInputs | None = None, penalties: Sequence[float] = RIDGES,
) -> None:  # fmt: skip
    """Fit and store the stand-ins of every layer, for some budgets of `config` or all, at their thresholds.

    Records in each budget, per layer, the level that did best on held-out tokens and the error it leaves.

    Args:
        model: Converted model.
        batches: Calibration batches.
        config: Its record.
        numbers: Of the budgets.
        inputs: The layers' inputs on these batches.
        penalties: Tried one after the other.
    """
    converted, inputs = layers(model), inputs or LayerInputs(model, batches)
    numbers = range(len(config.budgets)) if numbers is None else numbers
    for number in numbers:
        config.budgets[number].forget_fits()
    release_memory()
    groups = _groups(converted, numbers, alone=inputs.kept)
    for group in progress(groups, desc="stand-ins", disable=len(groups) < 2):
        moments = _accumulate(inputs, config, group, name="stand-ins" * (len(groups) < 2))
        for index, number in sorted(group & moments.keys()):
            fit = best_fit(*moments.pop((index, number)), converted[index], config, penalties)
            _store(converted[index], number, fit)
            config.budgets[number].note_fit(index, fit.level, round(fit.residual, 4))


def _groups(converted: list[DynamicFFN], numbers: Sequence[int], *, alone: bool = False) -> list[set[tuple[int, int]]]:
    """`(layer, budget)` pairs whose moments fit into memory together; if `alone`, of one layer at a time."""
    groups, room = [set()], MEMORY
    for index, layer in enumerate(converted):
        if alone:
            groups, room = [*groups, set()], MEMORY
        n = layer.block.slots + layer.block.experts + layer.block.d_model
        size = 2 * 4 * n * (n + layer.down_weight.shape[-1])
        for number in numbers:
            if size > room and groups[-1]:
                groups, room = [*groups, set()], MEMORY
            groups[-1].add((index, number))
            room -= size
    return [group for group in groups if group]


Pairs = dict[tuple[int, int], tuple[Moments, Moments]]  # (layer, budget) -> (to fit on, to check on)


def _accumulate(inputs: LayerInputs, config: D2DMoEConfig, group: set[tuple[int, int]], *, name: str) -> Pairs:
    """Moments of these layers and budgets, on the inputs that the layers have in the dense model."""
    moments: Pairs = {}
    turn: dict[int, int] = {}
    last = max(index for index, _ in group)

    def collect(index, layer, x, hidden, scores, run):
        turn[index] = turn.get(index, 0) + 1
        wanted = [number for i, number in group if i == index]
        if wanted:
            h = hidden.transpose(0, 1).reshape(len(x), -1).float()  # (tokens, width)
            down = layer.down_weight.float().reshape(h.shape[1], -1)
            router_scores = layer.router(x)
        for number in wanted:
            ran = gate_state(config, config.budgets[number].taus[index]).select(router_scores).float()
            kept = h * ran.repeat_interleave(h.shape[1] // ran.shape[1], dim=1)
            regressors = torch.cat([kept, 1 - ran, x.float()], dim=1)
            if (index, number) not in moments:
                moments[index, number] = tuple(Moments.empty(regressors.shape[1], down.shape[1]) for _ in range(2))
            moments[index, number][turn[index] % HELD_OUT_EVERY == 0].add(regressors, (h - kept) @ down)
        if index == last and turn[index] % layer.block.calls == 0:
            raise EnoughSeen

    inputs.observe(collect, name=name, only={index for index, _ in group})
    for pair in moments.values():
        for held in pair:
            held.complete()
    return moments


def best_fit(
    fit_on: Moments, check_on: Moments, layer: DynamicFFN, config: D2DMoEConfig, penalties: Sequence[float] = RIDGES
) -> Fit:
    """The level asked for, constants alone or nothing, whichever leaves least on held-out tokens; shrunk."""
    n, d = fit_on.cross.shape
    width, experts = layer.block.slots, layer.block.experts
    check = check_on if check_on.tokens else fit_on
    best = Fit(torch.zeros(n, d), None, None)
    if not fit_on.tokens or check.energy <= 0:
        return best
    ranks = {"constants": (0, 0), "refit": (layer.delta_rank, 0), "linear": (layer.delta_rank, layer.linear_rank)}
    for level in dict.fromkeys(("constants", config.stand_in)):
        for penalty in penalties:
            fit = _solve(fit_on, width, experts, *ranks[level], penalty)
            scale, error = check.best_scale(fit.theta)
            if error / check.energy < best.residual:
                best = _scaled(fit, scale, level, error / check.energy)
    return best


def _scaled(fit: Fit, scale: float, level: str, residual: float) -> Fit:
    delta = (scale * fit.delta[0], fit.delta[1]) if fit.delta else None
    linear = (scale * fit.linear[0], fit.linear[1]) if fit.linear else None
    return Fit(scale * fit.theta, delta, linear, level, residual)


def _solve(m: Moments, width: int, experts: int, delta_rank: int, linear_rank: int, penalty: float) -> Fit:
    """Ridge regression; the linear term, then the change of the down projection cut to low rank, the rest refitted."""
    neurons, constants = slice(0, width), slice(width, width + experts)
    inputs, rest = slice(width + experts, None), slice(0, width + experts)
    theta = torch.zeros(m.cross.shape, dtype=torch.float64)
    linear = delta = None
    if linear_rank:
        theta[:] = _ridge(m, slice(None), theta, penalty)
        linear = _cut(m, inputs, theta, linear_rank)
        theta[inputs] = linear[0] @ linear[1]
    if delta_rank:
        theta[rest] = 0
        theta[rest] = _ridge(m, rest, theta, penalty)
        delta = _cut(m, neurons, theta, delta_rank)
        theta[neurons] = delta[0] @ delta[1]
    theta[constants] = 0
    theta[constants] = _ridge(m, constants, theta, penalty)
    return Fit(theta, delta, linear)


def _ridge(m: Moments, part: slice, others: torch.Tensor, penalty: float) -> torch.Tensor:
    """Coefficients of some regressors, given those of the others ``(n, d)`` (zero in `part`)."""
    left, given = m.cross[part].double(), others.any(dim=1).nonzero().flatten().tolist()
    if given:
        rows = slice(given[0], given[-1] + 1)
        left -= (m.gram[part, rows] @ others[rows].to(m.gram)).double()
    return ridge(m.gram[part, part], left, penalty)


def _cut(m: Moments, part: slice, theta: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Best rank-`rank` factors of some coefficients in the sense of the outputs they make."""
    coefficients = theta[part]
    outputs = coefficients.T @ (m.gram[part, part] @ coefficients.to(m.gram)).double()
    _, vectors = torch.linalg.eigh((outputs + outputs.T) / 2)
    basis = vectors[:, -rank:]
    return coefficients @ basis, basis.T


def _store(layer: DynamicFFN, number: int, fit: Fit) -> None:
    """Write one fit into the layer's parameters."""
    block = layer.block
    constants = fit.theta[block.slots : block.slots + block.experts]
    layer.constants.data[number] = constants.to(layer.constants)
    for factors, first, second in (
        (fit.delta, layer.delta_in, layer.delta_out),
        (fit.linear, layer.linear_in, layer.linear_out),
    ):
        if first is not None:
            first.data[number] = 0 if factors is None else factors[0].reshape(first.shape[1:]).to(first)
            second.data[number] = 0 if factors is None else factors[1].to(second)


@torch.no_grad()
def fit_means(
    model: nn.Module, batches: Sequence, config: D2DMoEConfig, numbers: Sequence[int],
    *, inputs: LayerInputs | None = None,
) -> None:  # fmt: skip
    """Conditional means: `c_e` = mean of `E_e(x)` over the calibration tokens that skip `e`, for some budgets.

    Only sums of hidden activations are kept, ``(budgets, E, s)``; the down projection is applied once at the end.
    """
    sums: dict[int, torch.Tensor] = {}
    counts: dict[int, torch.Tensor] = {}

    def collect(index, layer, x, hidden, scores, run):
        router_scores = layer.router(x)
        for row, number in enumerate(numbers):
            skipped = ~gate_state(config, config.budgets[number].taus[index]).select(router_scores)  # (tokens, E)
            if index not in sums:
                shape = (len(numbers), *hidden.shape[::2])
                sums[index] = torch.zeros(shape, dtype=torch.float64, device=x.device)
                counts[index] = torch.zeros(shape[:2], dtype=torch.float64, device=x.device)
            sums[index][row] += torch.einsum("ets,te->es", hidden, skipped.to(hidden.dtype)).double()
            counts[index][row] += skipped.sum(0)

    (inputs or LayerInputs(model, batches)).observe(collect, name="stand-ins")
    for index, layer in enumerate(layers(model)):
        if index in sums:
            mean = sums[index] / counts[index].clamp_min(1)[..., None]
            fitted = torch.einsum("bes,esd->bed", mean, layer.down_weight.double())
            layer.constants.data[list(numbers)] = fitted.to(layer.constants)
