"""Fit all bases of the projections around attention, those of whole projections and those of heads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from ..data.batches import Batches
from ..moe.projection import around_attention
from .bases import fit_bases
from .heads import fit_heads
from .moments import gradient_moments, input_moments


class BasisSpectra(NamedTuple):
    """What every further column of a basis saves, falling.

    Attributes:
        projections: Of each projection by section, see `bases.Basis`.
        heads: Of the heads, see `heads.fit_heads`.
    """

    projections: list[list[torch.Tensor]]
    heads: dict[str, torch.Tensor]


def fit_all(model: nn.Module, batches: Batches, seed: int = 0) -> BasisSpectra:
    """Fit the bases and store them in the layers; `batches` are calibration batches."""
    moments, gradients = input_moments(model, batches), gradient_moments(model, batches, seed=seed)
    bases = fit_bases(model, moments, gradients)
    return BasisSpectra([basis.spectra for basis in bases], fit_heads(around_attention(model), moments, gradients))
