"""Second moments of what projections read, and of the gradients at what they write."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..data.batches import Batches
from ..measure.observe import model_inputs, pieces, run_groups
from ..moe.gating import set_gate
from ..moe.projection import DynamicProjection, around_attention
from ..progress import progress

GRADIENT_TOKENS = (4096, 16384)  # of large and of small models; more than that brings little
GRADIENT_WORK = 2**42  # parameters times tokens between them


@dataclass
class InputMoments:
    """Of the tensor that a group of projections reads, double precision."""

    gram: torch.Tensor  # (inputs, inputs), sums
    total: torch.Tensor  # (inputs,), sums
    rows: int = 0

    @property
    def mean(self) -> torch.Tensor:
        """``(inputs,)``."""
        return self.total / max(self.rows, 1)

    @property
    def covariance(self) -> torch.Tensor:
        """``(inputs, inputs)``."""
        return self.gram / max(self.rows, 1) - torch.outer(self.mean, self.mean)


@torch.no_grad()
def input_moments(model: nn.Module, batches: Sequence) -> dict[int, InputMoments]:
    """Moments of each group, by its number, on the inputs that it has in the dense model. Padding is left out."""
    found: dict[int, InputMoments] = {}

    def collect(layer: DynamicProjection, x: torch.Tensor) -> None:
        group = layer.projection.group
        if group not in found:
            width = x.shape[-1]
            found[group] = InputMoments(torch.zeros(width, width, dtype=torch.double),
                                        torch.zeros(width, dtype=torch.double))  # fmt: skip
        x, moments = x.float(), found[group]
        moments.gram += (x.T @ x).cpu()
        moments.total += x.sum(0).cpu()
        moments.rows += len(x)

    with set_gate(model, active=1):
        run_groups(model, batches, collect, name="projections")
    return found


def gradient_moments(model: nn.Module, batches: Batches, *, seed: int = 0) -> list[torch.Tensor]:
    """For each projection the moments ``(outputs, outputs)`` of the gradients at its output, a row at a time.

    They are those of a loss whose Gauss-Newton matrix is that of the divergence from the dense model: labels drawn from
    the model's own distribution where it has logits (the Fisher matrix), else random directions of the hidden states.
    An error `e` of the output then costs about half of `e F e` of that divergence.
    """
    layers = around_attention(model)
    sums = [torch.zeros(x.projection.outputs, x.projection.outputs, device=model.device) for x in layers]
    generator, rows = torch.Generator().manual_seed(seed), 0
    with set_gate(model, active=1), _only_outputs_learn(model, layers, sums) as current:
        for batch in progress(list(pieces(batches.first(_gradient_tokens(model)))), desc="gradients"):
            mask = batch.get("attention_mask")
            current["mask"] = None if mask is None else mask.to(model.device)
            _probe(model(**model_inputs(model, batch)), current["mask"], generator).backward()
            rows += len(next(iter(batch.values()))) if mask is None else int(mask.sum())
    return [(total / max(rows, 1)).double().cpu() for total in sums]


def _gradient_tokens(model: nn.Module) -> int:
    least, most = GRADIENT_TOKENS
    return min(max(GRADIENT_WORK // max(sum(p.numel() for p in model.parameters()), 1), least), most)


def _probe(output: Any, mask: torch.Tensor | None, generator: torch.Generator) -> torch.Tensor:
    """The loss whose gradients have the wanted moments."""
    if "logits" in output:
        logs = output["logits"].float().log_softmax(-1)
        flat = logs.detach().exp().reshape(-1, logs.shape[-1]).cpu()
        labels = torch.multinomial(flat, 1, generator=generator).to(logs.device).reshape(*logs.shape[:-1], 1)
        each = logs.gather(-1, labels).squeeze(-1)
    else:
        hidden = next(v for v in output.values() if isinstance(v, torch.Tensor) and v.is_floating_point()).float()
        direction = torch.randn(hidden.shape, generator=generator).to(hidden.device)
        each = (hidden * direction).sum(-1) / hidden.detach().norm(dim=-1).clamp_min(1e-12)
    return (each * mask).sum() if mask is not None and mask.shape == each.shape else each.sum()


@contextmanager
def _only_outputs_learn(
    model: nn.Module, layers: list[DynamicProjection], sums: list[torch.Tensor]
) -> Iterator[dict[str, torch.Tensor | None]]:
    """Gradients for the outputs of projections and for nothing else; their moments are added to `sums`."""
    current: dict[str, torch.Tensor | None] = {"mask": None}
    anchor = torch.zeros((), device=model.device, dtype=model.dtype, requires_grad=True)
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def hook(total: torch.Tensor):
        def forward(_: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            output = output + anchor
            output.register_hook(lambda g: _add(total, g, current["mask"]))
            return output

        return forward

    handles = [layer.register_forward_hook(hook(total)) for layer, total in zip(layers, sums, strict=True)]
    for parameter, _ in before:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield current
    finally:
        for handle in handles:
            handle.remove()
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)


@torch.no_grad()
def _add(total: torch.Tensor, gradient: torch.Tensor, mask: torch.Tensor | None) -> None:
    rows = gradient.reshape(-1, gradient.shape[-1]).float()
    if mask is not None and mask.numel() == len(rows):
        rows = rows[mask.reshape(-1).bool()]
    total.addmm_(rows.T, rows)
