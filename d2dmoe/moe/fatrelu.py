"""ReLU with a positive threshold: an activation that transformers does not know, named `fatrelu_0.05` in a config.

Importing this registers it.
"""

from __future__ import annotations

import re

import numpy as np
import torch
from torch import nn
from transformers.activations import ACT2FN, ClassInstantier

FATRELU = re.compile(r"fatrelu_(\d+(?:\.\d+)?(?:e-?\d+)?)")


class FATReLU(nn.Module):
    """`x` where `x >= threshold`, else 0.

    Source: FATReLU (Kurtz et al. 2020), as used by ProSparse (arXiv 2402.13516).
    """

    def __init__(self, threshold: float):
        super().__init__()
        self.threshold = threshold

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Elementwise; the gradient is that of the identity where it passes."""
        return torch.where(x >= self.threshold, x, torch.zeros((), dtype=x.dtype, device=x.device))

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"threshold={self.threshold:g}"


def fatrelu_name(threshold: float) -> str:
    """The name that stands in a config, `fatrelu_0.05`; without an exponent, whose dash some configs split at."""
    return f"fatrelu_{np.format_float_positional(threshold, trim='-')}"


class _WithThresholds(ClassInstantier):
    """The activations of transformers, and `fatrelu_0.05` for any threshold."""

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or bool(isinstance(key, str) and FATRELU.fullmatch(key))

    def __missing__(self, key: str) -> tuple[type[nn.Module], dict[str, float]]:
        match = FATRELU.fullmatch(key) if isinstance(key, str) else None
        if match is None:
            raise KeyError(key)
        return FATReLU, {"threshold": float(match[1])}


def fatrelu_names(model: nn.Module) -> list[str]:
    """Names of the thresholds in use in a model."""
    return sorted({fatrelu_name(m.threshold) for m in model.modules() if isinstance(m, FATReLU)})


if type(ACT2FN) is ClassInstantier:  # without this, transformers refuses a config that says `fatrelu_…` by name
    ACT2FN.__class__ = _WithThresholds
