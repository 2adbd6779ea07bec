"""Closed-form stand-ins: the regression is the regression, the choice is made on held-out tokens, off means off."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import randomise_routers
from torch.testing import assert_close
from transformers import AutoModelForCausalLM
from zoo import tiny

from d2dmoe import trainable
from d2dmoe.config import Budget, D2DMoEConfig
from d2dmoe.data import Batches
from d2dmoe.discovery import discover, dummy_inputs
from d2dmoe.kernels.gates import select
from d2dmoe.measure.observe import run_observed
from d2dmoe.moe.gating import set_gate
from d2dmoe.moe.layer import layers
from d2dmoe.moe.loader import attach
from d2dmoe.stages.standins import COLUMNS, RIDGES, Moments, _cut, _ridge, best_fit, fit_stand_ins

LEVELS = ["constants", "refit", "linear"]


def converted(stand_in: str, name: str = "gpt2", actives: tuple[float, ...] = (0.25, 0.5), experts: int = 8):
    """A tiny model with experts, random routers, no fitted stand-ins, and batches of random tokens."""
    model = tiny(name)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 5  # activations wide enough that experts differ
    blocks = discover(model).blocks
    for block in blocks:
        block.experts = experts
    budgets = [Budget(a, [1 - a] * len(blocks)) for a in actives]
    config = D2DMoEConfig(
        blocks, "topk", stand_in, delta_rank=6 if stand_in != "constants" else 0,
        linear_rank=3 if stand_in == "linear" else 0, router_width=8, budgets=budgets,
    )  # fmt: skip
    attach(model, config, [torch.randperm(b.width) for b in blocks], budgets=len(budgets))
    randomise_routers(model)
    for layer in layers(model):
        for value in layer.stand_ins().values():
            value.data.zero_()
    rows = torch.randint(5, 99, (400, 12), generator=torch.Generator().manual_seed(4)).tolist()
    return model, config, Batches([{"input_ids": row} for row in rows], 8)


def problem(n: int = 12, d: int = 4, tokens: int = 300) -> tuple[torch.Tensor, torch.Tensor, Moments]:
    x, theta = torch.randn(tokens, n), torch.randn(n, d)
    y = x @ theta + 0.1 * torch.randn(tokens, d)
    m = Moments.empty(n, d)
    for start in range(0, tokens, 70):
        m.add(x[start : start + 70], y[start : start + 70])
    return x, y, m


def test_moments_give_the_squared_error_and_the_best_scale():
    x, y, m = problem()
    theta = torch.randn(12, 4)
    assert m.error(theta) == pytest.approx(float(((y - x @ theta) ** 2).sum()), rel=1e-4)
    scale, error = m.best_scale(theta)
    grid = torch.linspace(0, 1, 1001)
    errors = torch.stack([((y - s * (x @ theta)).double() ** 2).sum() for s in grid])
    assert abs(scale - float(grid[errors.argmin()])) <= 1e-3
    assert error == pytest.approx(float(errors.min()), rel=1e-4)


def test_ridge_is_least_squares_with_the_stated_penalty():
    x, y, m = problem()
    part, ridge = slice(2, 6), 0.05
    others = torch.zeros(12, 4)
    others[[1, 7]] = torch.randn(2, 4)
    penalty = torch.diag((ridge * m.gram.diagonal()[part] + 1e-8 * m.gram.diagonal()[part].mean()).sqrt())
    a = torch.cat([x[:, part], penalty])
    b = torch.cat([y - x @ others, torch.zeros(4, 4)])
    assert_close(_ridge(m, part, others, ridge).float(), torch.linalg.lstsq(a, b).solution, rtol=1e-4, atol=1e-5)


def test_low_rank_cut_is_the_best_in_outputs():
    x, _, m = problem()
    theta, part = torch.randn(12, 4, dtype=torch.float64), slice(3, 10)
    x = x.double()
    first, second = _cut(m, part, theta, 2)
    outputs = x[:, part] @ theta[part]
    u, s, v = torch.linalg.svd(outputs, full_matrices=False)
    best = u[:, :2] @ torch.diag(s[:2]) @ v[:2]
    assert_close(x[:, part] @ first @ second, best, rtol=1e-3, atol=1e-4)  # the moments are fp32


@pytest.mark.parametrize(("stand_in", "experts"), [*((level, 8) for level in LEVELS), ("linear", 7)])
def test_moments_of_a_layer_are_those_of_its_tokens(stand_in, experts):
    """The stored fit, evaluated naively on every token, leaves the error that was reported for held-out tokens."""
    model, config, batches = converted(stand_in, experts=experts)
    fit_stand_ins(model, batches, config)
    seen: dict[int, list] = {}

    def collect(index, layer, x, hidden, scores, run):
        seen.setdefault(index, []).append((x, hidden))

    with set_gate(model, tau=0):
        run_observed(model, batches, collect)
    for index, layer in enumerate(layers(model)):
        for number, budget in enumerate(config.budgets):
            lost = left = 0.0
            for turn, (x, hidden) in enumerate(seen[index], start=1):
                if turn % 5:
                    continue
                run = select(layer.router(x), "topk", budget.taus[index])
                skipped = ~run
                loss = torch.einsum("ets,esd,te->td", hidden, layer.down_weight, skipped.float())
                guess = skipped.float() @ layer.constants[number]
                if stand_in != "constants":
                    delta = layer.delta_in[number] @ layer.delta_out[number]
                    guess = guess + torch.einsum("ets,esd,te->td", hidden, delta, run.float())
                if stand_in == "linear":
                    guess = guess + x @ layer.linear_in[number] @ layer.linear_out[number]
                lost += float((loss.detach().double() ** 2).sum())
                left += float(((loss - guess).detach().double() ** 2).sum())
            assert left / lost == pytest.approx(budget.residuals[index], abs=2e-3)
            assert left / lost < 1


def test_more_freedom_is_never_worse_on_held_out_tokens():
    residuals = []
    for level in LEVELS:
        model, config, batches = converted(level)
        fit_stand_ins(model, batches, config)
        residuals.append(torch.tensor([b.residuals for b in config.budgets]))
    assert (residuals[1] <= residuals[0] + 1e-4).all()
    assert (residuals[2] <= residuals[1] + 1e-4).all()
    assert (residuals[2] < residuals[0] - 1e-3).any()


def test_what_does_not_hold_on_other_tokens_is_not_used():
    model, config, _ = converted("linear")
    layer = layers(model)[0]
    n, d = layer.block.width + layer.block.experts + layer.block.d_model, layer.block.d_model
    fit_on, check_on = Moments.empty(n, d), Moments.empty(n, d)
    fit_on.add(torch.randn(n // 2, n), torch.randn(n // 2, d))  # fewer tokens than unknowns: it fits noise
    check_on.add(torch.randn(500, n), torch.randn(500, d))
    fit = best_fit(fit_on, check_on, layer, config)
    assert fit.residual <= 1
    assert check_on.error(fit.theta) <= check_on.energy * (1 + 1e-6)
    assert len(RIDGES) > 1


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_all_on_is_dense_and_switching_is_loading(name, tmp_path):
    model, config, batches = converted("linear", name)
    inputs = dummy_inputs(model)
    with torch.no_grad(), set_gate(model, active=1):
        dense = model(**inputs).logits
        fit_stand_ins(model, batches, config)
        assert torch.equal(model(**inputs).logits, dense)
    model.save_pretrained(tmp_path)
    switched = AutoModelForCausalLM.from_pretrained(tmp_path)
    for active in (0.25, 0.5, 1, 0.25):
        set_gate(switched, active=active)
        fresh = AutoModelForCausalLM.from_pretrained(tmp_path)
        set_gate(fresh, active=active)
        with torch.no_grad():
            assert torch.equal(switched(**inputs).logits, fresh(**inputs).logits)
            assert torch.equal(switched(**inputs).logits, dense) == (active == 1)


def test_folded_weights_follow_a_change_and_carry_gradients():
    model, config, batches = converted("refit")
    fit_stand_ins(model, batches, config)
    trainable(model, stand_ins=True)
    inputs = dummy_inputs(model)
    set_gate(model, active=0.25)
    with torch.no_grad():
        before = model(**inputs).logits
        layers(model)[0].delta_out.mul_(3)
        changed = model(**inputs).logits
    assert not torch.equal(before, changed)
    twin = copy.deepcopy(model)
    out = model(**inputs).logits
    assert_close(out.detach(), changed)
    out.square().sum().backward()
    assert layers(model)[0].delta_in.grad[0].abs().sum() > 0
    with torch.no_grad():
        assert torch.equal(twin(**inputs).logits, changed)


def test_moments_are_the_products_over_all_tokens():
    rows, target = torch.randn(300, COLUMNS + 77), torch.randn(300, 9)
    moments = Moments.empty(rows.shape[1], 9)
    for part in (slice(0, 100), slice(100, 300)):
        moments.add(rows[part], target[part])
    moments.complete()
    assert_close(moments.gram, rows.T @ rows, rtol=1e-4, atol=1e-3)
    assert_close(moments.cross, rows.T @ target, rtol=1e-4, atol=1e-3)
    assert moments.tokens == 300
