"""From what the user asks for to thresholds and fitted stand-ins."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from ...config.record import Budget, D2DMoEConfig
from ...config.sizes import Target
from ...data.batches import Batches
from ...errors import UserError
from ...kernels import dispatching
from ...measure.bench import speedup
from ...measure.evaluate import dense_flops_per_token, evaluate
from ...measure.flops import dense_ffn_flops, sparse_ffn_flops
from ...measure.observe import ActiveCounter, model_inputs, pieces, run_observed
from ...moe.gating import gate_state, set_gate, taus_on_curve
from ...moe.layer import layers
from ..standins import fit_means, fit_stand_ins
from .allocate import allocate
from .curve import GRID, active_on_curve, taus_by_layer, threshold_curve
from .search import bisect

REGRESSED = ("constants", "refit", "linear")
SEARCH_TOKENS = 8192
LOSS_TOKENS = 16_384
LOSS_ROUNDS = 6
SPEEDUP_TOLERANCE, SPEEDUP_MISS = 0.01, 0.05  # relative, in time: good enough; too slow
ROUGH_TOKENS, ROUGH_PER_REGRESSOR = 8192, 6  # for the fits that sharing out among the layers rests on
Shares = Callable[[float], list[float]]  # from an active fraction to that of every layer


@dispatching("sparse")
def calibrate(
    model: nn.Module,
    batches: Batches,
    config: D2DMoEConfig,
    targets: Sequence[Target],
    *,
    thresholds: str = "per-layer",
    allocation: str = "uniform",
    unseen: Batches | None = None,
    dense: Callable[[], nn.Module] | None = None,
) -> None:
    """Fill `config.curve` and `config.budgets`, and the stand-ins of the model's layers.

    Args:
        model: Converted model with trained routers; `config` is the one it carries.
        batches: Calibration batches.
        config: Filled in place.
        targets: Operating points to store, none of them "everything".
        thresholds: `global` (one tau for all layers, as in the paper) or `per-layer`.
        allocation: `uniform` or `sensitivity`, see `allocate`.
        unseen: Calibration batches that are in no fit, on which `max-loss` targets are measured.
        dense: Gives the dense model, against which `speedup` targets are measured.

    Raises:
        UserError: If a target is out of reach.
    """
    config.budgets = []
    config.curve = threshold_curve(model, batches, config, thresholds)
    config.budgets = [_first_guess(model, batches, config, target) for target in targets]
    config.budgets.sort(key=lambda budget: budget.active)
    config.default_active = 1.0
    shares: Shares = partial(_equal, len(config.blocks))
    if allocation == "sensitivity" and config.budgets and len(config.blocks) > 1:
        _fit_once(model, _leading(batches, _rough_tokens(model)), config, range(len(config.budgets)))
        shares = allocate(model, batches, config)
        for budget in config.budgets:
            budget.taus = taus_by_layer(config, shares(budget.active))
    searched = {str(target): target for target in targets if target.kind in ("max-loss", "speedup")}
    _fit(model, batches, config, [i for i, budget in enumerate(config.budgets) if budget.objective not in searched])
    for number, budget in enumerate(config.budgets):
        target = searched.get(budget.objective)
        if target and target.kind == "max-loss":
            _search_loss(model, batches, unseen or batches, config, number, target.value, shares)
        elif target:
            _search_speedup(model, batches, config, number, target.value, shares, dense())
    _sort(model, config)
    config.default_active = min((b.active for b in config.budgets), key=lambda a: abs(a - 0.5), default=1.0)


def _sort(model: nn.Module, config: D2DMoEConfig) -> None:
    """Budgets, and the stand-ins that belong to them, by rising active fraction."""
    order = sorted(range(len(config.budgets)), key=lambda number: config.budgets[number].active)
    config.budgets = [config.budgets[number] for number in order]
    for value in (value for layer in layers(model) for value in layer.stand_ins().values()):
        value.data = value.data[order]


def _first_guess(model: nn.Module, batches: Batches, config: D2DMoEConfig, target: Target) -> Budget:
    """The budget of a target, its active fraction exact except for `max-loss` and `speedup`."""
    if target.kind == "active":
        return Budget(target.value, taus_on_curve(config, target.value))
    active = active_for_flops(model, batches, config, target.value) if target.kind == "flops" else 0.5
    return Budget(active, taus_on_curve(config, active), objective=str(target))


def _equal(count: int, active: float) -> list[float]:
    return [active] * count


def _rough_tokens(model: nn.Module) -> int:
    """Tokens enough for the fits that only tell which layers skipping costs most."""
    regressors = max((x.block.slots + x.block.experts + x.block.d_model for x in layers(model)), default=0)
    return max(ROUGH_TOKENS, ROUGH_PER_REGRESSOR * regressors)


def _fit_once(model: nn.Module, batches: Batches, config: D2DMoEConfig, numbers: Sequence[int]) -> None:
    """Stand-ins of some budgets at their thresholds."""
    if config.stand_in == "mean":
        fit_means(model, batches, config, numbers)
    elif config.stand_in in REGRESSED:
        fit_stand_ins(model, batches, config, numbers)


def _fit(model: nn.Module, batches: Batches, config: D2DMoEConfig, numbers: Sequence[int]) -> None:
    """The same, and their thresholds set again before and after, because what stands in moves what runs."""
    if config.stand_in == "mean":
        _fit_once(model, batches, config, numbers)
    settle(model, batches, config, numbers)
    _fit_once(model, batches, config, numbers)
    if config.stand_in in REGRESSED:
        settle(model, batches, config, numbers)


def measure_active(model: nn.Module, batches: Sequence) -> float:
    """Active fraction of the model as it is set, over all layers and tokens."""
    counter = ActiveCounter()
    run_observed(model, batches, counter)
    return counter.fraction


def settle(model: nn.Module, batches: Batches, config: D2DMoEConfig, numbers: Sequence[int] | None = None) -> None:
    """Set the thresholds of some budgets or all again, after something else has changed what runs."""
    batches = _leading(batches, SEARCH_TOKENS)
    for number in range(len(config.budgets)) if numbers is None else numbers:
        _settle(model, batches, config, number)


def _settle(model: nn.Module, batches: Sequence, config: D2DMoEConfig, number: int) -> None:
    """Move the thresholds until the active fraction, with the gate on in every layer, is the budget's."""
    budget = config.budgets[number]
    before = budget.taus
    shares = [active_on_curve(config, index, tau) for index, tau in enumerate(before)]

    def measure(point: float) -> float:
        scale = point / budget.active
        budget.taus = before if scale == 1 else taus_by_layer(config, [min(share * scale, 1.0) for share in shares])
        for index, layer in enumerate(layers(model)):
            layer.gate_state = gate_state(config, budget.taus[index], number)
        return measure_active(model, batches)

    with set_gate(model, tau=0):
        if config.gate == "topk" and not (config.min_experts or config.max_experts):
            budget.measured = measure(budget.active)
            return
        point, budget.measured = bisect(measure, budget.active, low=GRID[0], high=1.0, start=budget.active)
        measure(point)


def _leading(batches: Sequence, tokens: int) -> Sequence:
    """So many tokens of `Batches`; of any other sequence of batches everything."""
    return batches.first(tokens) if isinstance(batches, Batches) else batches


def active_for_flops(model: nn.Module, batches: Batches, config: D2DMoEConfig, share: float) -> float:
    """Active fraction at which the whole model, routers and stand-ins included, has a share of the dense FLOPs.

    Raises:
        UserError: If no active fraction does; names the range.
    """
    converted = layers(model)
    total = dense_flops_per_token(model, model_inputs(model, next(pieces(batches))))
    before = sum(dense_ffn_flops(layer) for layer in converted)

    def whole(active: float) -> float:
        states = [gate_state(config, 0.5, 0) for _ in converted]
        costs = [sparse_ffn_flops(layer, active, state) for layer, state in zip(converted, states, strict=True)]
        return (total - before + sum(costs)) / total

    low, high = whole(GRID[0]), whole(GRID[-1])
    active = GRID[0] + (share - low) / (high - low) * (GRID[-1] - GRID[0])  # the count is linear in it
    if not GRID[0] <= active <= GRID[-1]:
        raise UserError(f"--flops {share:g}: this model reaches {low:.3f} to {high:.3f} of its dense FLOPs")
    return round(active, 6)


def relative_loss(model: nn.Module, batches: Batches, budget: int) -> float:
    """How much worse than dense, relative to dense: in nats for language models, in its metric for anything else."""
    row = evaluate(model, batches, [{"budget": budget}])[0]
    value, dense = row["metric"]["value"], row["dense"]["value"]
    if row["metric"]["name"] in ("perplexity", "masked_lm"):
        return math.log(value) / math.log(dense) - 1
    if row["metric"]["name"] == "kl_to_dense":
        return value
    return 1 - value / dense


def _search_loss(
    model: nn.Module, batches: Batches, unseen: Batches, config: D2DMoEConfig, number: int, target: float,
    shares: Shares,
) -> None:  # fmt: skip
    """Move a budget's active fraction, fitting its stand-ins anew, until it loses `target` on unseen batches."""
    budget, unseen = config.budgets[number], unseen.first(LOSS_TOKENS)

    def measure(active: float) -> float:
        budget.active, budget.taus = active, taus_by_layer(config, shares(active))
        _fit(model, batches, config, [number])
        budget.achieved = relative_loss(model, unseen, number)
        return -math.log(max(budget.achieved, 1e-6))  # rises with the active fraction, nearly straight

    point, _ = bisect(
        measure, -math.log(target), low=GRID[0], high=GRID[-1], start=budget.active, steps=LOSS_ROUNDS,
        tolerance=0.02 / max(abs(math.log(target)), 1e-3), slope=8.0,
    )  # fmt: skip
    if budget.active != point:
        measure(point)
    budget.active = round(point, 6)
    if budget.achieved > 1.5 * target:
        raise UserError(
            f"--max-loss {target:g}: at {point:.2f} active the loss on calibration text is {budget.achieved:.4f}"
        )


def _search_speedup(
    model: nn.Module, batches: Batches, config: D2DMoEConfig, number: int, target: float, shares: Shares,
    dense: nn.Module,
) -> None:  # fmt: skip
    """Move a budget's active fraction until the model is `target` times as fast as the dense one, and fit it there.

    What stands in for skipped experts takes the same time whatever its values, so it is fitted only at the end.
    """
    budget = config.budgets[number]

    def place(active: float) -> None:
        budget.active, budget.taus = active, taus_by_layer(config, shares(active))

    def faster() -> float:
        with set_gate(model, budget=number):
            return speedup(model, dense, batches)

    def measure(active: float) -> float:
        place(active)
        return 1 / faster()  # rises with the active fraction, nearly straight

    point, share = bisect(
        measure, 1 / target, low=GRID[0], high=GRID[-1], start=min(max(1 / target - 0.2, 0.1), 0.9),
        tolerance=SPEEDUP_TOLERANCE,
    )  # fmt: skip
    if share * target > 1 + SPEEDUP_MISS:
        raise UserError(
            f"--speedup {target:g}: at {point:.2f} active this model is {1 / share:.2f} times as fast as dense here, "
            f"on batches of {batches.batch_size}; ask for less, or for larger --batch-size and --max-length"
        )
    place(point)
    _fit(model, batches, config, [number])
    budget.active, budget.achieved = round(point, 6), round(faster(), 4)
