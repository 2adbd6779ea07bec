"""Regularisers against their formulas, schedules at their corners."""

import itertools
import math

import pytest
import torch

from d2dmoe.config import UserError
from d2dmoe.sparsify.options import REGULARISER_NAMES, SCHEDULE_NAMES, SparsityConfig, check_sparsity
from d2dmoe.sparsify.regularisers import REGULARISERS, locality
from d2dmoe.sparsify.schedules import SCHEDULES, STAGES

FORMULAS = {
    "hoyer": lambda a: sum(abs(v) for v in a) ** 2 / sum(v * v for v in a),
    "l1": lambda a: sum(abs(v) for v in a),
    "clamped": lambda a: sum(max(v + 10, 0) for v in a),
    "density": lambda a: sum(v * v / (v * v + 1e-7) for v in a) / len(a),
}


def rows(tokens: int = 5, neurons: int = 7) -> torch.Tensor:
    a = torch.randn(tokens, neurons, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 8
    return torch.where(a.abs() < 1, 0.003, a)


@pytest.mark.parametrize("name", FORMULAS)
def test_value_is_the_formula_written_out(name):
    a = rows()
    wanted = torch.tensor([FORMULAS[name](row.tolist()) for row in a], dtype=torch.float64)
    torch.testing.assert_close(REGULARISERS[name].per_token(a), wanted)


@pytest.mark.parametrize("name", FORMULAS)
def test_gradient(name):
    scale = 1e-3 if name == "density" else 1.0  # where its slope is
    a = (rows() * scale).requires_grad_(True)
    assert torch.autograd.gradcheck(REGULARISERS[name].per_token, (a,))


def test_hoyer_counts_equal_activations_and_ignores_scale():
    a = torch.zeros(3, 16)
    a[0, :1], a[1, :4], a[2, :16] = -2.0, 0.5, 3.0
    torch.testing.assert_close(REGULARISERS["hoyer"].per_token(a), torch.tensor([1.0, 4.0, 16.0]))


def test_a_token_without_activations_has_a_finite_penalty_and_gradient():
    for name, regulariser in REGULARISERS.items():
        a = torch.zeros(2, 6, requires_grad=True)
        regulariser.per_token(a).sum().backward()
        assert torch.isfinite(a.grad).all(), name


def test_locality_is_the_cross_entropy_of_neighbours():
    z = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) / 10
    active = (20 * z).sigmoid()
    wanted = torch.zeros(2, 3, dtype=torch.float64)
    for b in range(2):
        for t in range(3):
            for n in range(3):
                p, q = float(active[b, t, n]), float(active[b, t + 1, n])
                wanted[b, t] -= (q * math.log(p) + (1 - q) * math.log(1 - p)) / 3
    torch.testing.assert_close(locality(z), wanted)
    assert torch.autograd.gradcheck(locality, (z.requires_grad_(True),))


def test_names_on_the_command_line_are_those_of_the_registries():
    assert set(REGULARISER_NAMES) == {*REGULARISERS, "none"}
    assert set(SCHEDULE_NAMES) == set(SCHEDULES)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("constant", {0: 1, 0.3: 1, 0.99: 1}),
        ("linear", {0: 0, 0.25: 0.25, 0.9: 0.9}),
        ("linear_warmup", {0: 0, 0.25: 0.5, 0.5: 1, 0.75: 1}),
        ("sine", {0: STAGES[0], 0.2: STAGES[0], 0.25: STAGES[0], 0.375: (STAGES[0] + STAGES[1]) / 2, 1.0: STAGES[3]}),
    ],
)
def test_schedules(name, values):
    for done, wanted in values.items():
        assert SCHEDULES[name](done) == pytest.approx(wanted, abs=1e-6)
    levels = [SCHEDULES[name](i / 1000) for i in range(1000)]
    assert all(0 <= low <= high <= 1 for low, high in itertools.pairwise(levels))


@pytest.mark.parametrize("alpha", [-1e-3, math.nan, math.inf])
def test_alpha_that_is_no_weight_is_refused(alpha):
    with pytest.raises(UserError, match=r"--alpha .*finite number that is 0 or more"):
        check_sparsity(SparsityConfig(alpha=alpha))
