"""Converted projections around attention in a model that is exported: plain maps, at the one setting that they get."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..config.projections import HEAD, Projection, ProjectionState
from ..config.record import D2DMoEConfig
from ..errors import UserError
from ..moe.projection import DynamicProjection, by_factors, projections

linear = nn.functional.linear


class LowRank(nn.Module):
    """Two factors for each section of the outputs; with the mean output, unless they stand in for some channels."""

    def __init__(self, layer: DynamicProjection, state: ProjectionState):
        super().__init__()
        first, second, constants = layer.factors(state)
        # a section of rank 0 is a constant, which a factor of zeros gives as well
        firsts = [a if len(a) else a.new_zeros(1, a.shape[1]) for a in first.split(state.ranks)]
        seconds = [q if q.shape[1] else q.new_zeros(len(q), 1) for q in second]
        self.factors, self.ranks = (torch.cat(firsts), seconds, constants), tuple(map(len, firsts))
        self.constant = state.method == "low-rank"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(…, inputs)`` to ``(…, outputs)``."""
        return by_factors(x, self.factors, self.ranks, self.constant)


class Heads(nn.Module):
    """One thin product, and heads of full width with zeros around it."""

    def __init__(self, layer: DynamicProjection, state: ProjectionState):
        super().__init__()
        self.weight, (self.places, *there), (self.bias,) = layer.factors(state)
        self.there = there[0] if there else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(…, inputs)`` to ``(…, outputs)``."""
        if self.there is None:
            return linear(x.index_select(-1, self.places), self.weight, self.bias)
        return linear(x, self.weight, self.bias).index_select(-1, self.places) * self.there


class Channels(nn.Module):
    """The dense map of the channels that run, and factors for the others. It saves no time outside our own kernels."""

    def __init__(self, layer: DynamicProjection, state: ProjectionState):
        super().__init__()
        self.weight, self.bias = layer.matrix().detach(), (*layer.factors(state)[2], None)[0]
        self.norms, self.threshold = layer.channel_norms, state.threshold
        self.others = LowRank(layer, state) if any(state.ranks) else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(…, inputs)`` to ``(…, outputs)``."""
        kept = x * (x.abs() * self.norms >= self.threshold)
        y = linear(kept, self.weight, self.bias)
        return y if self.others is None else y + self.others(x - kept)


class Dense(nn.Module):
    """The map as it was."""

    def __init__(self, layer: DynamicProjection):
        super().__init__()
        weight = layer.matrix()  # a view of the parameter where that is transposed
        self.weight, self.bias = weight if isinstance(weight, nn.Parameter) else weight.detach(), layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(…, inputs)`` to ``(…, outputs)``."""
        return linear(x, self.weight, self.bias)


def check_budgets(record: D2DMoEConfig, actives: Sequence[float]) -> None:
    """Check that the projections around attention do the same at all of these budgets.

    Raises:
        UserError: Naming two budgets at which one does not.
    """
    found = [_states(record, active) for active in actives]
    for active, states in zip(actives, found, strict=True):
        for (projection, state), (_, first) in zip(states, found[0], strict=True):
            if state != first:
                one = f"{actives[0]:g}"
                raise UserError(
                    f"{projection.name}, a projection around attention, does not do the same at the budgets {one} and "
                    f"{active:g}, and an export to OpenVINO holds one setting of each: name one budget, for instance "
                    f"--active {one}, leave the projections dense with --dense-projections, or convert with "
                    f"--attention-active and --no-compensate"
                )


def _states(record: D2DMoEConfig, active: float) -> list[tuple[Projection, ProjectionState]]:
    """What each projection around attention does at an active fraction."""
    states = record.projection_states(record.budgets.of_projections(active))
    return [(p, s) for p, s in zip(record.projections, states, strict=True) if p.role != HEAD]


@torch.no_grad()
def dense_maps(model: nn.Module, projections_too: bool = False) -> None:
    """Put the dense head in the place of a converted one, which OpenVINO would compute as a whole anyway.

    With `projections_too` put the dense projections in the places of converted ones.
    """
    wanted = [layer for layer in projections(model) if projections_too or layer.projection.role == HEAD]
    _replace(model, {layer: Dense(layer) for layer in wanted})


@torch.no_grad()
def plain_projections(model: nn.Module) -> None:
    """Put plain maps that do what the gates in force say in the places of all projections."""
    _replace(model, {layer: plain_projection(layer) for layer in projections(model)})


def plain_projection(layer: DynamicProjection) -> nn.Module:
    """A map that does what the gate in force says."""
    state = layer.gate_state
    if state.method == "dense":
        return Dense(layer)
    return {"low-rank": LowRank, "heads": Heads, "channels": Channels}[state.method](layer, state)


def _replace(model: nn.Module, plain: dict[DynamicProjection, nn.Module]) -> None:
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in plain:
            model.set_submodule(name, plain[module])
