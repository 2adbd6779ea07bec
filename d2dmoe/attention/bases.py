"""Low-rank bases of projections: the directions of their outputs that matter most to the model's output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..config.projections import rows_of
from ..moe.projection import DynamicProjection, around_attention
from .moments import InputMoments

TINY = 1e-30  # instead of the length of a direction that is not there
DAMPING = 0.1  # of the gradients' moments towards equal weights of all outputs


@dataclass
class Basis:
    """The best factors of one projection at every rank, section by section of its outputs.

    With `C` the covariance of the outputs and `F` the moments of the gradients there, an error `E` costs
    ``trace(F E C)``. The best `P Q` of rank `r` in place of the identity is ``G V V' inverse(G)`` with
    ``G = F ** 0.5`` and `V` the first `r` eigenvectors of ``G C G``; what it leaves is the sum of the other
    eigenvalues. (Whitened singular value decomposition as in SVD-LLM, arXiv 2403.07378, with output weights as
    in FWSVD, arXiv 2207.00112, of which this takes the whole matrix and not rows.)
    """

    into: torch.Tensor  # P (outputs, rank)
    back: torch.Tensor  # Q (rank, outputs)
    mean: torch.Tensor  # (outputs,)
    spectra: list[torch.Tensor]  # eigenvalues of each section, falling
    channel_costs: torch.Tensor  # (inputs,), squared norm of each input channel's weights as the output weighs them


@torch.no_grad()
def find_basis(
    weight: torch.Tensor, inputs: InputMoments, gradients: torch.Tensor, rank: int, sections: Sequence[int],
    damping: float = DAMPING,
) -> Basis:  # fmt: skip
    """The basis of one projection.

    Args:
        weight: ``(outputs, inputs)``.
        inputs: Of its inputs.
        gradients: Moments of the gradients at its outputs ``(outputs, outputs)``.
        rank: Columns to keep; a section narrower than that has zeros in the last ones.
        sections: Widths of the parts of the outputs.
        damping: Share of an even weight of all outputs of a section.
    """
    weight = weight.double().cpu()
    into, back = weight.new_zeros(len(weight), rank), weight.new_zeros(rank, len(weight))
    spectra, costs = [], weight.new_zeros(weight.shape[1])
    for width, rows in zip(sections, rows_of(sections), strict=True):
        half, inverse = roots(gradients[rows, rows], damping)
        weighted = half @ weight[rows]
        outputs = weighted @ inputs.covariance @ weighted.T
        values, directions = torch.linalg.eigh((outputs + outputs.T) / 2)
        directions, kept = directions.flip(1)[:, :rank], min(rank, width)
        into[rows, :kept], back[:kept, rows] = half @ directions, directions.T @ inverse
        spectra.append(values.flip(0).clamp_min(0))
        costs += weighted.square().sum(0)
    return Basis(into, back, weight @ inputs.mean, spectra, costs)


def roots(gradients: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The symmetric root of damped moments ``(width, width)``, and its inverse."""
    width = len(gradients)
    scale = float(gradients.trace()) / width or 1.0
    values, vectors = torch.linalg.eigh((1 - damping) * gradients + damping * scale * torch.eye(width).double())
    root = values.clamp_min(1e-12 * scale).sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def fit_bases(model: nn.Module, moments: Mapping[int, InputMoments], gradients: Sequence[torch.Tensor]) -> list[Basis]:
    """Fit the basis of every projection and store it in its layer.

    Args:
        model: Converted model.
        moments: Of the inputs of its projections, by group.
        gradients: Moments of the gradients at their outputs.
    """
    bases = [
        find_basis(x.matrix(), moments[x.projection.group], each, x.projection.rank, x.projection.sections)
        for x, each in zip(around_attention(model), gradients, strict=True)
    ]
    costs: dict[int, torch.Tensor] = {}  # of the channels, by group
    for layer, basis in zip(around_attention(model), bases, strict=True):
        group = layer.projection.group
        costs[group] = costs.get(group, 0) + basis.channel_costs
    for layer, basis in zip(around_attention(model), bases, strict=True):
        store_basis(layer, basis, costs[layer.projection.group].sqrt())
    return bases


@torch.no_grad()
def store_basis(layer: DynamicProjection, basis: Basis, norms: torch.Tensor) -> None:
    """Write a basis and the channels' norms ``(inputs,)``, scaled to a mean of 1, into a layer."""
    set_basis(layer, basis.into, basis.back)
    layer.output_mean.copy_(basis.mean)
    layer.channel_norms.copy_(norms / norms.mean().clamp_min(1e-12))


@torch.no_grad()
def set_basis(layer: DynamicProjection, into: torch.Tensor, back: torch.Tensor) -> None:
    """Write `P` and `Q` of a layer, ``(…, rank)`` and ``(rank, …)``, each direction as long in one as in the other.

    Only products count, and what weighs errors by gradients makes one very small and the other very large; whoever
    trains both (`stages.heal`) needs steps of one size.
    """
    scale = (back.norm(dim=1) / into.norm(dim=0).clamp_min(TINY)).sqrt().clamp_min(TINY)
    layer.low_rank_in.copy_(into * scale)
    layer.low_rank_out.copy_(back / scale.unsqueeze(1))
