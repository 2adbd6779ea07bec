"""Bases in which attention heads can be made narrower: the columns that matter most come first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..config.projections import Projection, rows_of
from ..moe.projection import DynamicProjection
from .bases import TINY, roots
from .moments import InputMoments

DAMPING = 0.1  # of the weights of errors towards equal ones
Spectra = dict[str, torch.Tensor]


def heads_of(layers: Sequence[DynamicProjection]) -> dict[str, dict[str, int]]:
    """The pairs that can be made narrower together.

    Returns:
        By `NUMBER.qk` and `NUMBER.vo`, with the numbers of attentions: which of `layers` does what.
    """
    found: dict[str, dict[str, int]] = {}
    for n, layer in enumerate(layers):
        for role in roles_with_heads(layer.projection):
            pair = "qk" if role in "qk" else "vo"
            found.setdefault(f"{layer.projection.attention}.{pair}", {})[role] = n
    return {name: pair for name, pair in found.items() if len(pair) == 2}


def roles_with_heads(projection: Projection) -> list[str]:
    """What a projection does in heads that can be narrower."""
    return [role for role, count in zip(projection.role, projection.heads, strict=False) if count]


@torch.no_grad()
def fit_heads(
    layers: Sequence[DynamicProjection], moments: Mapping[int, InputMoments], gradients: Sequence[torch.Tensor]
) -> Spectra:
    """Fit the bases of all heads and store them.

    With `M` the second moments of a head's queries, `C` the covariance of its keys (a constant key changes no softmax)
    and `F` the moments of the gradients at its queries, ``P Q`` of rank `r` in the place of the identity costs about
    ``trace(G E M E')``, where ``E = 1 - P Q`` and `G` is the mean of `F` and `C`, each scaled to a trace of 1: what the
    output makes of errors of scores on the calibration text, and what they are everywhere. For values `M` is the
    covariance of the inputs of the output projection, and `G` the moments of gradients there. The best `P` and `Q` are
    those of `bases.Basis`. (Pruning heads in such a basis of the weights alone: CLOVER, arXiv 2411.17426.)

    Args:
        layers: Around attention.
        moments: Of their inputs, by group.
        gradients: Moments of the gradients at their outputs.

    Returns:
        For each pair of `heads_of`, what every further column of its heads saves ``(heads, width)``, falling.
    """
    found = {}
    for name, pair in heads_of(layers).items():
        own = {role: (layers[n], moments[layers[n].projection.group], gradients[n]) for role, n in pair.items()}
        found[name] = _fit_products(own) if name.endswith("qk") else _fit_values(own)
    return found


def _section(layer: DynamicProjection, role: str) -> tuple[slice, int]:
    """Rows of one role, and how many heads they have."""
    p = layer.projection
    place = p.role.index(role)
    return rows_of(p.sections)[place], p.heads[place]


def _blocks(matrix: torch.Tensor, heads: int, groups: int) -> torch.Tensor:
    """Sums over the heads of each group of the blocks ``(width, width)`` on a diagonal, ``(groups, width, width)``."""
    width = len(matrix) // heads
    blocks = torch.stack([matrix[n * width : (n + 1) * width, n * width : (n + 1) * width] for n in range(heads)])
    return blocks.reshape(groups, heads // groups, width, width).sum(1)


def _fit_products(own: Mapping[str, tuple[DynamicProjection, InputMoments, torch.Tensor]]) -> torch.Tensor:
    (q, q_inputs, gradients), (k, k_inputs, _) = own["q"], own["k"]
    (q_rows, heads), (k_rows, groups) = _section(q, "q"), _section(k, "k")
    weight, key = q.matrix().double().cpu()[q_rows], k.matrix().double().cpu()[k_rows]
    second = weight @ q_inputs.covariance @ weight.T
    mean = weight @ q_inputs.mean + (0 if q.bias is None else q.bias[q_rows].double().cpu())
    second += torch.outer(mean, mean)
    keys = _blocks(key @ k_inputs.covariance @ key.T, groups, groups)
    errors = _blocks(gradients[q_rows, q_rows], heads, groups)
    spectra = []
    for n, moments in enumerate(_blocks(second, heads, groups)):
        size = errors[n].trace().clamp_min(TINY)
        into, back, values = best_factors(errors[n] / size + keys[n] / keys[n].trace().clamp_min(TINY), moments)
        _store(q, into, q_rows, heads, groups, n)
        _store(k, back.T, k_rows, groups, groups, n)
        spectra.append(values * size)
    return torch.stack(spectra)


def _fit_values(own: Mapping[str, tuple[DynamicProjection, InputMoments, torch.Tensor]]) -> torch.Tensor:
    (v, _, _), (o, inputs, gradients) = own["v"], own["o"]
    (v_rows, groups), heads = _section(v, "v"), o.projection.heads[0]
    weight = o.matrix().double().cpu()
    errors = _blocks(weight.T @ gradients @ weight, heads, groups)
    width, spectra = o.projection.inputs // heads, []
    for n, moments in enumerate(_blocks(inputs.covariance, heads, groups)):
        into, back, values = best_factors(errors[n], moments)
        _store(v, into, v_rows, groups, groups, n)
        _store(o, back.T, slice(0, o.projection.inputs), heads, groups, n)
        for head in range(n * heads // groups, (n + 1) * heads // groups):
            o.head_mean[head, :width].copy_(inputs.mean[head * width : (head + 1) * width] @ into)
        spectra.append(values)
    return torch.stack(spectra)


def best_factors(weights: torch.Tensor, moments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`P`, `Q` and what each of their columns and rows saves, falling, see `bases.Basis`.

    Args:
        weights: Of errors ``(width, width)``.
        moments: Of what is multiplied ``(width, width)``.
    """
    half, inverse = roots(weights, DAMPING)
    weighted = half @ moments @ half
    values, directions = torch.linalg.eigh((weighted + weighted.T) / 2)
    directions = directions.flip(1)
    into, back = half @ directions, directions.T @ inverse
    scale = (back.norm(dim=1) / into.norm(dim=0).clamp_min(TINY)).sqrt().clamp_min(TINY)  # as in `bases.set_basis`
    return into * scale, back / scale.unsqueeze(1), values.flip(0).clamp_min(0)


def _store(layer: DynamicProjection, basis: torch.Tensor, rows: slice, heads: int, groups: int, group: int) -> None:
    """Write the basis ``(width, width)`` of a group into all of its heads."""
    width = (rows.stop - rows.start) // heads
    for head in range(group * heads // groups, (group + 1) * heads // groups):
        start = rows.start + head * width
        layer.head_basis[start : start + width, :width].copy_(basis)
