"""The router: one score per expert, and what it predicts."""

from __future__ import annotations

import torch
from torch import nn

from ..kernels import rounded_rows


class Router(nn.Module):
    """`r(x) = |R2 relu(R1 x)|`, no biases: one non-negative score per expert (Szatkowski et al. 2024, sec. 3.3).

    Plain parameters instead of `nn.Linear`, so that no model's weight initialisation can mistake them for its own.
    """

    def __init__(self, d_model: int, width: int, experts: int, *, device=None, dtype=None):
        super().__init__()
        self.hidden = nn.Parameter(torch.empty(width, d_model, device=device, dtype=dtype))
        self.score = nn.Parameter(torch.empty(experts, width, device=device, dtype=dtype))

    def reset(self, seed: int) -> None:
        """Kaiming-uniform start, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        for weight in (self.hidden, self.score):
            bound = (3.0 / weight.shape[1]) ** 0.5
            value = (torch.rand(weight.shape, generator=generator) * 2 - 1) * bound
            weight.data = value.to(weight.device, weight.dtype)

    def forward(self, x: torch.Tensor, rounds: bool = False) -> torch.Tensor:
        """Scores ``(tokens, experts)`` of tokens ``(tokens, d_model)``; if it `rounds`, by a first product in int8."""
        x, hidden = (rounded_rows(t, rotate=True) if rounds else t for t in (x, self.hidden))
        return torch.relu(x @ hidden.T).matmul(self.score.T).abs()


def expert_norms(hidden: torch.Tensor, down_weight: torch.Tensor) -> torch.Tensor:
    """L2 norm of every expert's output: the routers' target.

    With `G_e = W2_e W2_e^T` it is `sqrt(h_e G_e h_e^T)`, which never forms the outputs themselves.

    Args:
        hidden: Intermediate activations ``(experts, tokens, size)``.
        down_weight: ``(experts, size, d_model)``.

    Returns:
        ``(tokens, experts)``.
    """
    gram = down_weight @ down_weight.transpose(1, 2)  # (experts, size, size)
    return (hidden @ gram * hidden).sum(-1).clamp_min(0).sqrt().T
