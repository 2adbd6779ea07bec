"""What every budget adds to an output projection's last thin product and to its bias, see `stages.compensate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..config.projections import Projection, ProjectionState
from ..tensors import REFITS


def refit_shapes(projection: Projection) -> dict[str, tuple[int, ...]]:
    """Shapes of the added parameters; none where nothing is refitted."""
    p = projection
    shapes = (p.refits, p.refit_rank, p.outputs), (p.refits, p.outputs)
    return dict(zip(REFITS, shapes, strict=True)) if p.refits else {}


class Refitted:
    """The part of a `DynamicProjection` that holds refits."""

    projection: Projection
    weight: torch.Tensor
    refit_out: torch.Tensor
    refit_constant: torch.Tensor
    _parameters: dict[str, nn.Parameter | None]
    _note_names: Callable[[], None]

    def refit(self, state: ProjectionState, dtype: torch.dtype) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        """What a budget adds to the last thin product ``(outputs, thin)`` and the bias ``(outputs,)``; 0: nothing."""
        if state.refit < 0:
            return 0.0, 0.0
        thin = self.projection.thin(state.method, state.ranks)
        out = self.refit_out[state.refit, :thin].T.to(dtype) if thin else 0.0
        return out, self.refit_constant[state.refit].to(dtype)

    @torch.no_grad()
    def set_refit(
        self, states: Sequence[ProjectionState], number: int, out: torch.Tensor, constant: torch.Tensor
    ) -> None:
        """Store the refit of one of the budgets.

        Args:
            states: At all budgets.
            number: Of the budget.
            out: ``(thin, outputs)``.
            constant: ``(outputs,)``.
        """
        p = self.projection
        rank = max(p.refit_rank, len(out), 1, *(p.thin(s.method, s.ranks) for s in states))
        outs = self.weight.new_zeros(len(states), rank, p.outputs)
        constants = self.weight.new_zeros(len(states), p.outputs)
        if p.refits:
            outs[:, : p.refit_rank], constants[:] = self.refit_out, self.refit_constant
        outs[number], constants[number] = 0, constant.to(constants)
        outs[number, : len(out)] = out.to(outs)
        self.hold_refits(outs, constants)

    def hold_refits(self, out: torch.Tensor | None, constant: torch.Tensor | None) -> None:
        """Have these refits ``(budgets, refit_rank, outputs)`` and ``(budgets, outputs)``; `None`: have none."""
        p = self.projection
        p.refits, p.refit_rank = (0, 0) if out is None else out.shape[:2]
        for name, tensor in zip(REFITS, (out, constant), strict=True):
            self._parameters.pop(name, None)
            if tensor is not None:
                self._parameters[name] = nn.Parameter(tensor.detach().to(self.weight), requires_grad=False)
        self._note_names()

    def trim_refits(self, states: Sequence[ProjectionState]) -> None:
        """Keep no more rows of a refit than these settings use, and none where it changes nothing at all of them."""
        p = self.projection
        if p.refits and not (self.refit_out.any() or self.refit_constant.any()):
            self.hold_refits(None, None)
        elif p.refits:
            rank = max(1, *(p.thin(s.method, s.ranks) for s in states))
            self.hold_refits(self.refit_out[:, :rank].clone(), self.refit_constant)
