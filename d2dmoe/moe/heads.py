"""Attention heads of less width, without a change to the code around them.

What queries and keys of a head are good for is their product, and what its values are good for is what the output
projection makes of them; both stay as they are if one side is multiplied by `P Q` and `P Q` is the identity. With
fewer columns of `P`, queries become ``q P``, keys ``k Q'``, values ``v P`` and the output projection ``Q W``: one thin
product each, where two factors in the place of a projection take two. The code between still sees heads of full width:
what is missing is zero.

Each projection stores its own side as `head_basis`, ``(outputs, head_rank)`` or, of an output projection, ``(inputs,
head_rank)``: the rows of each head, of which a budget uses the first columns. `head_mean` ``(heads, head_rank)`` of an
output projection is the mean of its narrow inputs; with `output_mean` it makes the mean output exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch

from ..config.projections import Projection, ProjectionState, rows_of

Factors = tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]


def head_shapes(projection: Projection) -> dict[str, tuple[int, ...]]:
    """Shapes of the added parameters; none where no head can be narrower."""
    if not projection.head_rank:
        return {}
    if projection.role != "o":
        return {"head_basis": (projection.outputs, projection.head_rank)}
    heads = projection.heads[0]
    return {"head_basis": (projection.inputs, projection.head_rank), "head_mean": (heads, projection.head_rank)}


def used_rank(projection: Projection, states: Sequence[ProjectionState]) -> int:
    """Columns of the stored basis that these settings use; 0 if no head is ever narrower.

    An output projection needs all columns of a head of full width, for what its mean gives.
    """
    widths = [state.ranks for state in states if state.method == "heads"]
    own = projection.head_widths
    used = [w for each in widths for w, full in zip(each, own, strict=True) if w < full or projection.role == "o"]
    return max([1, *used]) if widths else 0


def parts_of(projection: Projection, widths: Sequence[int]) -> list[tuple[slice, int]]:
    """Rows of each head, and of each section that has none, in the outputs (of `o`: inputs), and what is kept of it."""
    whole = [projection.inputs] if projection.role == "o" else projection.sections
    left, found = iter(widths), []
    for rows, count in zip(rows_of(whole), projection.heads, strict=True):
        full = (rows.stop - rows.start) // max(count, 1)
        starts = range(rows.start, rows.stop, full)
        found += [(slice(start, start + full), next(left) if count else full) for start in starts]
    return found


def narrow(
    projection: Projection, widths: Sequence[int], weight: torch.Tensor, bias: torch.Tensor | None,
    basis: torch.Tensor, output_mean: torch.Tensor, head_mean: torch.Tensor | None,
) -> Factors:  # fmt: skip
    """Weights, places and bias of the thin product.

    Args:
        projection: Whose heads they are.
        widths: Of each head.
        weight: ``(outputs, inputs)``.
        bias: ``(outputs,)``, or `None`.
        basis: `head_basis`.
        output_mean: ``(outputs,)``.
        head_mean: Of an output projection.

    Returns:
        For an output projection weights ``(outputs, kept)``, the places of what is kept in its inputs, and its bias.
        For others weights ``(kept, inputs)``, for each output its place among the kept ones and what that is multiplied
        by (0 where there is none), and the bias ``(kept,)``.
    """
    parts = parts_of(projection, widths)
    kept = [*accumulate((count for _, count in parts), initial=0)]
    like = {"device": weight.device, "dtype": torch.long}
    if projection.role == "o":
        thin = torch.cat([_narrowed(weight[:, rows].T, basis[rows], count).T for rows, count in parts], 1)
        places = torch.cat([torch.arange(rows.start, rows.start + count, **like) for rows, count in parts])
        means = torch.cat([mean[:count] for mean, (_, count) in zip(head_mean, parts, strict=True)])
        constant = output_mean - _mean_of_narrow(parts, weight, basis, means)
        if not len(places):  # OpenVINO has no empty products
            thin, places = weight.new_zeros(len(weight), 1), torch.zeros(1, **like)
        return thin, [places], [constant if bias is None else constant + bias]
    thin = torch.cat([_narrowed(weight[rows], basis[rows], count) for rows, count in parts])
    biases = weight.new_zeros(len(thin))
    if bias is not None:
        biases = torch.cat([_narrowed(bias[rows].unsqueeze(1), basis[rows], count).squeeze(1) for rows, count in parts])
    steps = [torch.arange(rows.stop - rows.start, **like) for rows, _ in parts]
    there = torch.cat([step < count for step, (_, count) in zip(steps, parts, strict=True)])
    places = torch.cat([step + first for step, first in zip(steps, kept, strict=False)]) * there
    if not len(thin):  # something to take a place in
        thin, biases = weight.new_zeros(1, weight.shape[1]), weight.new_zeros(1)
    return thin, [places, there.to(weight.dtype)], [biases]


def run_narrow(x: torch.Tensor, factors: Factors, product: Callable[..., torch.Tensor]) -> torch.Tensor:
    """``(…, inputs)`` to ``(…, outputs)`` with what `narrow` gives.

    Args:
        x: The input.
        factors: Of `narrow`.
        product: Gets rows, weights and bias.
    """
    weight, (places, *there), (bias,) = factors
    rows = x.reshape(-1, x.shape[-1])  # places are found fast in rows only
    if there:
        y = _spread(product(rows, weight, bias), places, there[0])
    else:
        y = product(rows.index_select(-1, places), weight, bias)
    return y.reshape(*x.shape[:-1], -1)


def _spread(thin: torch.Tensor, places: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    y = thin.index_select(-1, places)
    return y * there if y.requires_grad else y.mul_(there)


def or_none(places: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """The places as the library wants them: -1 where there is none, `int32`."""
    return torch.where(there.bool(), places, -1).to(torch.int32)


def _narrowed(rows: torch.Tensor, basis: torch.Tensor, count: int) -> torch.Tensor:
    """``(count, …)`` of a head's ``(width, …)``; a head of full width is as the dense model has it."""
    return rows if count == len(rows) else basis[:, :count].T @ rows


def _mean_of_narrow(
    parts: Sequence[tuple[slice, int]], weight: torch.Tensor, basis: torch.Tensor, means: torch.Tensor
) -> torch.Tensor:
    """What the mean of the narrow inputs gives at the outputs ``(outputs,)``, by the basis for full heads as well."""
    back = torch.cat([basis[rows, :count].T @ weight[:, rows].T for rows, count in parts])
    return means @ back
