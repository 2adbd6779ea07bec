"""What routers are told about each expert: one non-negative number per token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ...measure.observe import run_observed
from ...moe.gating import set_gate
from ...moe.layer import DynamicFFN, layers
from ...moe.router import expert_norms
from ..ridge import ridge

RIDGE = 1e-3  # relative to the diagonal


class RouterTarget:
    """Targets of one kind for all layers; statistics that it needs are gathered once.

    `norm`: L2 norm of the expert's output (the paper). `root`: its square root, with which small norms, that decide at
    large budgets, weigh more in a squared error. `centred`: of that less its mean over tokens. `nonlinear`: of
    what is left of it when the best linear map of the input is taken away, which a linear stand-in can replace.
    `activation`: sum of the expert's positive activations over the largest of them (MoEfication).
    """

    def __init__(self, model: nn.Module, batches: Sequence, kind: str):
        self.kind = kind
        self._maps: list[torch.Tensor] = []  # by layer, (E, d_model + 1, s): linear prediction of the activations
        if kind in ("centred", "nonlinear"):
            self._maps = _linear_maps(model, batches, inputs=kind == "nonlinear")

    def __call__(self, index: int, layer: DynamicFFN, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Targets ``(tokens, E)`` from a layer's inputs ``(tokens, d_model)`` and activations ``(E, tokens, s)``."""
        if self.kind == "activation":
            sums = hidden.clamp_min(0).sum(-1).T
            return sums / sums.amax(-1, keepdim=True).clamp_min(1e-12)
        if self._maps:
            hidden = hidden - _with_one(x) @ self._maps[index].to(x)
        norms = expert_norms(hidden, layer.down_weight)
        return norms.sqrt() if self.kind == "root" else norms


def _with_one(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, x.new_ones(len(x), 1)], dim=1)


@torch.no_grad()
def _linear_maps(model: nn.Module, batches: Sequence, *, inputs: bool) -> list[torch.Tensor]:
    """Least-squares maps from the layers' inputs and a constant, or from the constant alone, to their activations."""
    converted = layers(model)
    sums: dict[int, list[torch.Tensor]] = {}

    def collect(index, layer, x, hidden, scores, run):
        rows = _with_one(x.float() if inputs else torch.zeros_like(x, dtype=torch.float32))
        flat = hidden.float().transpose(0, 1).flatten(1)  # (tokens, E * s)
        for place, value in enumerate((rows.T @ rows, rows.T @ flat)):
            held = sums.setdefault(index, [torch.zeros_like(rows.T @ rows), torch.zeros_like(rows.T @ flat)])
            held[place] += value

    with set_gate(model, tau=0):
        run_observed(model, batches, collect, name="router targets")
    maps = []
    for index, layer in enumerate(converted):
        fitted = ridge(*sums.pop(index), RIDGE).float()
        maps.append(fitted.unflatten(1, (layer.block.experts, -1)).transpose(0, 1).contiguous())
    return maps
