"""Gates, routers and router targets against loops written from their formulas."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from d2dmoe.kernels.gates import GATES, score_ranks, select
from d2dmoe.moe.router import Router, expert_norms

FAST = settings(max_examples=80, deadline=None, derandomize=True)


def best_first(row: list) -> list[int]:
    """Experts by falling score; ties go to the lower number."""
    return sorted(range(len(row)), key=lambda e: (-row[e], e))


def naive_select(rows: list[list], gate: str, tau, least: int = 0, most: int = 0) -> list[list[bool]]:
    """The sets of experts, token by token, as DESIGN.md section 2 states the gates."""
    result = []
    for row in rows:
        every = range(len(row))
        order = best_first(row)
        if tau == 0:
            chosen = set(every)
        else:
            if gate == "max":
                chosen = {e for e in every if row[e] >= tau * max(row)}
            elif gate == "share":
                chosen = {e for e in every if row[e] ** 2 >= tau**2 * sum(r * r for r in row)}
            elif gate == "absolute":
                chosen = {e for e in every if row[e] >= tau}
            elif gate == "topp":  # the best until they hold the share 1 - tau of the sum
                held = [sum(row[e] for e in order[:k]) for k in range(len(row))]
                chosen = {e for k, e in enumerate(order) if k == 0 or held[k] < (1 - tau) * sum(row)}
            else:
                chosen = set(order[: math.floor((1 - tau) * len(row) + Fraction(1, 2))])
            chosen = {e for e in chosen if row[e] > 0} | set(order[:least])
            if most:
                chosen &= set(order[:most])
        result.append([e in chosen for e in every])
    return result


def knife_edge(rows: list[list], gate: str, tau) -> bool:
    """Whether the formula leaves open, or fp32 cannot tell, if some expert is in: halves of `topk`, ties of `topp`."""
    if gate == "topk":
        return bool(rows) and ((1 - tau) * len(rows[0])) % 1 == Fraction(1, 2)
    if gate == "topp":
        ordered = [sorted(row, reverse=True) for row in rows]
        return any(sum(row[:k]) == (1 - tau) * sum(row) for row in ordered for k in range(1, len(row)))
    if gate == "share":
        squares = [(r * r, tau**2 * sum(v * v for v in row)) for row in rows for r in row]
        return any(0 < abs(r - bound) <= Fraction(1, 10**5) * bound for r, bound in squares)
    return False


@st.composite
def score_rows(draw) -> list[list[int]]:
    """Small whole numbers: exact in every dtype, with many ties and many zeros. Any shape, no tokens included."""
    tokens, experts = draw(st.integers(0, 5)), draw(st.integers(1, 37))
    numbers = st.integers(0, draw(st.sampled_from([1, 3, 15])))
    return [draw(st.lists(numbers, min_size=experts, max_size=experts)) for _ in range(tokens)] or [[0] * experts][:0]


def tensor(rows: list[list], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(rows, dtype=dtype).reshape(len(rows), -1 if rows else 11)


TAUS = st.integers(0, 64).map(lambda n: Fraction(n, 64))


@pytest.mark.parametrize("gate", GATES)
@given(rows=score_rows(), tau=TAUS, bounds=st.tuples(st.integers(0, 4), st.integers(0, 6)))
@FAST
def test_gate_is_its_formula(gate, rows, tau, bounds):
    assume(not knife_edge(rows, gate, tau))
    run = select(tensor(rows), gate, float(tau), *bounds)
    assert run.dtype == torch.bool
    assert run.tolist() == naive_select(rows, gate, tau, *bounds)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tau", [0.0, 0.013, 0.2, 0.51, 0.99, 1.0])
def test_gate_is_its_formula_on_real_scores(gate, dtype, tau):
    scores = torch.relu(torch.randn(19, 43)).to(dtype)
    assert select(scores, gate, tau).tolist() == naive_select(scores.float().tolist(), gate, tau)


@pytest.mark.parametrize("gate", GATES)
@given(rows=score_rows(), taus=st.tuples(TAUS, TAUS), bounds=st.tuples(st.integers(0, 4), st.integers(0, 6)))
@FAST
def test_larger_tau_runs_a_subset(gate, rows, taus, bounds):
    small, large = sorted(taus)
    assume(small > 0 or bounds[1] == 0)  # at tau 0 everything runs, whatever max_experts says
    more, less = (select(tensor(rows), gate, float(tau), *bounds) for tau in (small, large))
    assert not (less & ~more).any()


@pytest.mark.parametrize("gate", GATES)
def test_sets_shrink_all_the_way(gate):
    scores = torch.rand(64, 24)
    counts = [int(select(scores, gate, tau).sum()) for tau in torch.linspace(0, 1, 81).tolist()]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == scores.numel()
    assert len(set(counts)) > 15


@pytest.mark.parametrize("gate", GATES)
@given(rows=score_rows())
@FAST
def test_tau_zero_runs_everything(gate, rows):
    assert select(tensor(rows), gate, 0.0, 0, 1).all()


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("tau", [1e-9, 0.3, 1.0])
def test_score_zero_never_runs(gate, tau):
    scores = torch.relu(torch.randn(31, 17)) * (torch.rand(31, 1) > 0.2)  # some tokens with nothing at all
    run = select(scores, gate, tau)
    assert not run[scores == 0].any()
    if tau == 1e-9:
        assert run[scores > 0].all()


@pytest.mark.parametrize("gate", GATES)
def test_max_experts_is_at_most_and_min_experts_at_least(gate):
    scores = torch.rand(50, 13)
    free, bounded = select(scores, gate, 0.6), select(scores, gate, 0.6, 4, 6)
    assert_close(bounded.sum(1), free.sum(1).clamp(4, 6))
    zero = torch.zeros(3, 5)
    assert select(zero, gate, 0.5, 2).tolist() == [[True, True, False, False, False]] * 3


def test_max_runs_the_best_expert_at_tau_one():
    scores = torch.rand(40, 9) + 0.1
    assert select(scores, "max", 1.0).int().argmax(1).tolist() == scores.argmax(1).tolist()
    assert select(scores, "max", 1.0).sum().item() == 40


@given(rows=score_rows())
@FAST
def test_ranks(rows):
    expected = [[best_first(row).index(e) for e in range(len(row))] for row in rows]
    assert score_ranks(tensor(rows)).tolist() == expected


@pytest.mark.parametrize(("tokens", "d_model", "width", "experts"), [(1, 1, 1, 1), (7, 5, 9, 11), (3, 16, 2, 6)])
def test_router_is_its_formula(tokens, d_model, width, experts):
    router = Router(d_model, width, experts, dtype=torch.float64)
    router.reset(5)
    assert {name for name, _ in router.named_parameters()} == {"hidden", "score"}  # no biases
    x = torch.randn(tokens, d_model, dtype=torch.float64)
    first, second = router.hidden.tolist(), router.score.tolist()
    expected = []
    for token in x.tolist():
        hidden = [max(sum(w * v for w, v in zip(row, token, strict=True)), 0.0) for row in first]
        expected.append([abs(sum(w * h for w, h in zip(row, hidden, strict=True))) for row in second])
    assert_close(router(x).detach(), torch.tensor(expected, dtype=torch.float64))


def test_router_start_depends_on_the_seed_alone():
    routers = [Router(6, 5, 4) for _ in range(3)]
    for router, seed in zip(routers, (1, 1, 2), strict=True):
        torch.randn(seed)  # the global generator must not matter
        router.reset(seed)
    first, same, other = (router.state_dict() for router in routers)
    for name in ("hidden", "score"):
        assert torch.equal(first[name], same[name])
        assert not torch.equal(first[name], other[name])
        assert first[name].std() > 0


@pytest.mark.parametrize(
    ("experts", "tokens", "size", "d_out"), [(1, 1, 1, 1), (5, 7, 3, 11), (4, 9, 13, 3), (3, 0, 2, 2)]
)
def test_expert_norms_are_norms_of_the_outputs(experts, tokens, size, d_out):
    hidden = torch.randn(experts, tokens, size, dtype=torch.float64)
    hidden[0] = torch.relu(hidden[0])
    down = torch.randn(experts, size, d_out, dtype=torch.float64)
    expected = torch.empty(tokens, experts, dtype=torch.float64)
    for t in range(tokens):
        for e in range(experts):
            output = sum(hidden[e, t, n] * down[e, n] for n in range(size))
            expected[t, e] = math.sqrt(sum(value**2 for value in output.tolist()))
    assert_close(expert_norms(hidden, down), expected)


def test_expert_norm_of_nothing_is_zero():
    down = torch.randn(3, 5, 7)
    assert expert_norms(torch.zeros(3, 2, 5), down).tolist() == [[0.0] * 3] * 2
    flat = torch.zeros(3, 5, 1)
    flat[:, 0], flat[:, 1] = 1.0, -1.0  # neurons that cancel: rounding must not make a NaN
    assert not expert_norms(torch.full((3, 2, 5), 1e4 / 3), flat).isnan().any()
