"""Fit the head: a basis of the last hidden states, its rank, and how many tokens get exact logits."""

from __future__ import annotations

import torch
from torch import nn

from ..config.projections import Projection, ProjectionState
from ..data.batches import Batches
from ..measure.observe import model_inputs, observing_projections, pieces
from ..moe.gating import set_gate
from ..moe.head import DynamicHead
from ..moe.projection import DynamicProjection, head_of
from ..progress import progress
from .bases import roots, set_basis

CANDIDATES = (0.003, 0.01, 0.03, 0.1)  # shares of the vocabulary that are tried
HELD_OUT = 1024  # rows on which they are compared
ROWS = 128  # rows at once
TOKENS = 8192


@torch.no_grad()
def fit_head(model: nn.Module, batches: Batches, share: float) -> ProjectionState:
    """Fit the basis of the head and store it in its layer.

    An error `e` of a hidden state costs ``e M e / 2`` of the divergence from the dense model, where `M` is
    ``W (diag(p) - p p) W`` with the model's probabilities `p`, averaged over rows. With `C` the covariance of the
    hidden states the best basis of rank `r` is then ``inverse(G) V V' G`` with ``G = M ** 0.5`` and `V` the first `r`
    eigenvectors of ``G C G``. How the work is divided between rank and candidates is tried out on the last rows.

    Args:
        model: Converted model.
        batches: Calibration batches.
        share: Multiply-accumulates that run, relative to the dense head's.

    Returns:
        What the head does at every budget.
    """
    head = head_of(model)
    hidden = _hidden_states(model, head, batches.first(TOKENS))
    last = max(min(HELD_OUT, len(hidden) // 4), 1)
    fitting, unseen = hidden[:-last] if len(hidden) > last else hidden, hidden[-last:]
    mean = fitting.mean(0)
    centred = fitting - mean
    root, inverse = roots(_output_moments(head, fitting).double().cpu(), 0.01)
    covariance = (centred.T @ centred / len(centred)).double().cpu()
    directions = torch.linalg.eigh(root @ covariance @ root)[1].flip(1)[:, : head.projection.rank]
    set_basis(head, inverse @ directions, directions.T @ root)
    head.output_mean.copy_(mean)
    settings = _settings(head.projection, share)
    losses = _divergences(head, unseen, settings)
    return settings[losses.index(min(losses))]


def _hidden_states(model: nn.Module, head: DynamicHead, batches: Batches) -> torch.Tensor:
    """``(rows, inputs)`` of what the head reads in the dense model, padding left out."""
    found: list[torch.Tensor] = []

    def collect(layer: DynamicProjection, x: torch.Tensor, _: torch.Tensor | None) -> None:
        if layer is head:
            found.append(x.float())

    with set_gate(model, active=1), observing_projections(model, collect) as current:
        for batch in pieces(progress(batches, desc="head")):
            current["mask"] = batch.get("attention_mask")
            model(**model_inputs(model, batch))
    return torch.cat(found)


def _output_moments(head: DynamicHead, hidden: torch.Tensor) -> torch.Tensor:
    """`M` of `fit_head`, ``(inputs, inputs)``."""
    weight = head.weight.float()
    mass, second = hidden.new_zeros(len(weight)), hidden.new_zeros(weight.shape[1], weight.shape[1])
    for rows in hidden.split(ROWS):
        probabilities = nn.functional.linear(rows.to(head.weight.dtype), head.weight, head.bias).float().softmax(-1)
        mass += probabilities.sum(0)
        expected = probabilities @ weight
        second -= expected.T @ expected
    for rows, masses in zip(weight.split(8192), mass.split(8192), strict=True):
        second += (rows * masses.unsqueeze(1)).T @ rows
    return second / len(hidden)


def _settings(projection: Projection, share: float) -> list[ProjectionState]:
    """Ways to divide a share of the head's work between rank and candidates."""
    found = []
    for part in CANDIDATES:
        candidates = max(1, round(part * projection.outputs))
        rank = min(projection.affordable_rank(share, candidates), projection.rank)
        if rank > 0:
            found.append(ProjectionState("svd-softmax", (rank,), candidates=candidates))
    return found or [ProjectionState("svd-softmax", (1,), candidates=1)]


def _divergences(head: DynamicHead, hidden: torch.Tensor, states: list[ProjectionState]) -> list[float]:
    """For each setting the Kullback-Leibler divergence of the dense distribution from its own, nats a row."""

    def logs(rows: torch.Tensor, state: ProjectionState) -> torch.Tensor:
        head.gate_state = state
        return head(rows).float().log_softmax(-1)

    totals, before = [0.0] * len(states), head.gate_state
    for rows in hidden.to(head.weight.dtype).split(ROWS):
        dense = logs(rows, ProjectionState())
        for number, state in enumerate(states):
            totals[number] += float((dense.exp() * (dense - logs(rows, state))).sum())
    head.gate_state = before
    return [total / len(hidden) for total in totals]
