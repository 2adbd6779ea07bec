"""Bases of projections against their definition, in double precision."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from d2dmoe.attention.bases import DAMPING, find_basis
from d2dmoe.attention.moments import InputMoments


def problem(inputs: int = 12, outputs: int = 10, rows: int = 400, seed: int = 0):
    """Weights, inputs and gradients with a structure of their own."""
    torch.manual_seed(seed)
    weight = torch.randn(outputs, inputs).double()
    x = torch.randn(rows, inputs).double() @ torch.randn(inputs, inputs).double() + 0.5
    gradients = torch.randn(rows, outputs).double() @ torch.randn(outputs, outputs).double()
    return weight, x, gradients.T @ gradients / rows


def moments(x: torch.Tensor) -> InputMoments:
    return InputMoments(x.T @ x, x.sum(0), len(x))


def cost(weight, x, into, back, rank, metric) -> float:
    """Mean of ``e F e`` for the error of the factors of this rank, the mean output being exact."""
    y = (x - x.mean(0)) @ weight.T
    error = y - y @ into[:, :rank] @ back[:rank]
    return float((error @ metric * error).sum(1).mean())


@pytest.mark.parametrize("rank", [1, 3, 7, 9])
def test_what_a_rank_leaves_is_the_sum_of_the_other_eigenvalues(rank):
    weight, x, gradients = problem()
    basis = find_basis(weight, moments(x), gradients, 10, [10], damping=0.0)
    left = float(basis.spectra[0][rank:].sum())
    assert_close(cost(weight, x, basis.into, basis.back, rank, gradients), left, rtol=1e-8, atol=1e-8)
    assert_close(basis.mean, x.mean(0) @ weight.T)


@pytest.mark.parametrize("rank", [2, 5])
def test_no_other_factors_of_that_rank_cost_less(rank):
    weight, x, gradients = problem(seed=1)
    basis = find_basis(weight, moments(x), gradients, 10, [10], damping=0.0)
    best = cost(weight, x, basis.into, basis.back, rank, gradients)
    for seed in range(20):
        torch.manual_seed(seed)
        into, back = basis.into[:, :rank].clone(), basis.back[:rank].clone()
        into += 0.05 * torch.randn_like(into)
        back += 0.05 * torch.randn_like(back)
        assert cost(weight, x, into, back, rank, gradients) > best


def test_sections_have_factors_of_their_own():
    weight, x, gradients = problem(outputs=9, seed=2)
    basis = find_basis(weight, moments(x), gradients, 4, [5, 3, 1], damping=0.1)
    assert [len(s) for s in basis.spectra] == [5, 3, 1]
    for start, width in ((0, 5), (5, 3), (8, 1)):
        rows = slice(start, start + width)
        alone = find_basis(weight[rows], moments(x), gradients[rows, rows], 4, [width], damping=0.1)
        both = [b.into[r] @ b.back[:, r] for b, r in ((basis, rows), (alone, slice(None)))]
        assert_close(both[0], both[1])
        kept = min(4, width)
        assert_close(basis.back[:kept, rows] @ basis.into[rows, :kept], torch.eye(kept).double())
    assert not basis.into[8, 1:].any()


def test_damping_weighs_outputs_that_no_gradient_reaches():
    weight, x, _ = problem()
    basis = find_basis(weight, moments(x), torch.zeros(10, 10).double(), 10, [10])
    y = (x - x.mean(0)) @ weight.T
    even = DAMPING * torch.linalg.eigvalsh(y.T @ y / len(x)).flip(0)
    assert_close(basis.spectra[0], even, rtol=1e-8, atol=1e-8)
