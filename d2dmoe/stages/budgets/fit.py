"""Thresholds and stand-ins of one budget after another, at active fractions that are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from ...config.budgets import LEAST_ACTIVE
from ...config.record import D2DMoEConfig
from ...data.batches import Batches
from ...measure.layer_inputs import LayerInputs
from ...measure.observe import ActiveCounter, run_observed
from ...moe.gating import gate_state, set_gate
from ...moe.layer import layers
from ...moe.projection import projections
from ...progress import progress
from ..compensate import compensate, forget_refits, output_projections
from ..standins import RIDGES, fit_means, fit_stand_ins
from .search import SEARCH_TOLERANCE, bisect
from .shares import Shares

REGRESSED = ("constants", "refit", "linear")
SEARCH_TOKENS = 8192
ROUGH_PENALTIES = (1e-2,)
FIRST_TOKENS, FIRST_TOLERANCE = 4096, 0.02  # for thresholds that move once more after the fit of stand-ins
ROUGH_TOKENS, ROUGH_PER_REGRESSOR = 8192, 6  # for the fits that sharing out among the layers rests on


@dataclass
class BudgetFits:
    """Fits the budgets of a converted model; `config` is the record that the model carries.

    Attributes:
        batches: Calibration batches.
        shares: Shares a budget out among blocks and projections; equally at first.
        inputs: The layers' inputs on these batches.
        compensate: Refit output projections on what they get from the converted layers before them?
    """

    model: nn.Module
    batches: Sequence
    config: D2DMoEConfig
    shares: Callable[[float], Shares] | None = None
    inputs: LayerInputs | None = None
    compensate: bool = False

    def __post_init__(self) -> None:
        self.inputs = self.inputs or LayerInputs(self.model, self.batches)

    def place(self, number: int, active: float) -> None:
        """Give a budget an active fraction, and what blocks and projections do with their shares of it."""
        budget, curve = self.config.budgets[number], self.config.block_curve
        shares = Shares([active] * len(self.config.blocks)) if self.shares is None else self.shares(active)
        budget.active, budget.taus = active, curve.thresholds_by_block(shares.blocks)
        budget.ffn_active, budget.projection_states = shares.ffn_active, shares.states
        forget_refits(self.model, self.config, number)

    def fit(self, numbers: Sequence[int]) -> None:
        """Thresholds and stand-ins of some budgets. Stand-ins move what runs: thresholds are set before and after."""
        if self.config.stand_in == "mean":
            self.fit_stand_ins(numbers)
        again = self.config.stand_in in REGRESSED
        self.match_active(numbers, first=again)
        self.fit_stand_ins(numbers)
        refits = self.compensate and bool(output_projections(self.model))
        for number in numbers if refits else ():
            room = {"folder": self.inputs.folder, "memory": self.inputs.memory}
            compensate(self.model, self.batches, self.config, number, **room)
        if again or refits:
            self.match_active(numbers)

    def fit_roughly(self) -> None:
        """Stand-ins of all budgets on fewer tokens, enough to tell which layers skipping costs most."""
        regressors = max((x.block.slots + x.block.experts + x.block.d_model for x in layers(self.model)), default=0)
        tokens = max(ROUGH_TOKENS, ROUGH_PER_REGRESSOR * regressors)
        self.fit_stand_ins(range(len(self.config.budgets)), self.inputs.leading(tokens), ROUGH_PENALTIES)

    def fit_stand_ins(
        self, numbers: Sequence[int], inputs: LayerInputs | None = None, penalties: Sequence[float] = RIDGES
    ) -> None:
        """Stand-ins of some budgets at their thresholds, by default on all batches."""
        given = (self.model, self.batches, self.config, numbers)
        if self.config.stand_in == "mean":
            fit_means(*given, inputs=inputs or self.inputs)
        elif self.config.stand_in in REGRESSED:
            fit_stand_ins(*given, inputs=inputs or self.inputs, penalties=penalties)

    def match_active(self, numbers: Sequence[int], *, first: bool = False) -> None:
        """Move the thresholds of some budgets until the active fraction, with every gate on, is the budget's.

        Args:
            numbers: The budgets.
            first: They will be moved again: fewer tokens and a wider tolerance will do.
        """
        batches = leading(self.batches, FIRST_TOKENS if first else SEARCH_TOKENS)
        tolerance = FIRST_TOLERANCE if first else SEARCH_TOLERANCE
        for number in progress(numbers, desc="thresholds of budgets"):
            self._match_active(number, batches, tolerance)

    def _match_active(self, number: int, batches: Sequence, tolerance: float) -> None:
        config, curve = self.config, self.config.block_curve
        budget = config.budgets[number]
        before, wanted = budget.taus, budget.ffn_active or budget.active
        shares = [curve.active(index, tau) for index, tau in enumerate(before)]

        def move(point: float) -> None:
            scaled = [min(share * point / wanted, 1.0) for share in shares]
            budget.taus = before if point == wanted else curve.thresholds_by_block(scaled)

        def measure(point: float) -> float:
            move(point)
            for index, layer in enumerate(layers(self.model)):
                layer.gate_state = gate_state(config, budget.taus[index], number)
            for layer, state in zip(projections(self.model), config.projection_states(number), strict=True):
                layer.gate_state = state
            return measure_active(self.model, batches)

        with set_gate(self.model, tau=0):
            if config.gate == "topk" and not (config.min_experts or config.max_experts):
                budget.measured = measure(wanted)
                return
            low = LEAST_ACTIVE * min(1.0, wanted / max(shares))  # where every layer is at the curve's beginning
            point, budget.measured = bisect(measure, wanted, low=low, high=1.0, start=wanted, tolerance=tolerance)
            move(point)


def measure_active(model: nn.Module, batches: Sequence) -> float:
    """Active fraction of the model as it is set, over all layers and tokens."""
    counter = ActiveCounter()
    run_observed(model, batches, counter)
    return counter.fraction


def leading(batches: Sequence, tokens: int) -> Sequence:
    """The first tokens of `Batches`; any other sequence of batches as a whole."""
    return batches.first(tokens) if isinstance(batches, Batches) else batches
