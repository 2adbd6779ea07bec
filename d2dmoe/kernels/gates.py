"""The gates that turn scores into sets of experts, and the gradient of their choice."""

from __future__ import annotations

from collections.abc import Callable

import torch


def _better(scores: torch.Tensor) -> torch.Tensor:
    """Whether expert j comes before expert e, ``(tokens, e, j)``: without a stable sort, which ONNX does not have."""
    mine, other = scores[..., :, None], scores[..., None, :]
    number = torch.arange(scores.shape[-1], device=scores.device)
    return (other > mine) | ((other == mine) & (number[None, :] < number[:, None]))


def score_ranks(scores: torch.Tensor) -> torch.Tensor:
    """Rank of every expert, 0 for the highest score; ties go to the lower number. ``(tokens, experts)``."""
    if torch.onnx.is_in_onnx_export():
        return _better(scores).sum(-1)
    return torch.argsort(scores, dim=-1, descending=True, stable=True).argsort(dim=-1)


# A gate gives every expert a priority; expert e runs iff its priority reaches the threshold tau. At tau = 0 all run.
GateFunction = Callable[[torch.Tensor], torch.Tensor]


def max_priority(scores: torch.Tensor) -> torch.Tensor:
    """`r_e / max_j r_j` (the paper's dynamic-k rule, sec. 3.4)."""
    return scores / scores.amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)


def topk_priority(scores: torch.Tensor) -> torch.Tensor:
    """`1 - (rank + 0.5) / E`: at threshold tau the best `round((1 - tau) E)` experts run for every token."""
    return 1.0 - (score_ranks(scores).to(scores.dtype) + 0.5) / scores.shape[-1]


def share_priority(scores: torch.Tensor) -> torch.Tensor:
    """`r_e / ||r||_2`: an expert's share of the scores' norm."""
    return scores / scores.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)


def topp_priority(scores: torch.Tensor) -> torch.Tensor:
    """`1 - p`, p the share of the scores' sum held by better experts: the smallest set with share `1 - tau` runs."""
    if torch.onnx.is_in_onnx_export():
        before = (_better(scores).to(scores.dtype) @ scores[..., None])[..., 0]
        return 1 - before / scores.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    priority = 1 - before / ordered.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
    return torch.empty_like(scores).scatter_(-1, order, priority)


def absolute_priority(scores: torch.Tensor) -> torch.Tensor:
    """`r_e` itself: the one gate whose thresholds have a scale, that of the experts' outputs."""
    return scores


GATES: dict[str, GateFunction] = {
    "max": max_priority,
    "share": share_priority,
    "topk": topk_priority,
    "topp": topp_priority,
    "absolute": absolute_priority,
}


def select(
    scores: torch.Tensor, gate: str, tau: float, min_experts: int = 0, max_experts: int = 0, shared: int = 0
) -> torch.Tensor:
    """Which experts run.

    Args:
        scores: Router scores ``(tokens, experts)``, non-negative.
        gate: A key of `GATES`.
        tau: Threshold; 0 runs every expert, and above 0 an expert with score 0 never runs unless `min_experts` asks.
        min_experts: Run at least so many of the best.
        max_experts: Run at most so many of the best; 0 for no bound.
        shared: The first so many experts always run; the gate chooses among the others, and the bounds count all.

    Returns:
        Boolean mask ``(tokens, experts)``.
    """
    if tau <= 0:
        return torch.ones_like(scores, dtype=torch.bool)
    if shared:
        upper = max(max_experts - shared, 1) if max_experts else 0
        routed = select(scores[:, shared:], gate, tau, max(min_experts - shared, 0), upper)
        return torch.cat([torch.ones_like(scores[:, :shared], dtype=torch.bool), routed], dim=1)
    scores = scores.float()
    run = (GATES[gate](scores) >= tau) & (scores > 0)
    if min_experts or max_experts:
        rank = score_ranks(scores)
        run = run | (rank < min_experts)
        if max_experts:
            run = run & (rank < max_experts)
    return run


SOFTNESS = 0.2  # of the sigmoid that stands for the gate in the backward pass, relative to the scores at its edge


def straight_through(scores: torch.Tensor, run: torch.Tensor) -> torch.Tensor:
    """The gate's choice as numbers, with the gradient of a sigmoid of the scores around each token's edge.

    The edge lies halfway between the worst score that runs and the best that does not (Bengio et al. 2013,
    arXiv 1308.3432, for the estimator).

    Args:
        scores: ``(tokens, experts)``.
        run: The choice, boolean, of that shape.
    """
    with torch.no_grad():
        worst = scores.masked_fill(~run, torch.inf).amin(-1, keepdim=True)
        best = scores.masked_fill(run, 0.0).amax(-1, keepdim=True)
        edge = torch.where(worst.isfinite(), (worst + best) / 2, best).clamp_min(1e-12)
    soft = torch.sigmoid((scores / edge - 1) / SOFTNESS)
    return run.to(scores.dtype) + soft - soft.detach()
