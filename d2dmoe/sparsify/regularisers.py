"""Sparsity regularisers: what is added to the task loss so that fewer neurons answer to a token.

Every regulariser maps activations of shape ``(tokens, neurons)`` to one value per token, ``(tokens,)``. Padding and the
means over tokens and blocks are the caller's business (`terms.py`). A new one is a function with a decorator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

PerToken = Callable[[torch.Tensor], torch.Tensor]

CLAMP = -10.0  # Szatkowski et al. 2024: pre-activations below it cost nothing more
DENSITY_EPSILON = 1e-7  # DEFT
LOCALITY_SHARPNESS = 20.0  # slope of the sigmoid that stands for "this neuron is active"
TINY = 1e-12


@dataclass(frozen=True)
class Regulariser:
    """A per-token penalty and the tensor that it is computed on.

    Attributes:
        name: Its key in `REGULARISERS`.
        per_token: ``(tokens, neurons)`` to ``(tokens,)``.
        before_activation: Whether it looks at pre-activations instead of activations.
    """

    name: str
    per_token: PerToken
    before_activation: bool = False


REGULARISERS: dict[str, Regulariser] = {}


def regulariser(name: str, *, before_activation: bool = False) -> Callable[[PerToken], PerToken]:
    """Register a function under a name that `--regulariser` takes."""

    def register(per_token: PerToken) -> PerToken:
        REGULARISERS[name] = Regulariser(name, per_token, before_activation)
        return per_token

    return register


@regulariser("hoyer")
def hoyer(a: torch.Tensor) -> torch.Tensor:
    """Square Hoyer measure, `‖a‖₁² / ‖a‖₂²`: between 1 (one neuron answers) and the number of neurons.

    Does not change with the scale of the activations. Sources: Szatkowski et al. 2024, eq. 1;
    DeepHoyer (Yang et al. 2020).
    """
    return a.abs().sum(-1).square() / a.square().sum(-1).clamp_min(TINY)


@regulariser("l1")
def l1(a: torch.Tensor) -> torch.Tensor:
    """Sum of absolute activations, `Σ|a|`. Source: the authors' recipe for BERT and the ReLU GPT-2."""
    return a.abs().sum(-1)


@regulariser("clamped", before_activation=True)
def clamped(z: torch.Tensor) -> torch.Tensor:
    """Sum of pre-activations above d, `Σ max(z − d, 0)` with d = −10, which pushes them into GELU's flat left side.

    Source: Szatkowski et al. 2024, appendix on GELU models.
    """
    return (z - CLAMP).clamp_min(0).sum(-1)


@regulariser("density")
def density(a: torch.Tensor) -> torch.Tensor:
    """Smooth share of non-zero activations, `mean a² / (a² + ε)` with ε = 1e-7: between 0 and 1.

    Source: DEFT (Runwal et al. 2024, arXiv 2402.01911).
    """
    squares = a.square()
    return (squares / (squares + DENSITY_EPSILON)).mean(-1)


def locality(z: torch.Tensor) -> torch.Tensor:
    """Disagreement of neighbouring tokens about which neurons are active: binary cross-entropy, mean over neurons.

    A neuron counts as active with probability `sigmoid(k z)`. Source: after the activation locality loss of BlockFFN
    (Song et al. 2025, arXiv 2507.08771), which has it on router scores.

    Args:
        z: Pre-activations ``(batch, length, neurons)``.

    Returns:
        ``(batch, length - 1)``, one value for each pair of neighbours.
    """
    logits = LOCALITY_SHARPNESS * z
    before, after = logits[:, :-1], logits[:, 1:]
    return torch.nn.functional.binary_cross_entropy_with_logits(before, after.sigmoid(), reduction="none").mean(-1)
