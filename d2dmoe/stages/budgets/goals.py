"""The goals of a budget: an active fraction, a share of the FLOPs, a bound on the loss, a speed-up."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from ...config.budgets import Budget
from ...config.projections import ProjectionState
from ...config.sizes import Target
from ...data.batches import Batches
from ...errors import UserError
from ...measure.bench import speedup
from ...measure.evaluate import evaluate
from ...measure.flops import dense_cost, dense_ffn_flops, sparse_ffn_flops
from ...measure.observe import model_inputs, pieces
from ...moe.gating import gate_state, set_gate
from ...moe.layer import layers
from .curve import GRID
from .fit import BudgetFits
from .search import bisect
from .shares import Plan

LOSS_TOKENS = 16_384
LOSS_ROUNDS = 6
SPEEDUP_TOLERANCE, SPEEDUP_MISS = 0.01, 0.05  # relative, in time: good enough; too slow


@dataclass
class Evidence:
    """Where goals are measured.

    Attributes:
        unseen: Calibration batches on which neither thresholds nor stand-ins are fitted, for losses.
        dense: Gives the dense model, for speed-ups.
        plan: The projections that take a share of the work.
    """

    unseen: Batches
    dense: Callable[[], nn.Module] | None = None
    plan: Plan = field(default_factory=Plan)
    _dense: nn.Module | None = field(default=None, repr=False)

    def dense_model(self) -> nn.Module:
        """The dense model, loaded once."""
        if self._dense is None:
            self._dense = self.dense()
        return self._dense


class Goal(ABC):
    """One operating point asked for: finds the active fraction that gives it, and measures what a budget gives."""

    searched = False  # by fitting or running budgets, or known beforehand?

    def __init__(self, target: Target, fits: BudgetFits, evidence: Evidence):
        self.target, self.value, self.fits, self.evidence = target, target.value, fits, evidence

    @abstractmethod
    def first_active(self) -> float:
        """Active fraction to begin with; the final one unless the goal is searched for."""

    def first_budget(self) -> Budget:
        """The budget to begin with, all layers at the same active fraction."""
        active, objective = self.first_active(), "" if self.target.kind == "active" else str(self.target)
        budget = Budget(active, self.fits.config.equal_thresholds(active), objective=objective)
        budget.projection_states = [ProjectionState()] * len(self.fits.config.projections)
        return budget

    def search(self, number: int) -> None:
        """Move a budget's active fraction until it meets the goal, and fit it there; by default it is there already.

        Raises:
            UserError: If the goal is out of reach.
        """
        self.fits.fit([number])

    def measure(self, number: int) -> None:
        """Set `achieved` of a budget as the model is now; by default there is no such figure."""
        self.fits.config.budgets[number].achieved = 0.0


class ActiveGoal(Goal):
    """`--active 0.4`."""

    def first_active(self) -> float:
        """The fraction asked for."""
        return self.value


class FlopsGoal(Goal):
    """`--flops 0.6`."""

    def first_active(self) -> float:
        """Fraction at which the whole model, routers and stand-ins included, has this share of the dense FLOPs.

        Raises:
            UserError: If no active fraction does; names the range.
        """
        model, config = self.fits.model, self.fits.config
        converted = layers(model)
        cost = dense_cost(model, model_inputs(model, next(pieces(self.fits.batches))))
        total, before = cost.total, cost.blocks(dense_ffn_flops(layer) for layer in converted)

        plan, projected = self.evidence.plan, cost.dense_projections(model)
        total_left = total - cost.saved_by_head(model, plan.head)

        def whole(active: float) -> float:
            state = gate_state(config, 0.5, 0)
            saved = before - cost.blocks(sparse_ffn_flops(x, active, state) for x in converted)
            return (total_left - saved - (1 - (plan.share or active)) * projected) / total

        low, high = whole(GRID[0]), whole(GRID[-1])
        active = GRID[0] + (self.value - low) / (high - low) * (GRID[-1] - GRID[0])  # the count is linear in it
        if not GRID[0] <= active <= GRID[-1]:
            raise UserError(f"--flops {self.value:g}: this model reaches {low:.3f} to {high:.3f} of its dense FLOPs")
        return round(active, 6)


class MaxLossGoal(Goal):
    """`--max-loss 1%`."""

    searched = True

    def first_active(self) -> float:
        """The middle."""
        return 0.5

    def search(self, number: int) -> None:
        """Fit thresholds and stand-ins anew at every fraction tried."""
        budget = self.fits.config.budgets[number]

        def closeness(active: float) -> float:
            self.fits.place(number, active)
            self.fits.fit([number])
            self.measure(number)
            return -math.log(max(budget.achieved, 1e-6))  # rises with the active fraction, nearly straight

        wanted = -math.log(self.value)
        point, _ = bisect(
            closeness, wanted, low=GRID[0], high=GRID[-1], start=budget.active, steps=LOSS_ROUNDS,
            tolerance=0.02 / max(abs(wanted), 1e-3), slope=8.0,
        )  # fmt: skip
        if budget.active != point:
            closeness(point)
        budget.active = round(point, 6)
        if budget.achieved > 1.5 * self.value:
            raise UserError(
                f"--max-loss {self.value:g}: at {point:.2f} active the loss on calibration text is "
                f"{budget.achieved:.4f}"
            )

    def measure(self, number: int) -> None:
        """The relative loss on text of no fit of thresholds or stand-ins."""
        unseen = self.evidence.unseen.first(LOSS_TOKENS)
        original = self.evidence.dense_model() if self.fits.config.networks else None
        self.fits.config.budgets[number].achieved = relative_loss(self.fits.model, unseen, number, original)


class SpeedupGoal(Goal):
    """`--speedup 1.5`."""

    searched = True

    def first_active(self) -> float:
        """The middle, for thresholds that give the stand-ins' costs."""
        return 0.5

    def search(self, number: int) -> None:
        """Fit only at the end: stand-ins take the same time whatever their values."""
        budget, batches = self.fits.config.budgets[number], self.fits.batches

        def share_of_time(active: float) -> float:
            self.fits.place(number, active)
            return 1 / self._factor(number)  # rises with the active fraction, nearly straight

        point, share = bisect(
            share_of_time, 1 / self.value, low=GRID[0], high=GRID[-1],
            start=min(max(1 / self.value - 0.2, 0.1), 0.9), tolerance=SPEEDUP_TOLERANCE,
        )  # fmt: skip
        if share * self.value > 1 + SPEEDUP_MISS:
            raise UserError(
                f"--speedup {self.value:g}: at {point:.2f} active this model is {1 / share:.2f} times as fast as "
                f"dense here, on batches of {batches.batch_size}; ask for less, or for larger --batch-size and "
                f"--max-length"
            )
        self.fits.place(number, point)
        self.fits.fit([number])
        budget.active = round(point, 6)
        self.measure(number)

    def measure(self, number: int) -> None:
        """The speed-up over the dense model on calibration batches."""
        self.fits.config.budgets[number].achieved = round(self._factor(number), 4)

    def _factor(self, number: int) -> float:
        with set_gate(self.fits.model, budget=number):
            return speedup(self.fits.model, self.evidence.dense_model(), self.fits.batches)


GOALS: dict[str, type[Goal]] = {
    "active": ActiveGoal, "flops": FlopsGoal, "max-loss": MaxLossGoal, "speedup": SpeedupGoal,
}  # fmt: skip


def relative_loss(model: nn.Module, batches: Batches, budget: int, original: nn.Module | None = None) -> float:
    """How much worse than dense, relative to dense: in nats for language models, in its metric for anything else.

    `original` is the dense model where the converted one does not hold it.
    """
    row = evaluate(model, batches, [{"budget": budget}], original=original)[0]
    value, dense = row["metric"]["value"], row["dense"]["value"]
    if row["metric"]["name"] in ("perplexity", "masked_lm"):
        return math.log(value) / math.log(dense) - 1
    if row["metric"]["name"] == "kl_to_dense":
        return value
    return 1 - value / dense
