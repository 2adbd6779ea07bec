"""From the goals of the user to budgets with thresholds and fitted stand-ins."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from ...config.record import D2DMoEConfig
from ...config.sizes import Target
from ...data.batches import Batches
from ...kernels import dispatching
from ...measure.layer_inputs import LayerInputs
from ...moe.layer import layers
from ...tensors import REFITS
from ..compensate import output_projections
from .curve import threshold_curve
from .fit import BudgetFits
from .goals import GOALS, Evidence, Goal
from .shares import Plan, best_shares, even_shares


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
    plan: Plan | None = None,
    inputs: LayerInputs | None = None,
    compensate: bool = False,
) -> None:
    """Fill `config.curve` and `config.budgets`, and the stand-ins of the model's layers.

    Args:
        model: Converted model with trained routers; `config` is the one it carries.
        batches: Calibration batches.
        config: Filled in place.
        targets: Operating points to store, none of them "everything".
        thresholds: `global` (one tau for all layers, as in the paper) or `per-layer`.
        allocation: `uniform` or `sensitivity`, see `allocate`.
        unseen: Calibration batches on which neither thresholds nor stand-ins are fitted, for `max-loss` targets.
            Routers may have been trained on them.
        dense: Gives the dense model, against which `speedup` targets are measured.
        plan: The projections around attention, and the head.
        inputs: The layers' inputs on the batches.
        compensate: Refit output projections on what they get from the converted layers before them.

    Raises:
        UserError: If a target is out of reach.
    """
    plan = plan or Plan()
    even = even_shares(config, plan)
    fits = BudgetFits(model, batches, config, even, inputs, compensate)
    goals = _goals(targets, fits, unseen or batches, dense, plan)
    config.budgets.replace([])
    config.curve = threshold_curve(model, batches, config, thresholds, inputs=fits.inputs)
    config.budgets.replace([goal.first_budget() for goal in goals])
    config.budgets.sort()
    config.default_active = 1.0
    receivers = len(config.blocks) + len(plan.groups)
    if allocation == "sensitivity" and config.budgets and receivers > 1:
        fits.fit_roughly()
        fits.shares = best_shares(model, batches, config, plan)
    if receivers > len(config.blocks) or fits.shares is not even or plan.head is not None:
        for number, budget in enumerate(config.budgets):
            fits.place(number, budget.active)
    searched = {number: goal for number, goal in _by_number(config, goals) if goal.searched}
    fits.fit([number for number in range(len(config.budgets)) if number not in searched])
    for number, goal in searched.items():
        goal.search(number)
    _sort(model, config)
    config.default_active = min(config.budgets.actives, key=lambda a: abs(a - 0.5), default=1.0)


@dispatching("sparse")
def calibrate_again(
    model: nn.Module,
    batches: Batches,
    config: D2DMoEConfig,
    targets: Sequence[Target],
    *,
    unseen: Batches | None = None,
    dense: Callable[[], nn.Module] | None = None,
) -> None:
    """Restore the active fractions of all budgets after training, and measure their objectives again.

    Arguments are those of `calibrate`. Distillation trains on all calibration batches, so the losses measured here are
    no longer those of unseen text.
    """
    fits = BudgetFits(model, batches, config)
    fits.match_active(range(len(config.budgets)))
    for number, goal in _by_number(config, _goals(targets, fits, unseen or batches, dense)):
        goal.measure(number)


def _goals(
    targets: Sequence[Target], fits: BudgetFits, unseen: Batches, dense: Callable[[], nn.Module] | None,
    plan: Plan | None = None,
) -> list[Goal]:  # fmt: skip
    evidence = Evidence(unseen, dense, plan or Plan())
    return [GOALS[target.kind](target, fits, evidence) for target in targets]


def _by_number(config: D2DMoEConfig, goals: list[Goal]) -> list[tuple[int, Goal]]:
    """The goals of the budgets that store an objective, with the numbers of the budgets."""
    named = {str(goal.target): goal for goal in goals}
    return [(n, named[budget.objective]) for n, budget in enumerate(config.budgets) if budget.objective in named]


def _sort(model: nn.Module, config: D2DMoEConfig) -> None:
    """Budgets, and the stand-ins that belong to them, by rising active fraction."""
    order = config.budgets.sort()
    refits = [getattr(x, name) for x in output_projections(model) if x.projection.refits for name in REFITS]
    for value in (*refits, *(value for layer in layers(model) for value in layer.stand_ins().values())):
        value.data = value.data[order]
