"""Fits of one layer after the other: what is lost before a layer is made up for in it."""

from __future__ import annotations

import pytest
import torch
from conftest import randomise_vectors
from zoo import attached, tiny

from d2dmoe import set_gate
from d2dmoe.attention.fit import fit_all
from d2dmoe.config import Budget, D2DMoEConfig
from d2dmoe.config.projections import ProjectionState
from d2dmoe.data import Batches
from d2dmoe.measure.observe import model_inputs
from d2dmoe.moe.gating import stored_config
from d2dmoe.moe.projection import projections
from d2dmoe.stages.compensate import best_refit, compensate, forget_refits, output_projections
from d2dmoe.stages.ridge import ridge
from d2dmoe.stages.standins import Moments

GENERATOR = torch.Generator().manual_seed(0)
ITEMS = [{"input_ids": torch.randint(4, 90, (16,), generator=GENERATOR).tolist()} for _ in range(600)]
DATA = Batches(ITEMS, 64)  # ten pieces, so that some are kept from the fits
UNSEEN = Batches([{"input_ids": torch.randint(4, 90, (16,), generator=GENERATOR).tolist()} for _ in range(64)], 64)


def converted(name: str, method: str) -> tuple[torch.nn.Module, D2DMoEConfig]:
    """A tiny model with its projections at half of their ranks or widths; experts all run."""
    model = tiny(name)
    for parameter in model.parameters():
        parameter.data *= 3
    randomise_vectors(model)
    config = stored_config(attached(model))
    fit_all(model, DATA)
    budgets = []
    for share in (0.25, 0.5):
        budget = Budget(share, [0.0] * len(config.blocks))
        budget.projection_states = [state_of(p, method, share) for p in config.projections]
        budgets.append(budget)
    config.budgets.replace(budgets)
    return model, config


def state_of(p, method: str, share: float) -> ProjectionState:
    if method == "heads" and p.heads:
        return ProjectionState("heads", tuple(max(int(width * share), 1) for width in p.head_widths))
    if method == "channels":
        return ProjectionState("channels", (), 1.5 - share)
    return ProjectionState("low-rank", tuple(max(int(rank * share), 1) for rank in p.full_ranks))


def lost(model: torch.nn.Module, number: int) -> float:
    """Squared distance of what output projections give from the dense model's, on text that no fit has seen."""
    given: list[torch.Tensor] = []
    handles = [x.register_forward_hook(lambda *a: given.append(a[-1])) for x in output_projections(model)]
    with torch.no_grad():
        for gate in ({"active": 1}, {"budget": number}):
            with set_gate(model, **gate):
                model(**model_inputs(model, UNSEEN[0]))
    for handle in handles:
        handle.remove()
    dense, ours = given[: len(handles)], given[len(handles) :]
    return float(sum((a - b).square().mean() for a, b in zip(dense, ours, strict=True)))


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama"])
@pytest.mark.parametrize("method", ["low-rank", "heads", "channels"])
def test_less_is_lost_on_text_that_no_fit_has_seen(name, method):
    model, config = converted(name, method)
    before = [lost(model, number) for number in range(2)]
    for number in range(2):
        compensate(model, DATA, config, number)
    after = [lost(model, number) for number in range(2)]
    assert all(ours < theirs for ours, theirs in zip(after, before, strict=True)), (before, after)
    assert all(layer.projection.refits == 2 for layer in output_projections(model))
    with torch.no_grad(), set_gate(model, active=1):
        assert all(layer.gate_state.method == "dense" for layer in projections(model))


def test_a_budget_is_forgotten_alone():
    model, config = converted("gpt2", "heads")
    before = lost(model, 0)
    for number in range(2):
        compensate(model, DATA, config, number)
    other = lost(model, 1)
    forget_refits(model, config, 0)
    assert lost(model, 0) == pytest.approx(before, rel=1e-4)
    assert lost(model, 1) == pytest.approx(other, rel=1e-4)


def test_dense_projections_are_not_refitted():
    model, config = converted("gpt2", "heads")
    for budget in config.budgets:
        budget.projection_states = [ProjectionState()] * len(config.projections)
    compensate(model, DATA, config, 0)
    assert not any(layer.projection.refits for layer in projections(model))


def moments(x: torch.Tensor, y: torch.Tensor) -> Moments:
    found = Moments.empty(x.shape[1] + 1, y.shape[1])
    found.add(torch.cat([x, torch.ones(len(x), 1)], 1), y)
    found.complete()
    return found


def test_a_refit_is_a_ridge_regression_without_a_penalty_on_its_constant():
    torch.manual_seed(0)
    x, noise = torch.randn(400, 5) + 3, torch.randn(400, 2)
    y = x @ torch.randn(5, 2) + 100 + noise
    (a, b), (c, d) = x.split(300), y.split(300)
    theta = best_refit(moments(a, c), moments(b, d), [1e-3])
    mean, target = a.double().mean(0), c.double().mean(0)
    weights = ridge((a - mean).T.double() @ (a - mean), (a - mean).T.double() @ (c - target), 1e-3)
    wanted = torch.cat([weights, (target - mean @ weights)[None]])
    scale = float((theta * wanted).sum() / wanted.square().sum())
    assert scale == pytest.approx(1, abs=0.01)
    torch.testing.assert_close(theta, scale * wanted, rtol=1e-3, atol=1e-3)


def test_a_refit_that_helps_nobody_else_is_none():
    torch.manual_seed(0)
    theta = best_refit(
        moments(torch.randn(6, 5), torch.randn(6, 2)), moments(torch.randn(50, 5), torch.randn(50, 2)), [1e-3]
    )
    assert theta.abs().max() < 0.5
    nothing = best_refit(
        moments(torch.randn(50, 3), torch.ones(50, 2)), moments(torch.randn(50, 3), -torch.ones(50, 2)), [1.0]
    )
    assert not nothing.any()
