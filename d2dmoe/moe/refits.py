"""What every budget adds to an output projection's last thin product and to its bias, see `stages.compensate`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

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
    added_shapes: Callable[[], dict[str, tuple[int, ...]]]
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
        p, known = self.projection, [getattr(self, name, None) for name in REFITS]
        p.refits = len(states)
        p.refit_rank = max(p.refit_rank, len(out), 1, *(p.thin(s.method, s.ranks) for s in states))
        shapes = self.added_shapes()
        for name, value, new in zip(REFITS, known, (out, constant), strict=True):
            tensor = self.weight.new_zeros(shapes[name])
            if value is not None:
                tensor[tuple(map(slice, value.shape))] = value
            tensor[number] = 0
            tensor[number][tuple(map(slice, new.shape))] = new.to(tensor)
            self._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        self._note_names()

    def take_refits(self, states: Sequence[ProjectionState], tensors: Mapping[str, torch.Tensor]) -> None:
        """Those of another run, by name; none where there are none."""
        for number in range(len(states) if tensors else 0):
            self.set_refit(states, number, *(tensors[name][number] for name in REFITS))

    def trim_refits(self, states: Sequence[ProjectionState]) -> None:
        """Keep no more rows of a refit than these settings use, and none where it changes nothing at all of them."""
        p, known = self.projection, [getattr(self, name, None) for name in REFITS]
        if not p.refits:
            return
        changes = any(bool(value.any()) for value in known)
        p.refit_rank = max(1, *(p.thin(s.method, s.ranks) for s in states)) if changes else 0
        p.refits *= changes
        for name, tensor in zip(REFITS, known, strict=True):
            del self._parameters[name]
            if changes:
                kept = tensor[:, : p.refit_rank].clone() if tensor.dim() == 3 else tensor
                self._parameters[name] = nn.Parameter(kept, requires_grad=False)
        self._note_names()
