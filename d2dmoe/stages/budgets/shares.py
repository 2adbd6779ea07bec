"""How the work of a budget is shared out among feed-forward blocks and the projections around attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import nn

from ...config.projections import ProjectionState
from ...config.record import D2DMoEConfig
from ...data.batches import Batches
from ...measure.flops import dense_cost, dense_ffn_flops
from ...measure.observe import model_inputs, pieces
from ...moe.layer import layers
from .allocate import allocate, cost_curves, give_out, layer_costs, least_experts
from .receivers import Receiver

TOGETHER = 0.0  # in place of a share of the projections' own


@dataclass
class Shares:
    """What everything gets at a budget.

    Attributes:
        blocks: Active fraction of each feed-forward block.
        states: Setting of each projection.
        ffn_active: Active fraction of all feed-forward blocks where it is not the budget's, else 0.
    """

    blocks: list[float]
    states: list[ProjectionState] = field(default_factory=list)
    ffn_active: float = 0.0


@dataclass
class Plan:
    """Which projections there are to share work with.

    Attributes:
        groups: With their costs measured.
        share: Share of the projections' work that runs at every budget, or `TOGETHER`: the budget holds for blocks
            and projections as a whole, and each gets what saves most.
        head: What the head does at every budget, where it is converted.
        text: What the groups' costs were measured on, and those of blocks that they are weighed against should be.
    """

    groups: list[Receiver] = field(default_factory=list)
    share: float = TOGETHER
    head: ProjectionState | None = None
    text: Batches | None = None

    def states(self, shares: Sequence[float]) -> list[ProjectionState]:
        """Settings of everything in the record, in its order, at shares of the groups' work."""
        found = {}
        for group, share in zip(self.groups, shares, strict=True):
            found |= group.settings(share)
        return [found[number] for number in sorted(found)] + [self.head] * (self.head is not None)


def even_shares(config: D2DMoEConfig, plan: Plan) -> Callable[[float], Shares]:
    """The same share for every block and every group."""

    def shares(active: float) -> Shares:
        wanted = plan.share or active
        return Shares([active] * len(config.blocks), plan.states([wanted] * len(plan.groups)))

    return shares


def best_shares(model: nn.Module, batches: Batches, config: D2DMoEConfig, plan: Plan) -> Callable[[float], Shares]:
    """Shares by what skipping costs the output, see `allocate`.

    Args:
        model: Converted model with thresholds and stand-ins fitted at equal shares.
        batches: Calibration batches.
        config: Its record, with budgets by rising active fraction.
        plan: The projections.
    """
    if not plan.groups or plan.share != TOGETHER:
        blocks, states = allocate(model, batches, config), _own_states(model, batches, plan)
        return lambda active: Shares(blocks(active), states)
    return _joint(model, batches, config, plan)


def _own_states(model: nn.Module, batches: Batches, plan: Plan) -> list[ProjectionState]:
    """The projections at their own share of their work."""
    if not plan.groups:
        return plan.states([])
    works = _works(model, batches, plan.groups)[1]
    return plan.states(give_out(plan.share, [g.curve() for g in plan.groups], works, [1] * len(plan.groups)))


def _works(model: nn.Module, batches: Batches, groups: Sequence[Receiver]) -> tuple[list[float], list[float]]:
    """Multiply-accumulates per token of each dense block, and of each group."""
    cost = dense_cost(model, model_inputs(model, next(pieces(batches))))
    blocks = [dense_ffn_flops(x) / 2 * rows for x, rows in zip(layers(model), cost.rows, strict=True)]
    rows = cost.projection_rows
    return blocks, [sum(macs * rows[n] for n, macs in group.macs_of().items()) for group in groups]


def _joint(model: nn.Module, batches: Batches, config: D2DMoEConfig, plan: Plan) -> Callable[[float], Shares]:
    groups = plan.groups
    costs = layer_costs(model, plan.text or batches, config)
    measured = [budget.active for budget in config.budgets]
    actives = sorted(set(measured))
    experts = [layer.block.experts for layer in layers(model)]
    curves = cost_curves(actives, costs[:, [measured.index(active) for active in actives]], experts)
    blocks, works = _works(model, batches, groups)
    neurons = [layer.block.width * layer.block.calls for layer in layers(model)]
    curves, works = [*curves, *(group.curve() for group in groups)], [*blocks, *works]

    def shares(active: float) -> Shares:
        least = [least_experts(active, count, config.shared_experts) for count in experts] + [1] * len(groups)
        found = give_out(active, curves, works, least)
        ours = found[: len(experts)]
        mean = sum(share * n for share, n in zip(ours, neurons, strict=True)) / sum(neurons)
        return Shares(ours, plan.states(found[len(experts) :]), mean)

    return shares
