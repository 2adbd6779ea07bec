"""Active fractions below what the curve knows, fractions between and beyond the budgets, and figures after healing."""

from __future__ import annotations

import warnings

import pytest
import torch
from conftest import randomise_routers, randomise_vectors
from test_calibrate import asked, converted, documents, encoder, output, points
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel

from d2dmoe import set_gate
from d2dmoe.config import D2DMoEConfig, Target
from d2dmoe.discovery import discover
from d2dmoe.kernels import use_backend
from d2dmoe.moe.layer import GateState, layers
from d2dmoe.moe.loader import attach
from d2dmoe.moe.memory import merge
from d2dmoe.stages.budgets import goals as goals_module
from d2dmoe.stages.budgets.calibrate import calibrate, calibrate_again
from d2dmoe.stages.budgets.fit import measure_active
from d2dmoe.stages.budgets.goals import relative_loss


def fitted(**settings) -> tuple[torch.nn.Module, D2DMoEConfig]:
    """A GPT-2 in fp64 with all three kinds of stand-ins, fitted at 0.25 and 0.5."""
    torch.manual_seed(0)
    model, config = converted(stand_in="linear", delta_rank=8, linear_rank=4, **settings)
    for layer in layers(model):
        layer.down_weight.data.mul_(30)
        layer.up_weight.data.mul_(5)
        for value in layer.stand_ins().values():
            value.data.zero_()
    calibrate(model, documents(48), config, points(0.25, 0.5), allocation="sensitivity")
    return model, config


def at(model: torch.nn.Module, active: float) -> torch.Tensor:
    with warnings.catch_warnings(action="ignore"), set_gate(model, active=active):
        return output(model)


@pytest.mark.parametrize("gate", ["max", "share"])
def test_beyond_the_last_budget_the_model_goes_to_the_dense_one(gate):
    model, _ = fitted(gate=gate)
    dense, half = at(model, 1), at(model, 0.5)
    distances = [float((at(model, 1 - rest) - dense).norm() / (half - dense).norm()) for rest in (0.01, 1e-4, 1e-6)]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-3
    assert_close(at(model, 1 - 1e-12), dense)


@pytest.mark.parametrize("gate", ["max", "topk"])
def test_next_to_a_stored_budget_nothing_jumps(gate):
    model, config = fitted(gate=gate)
    for budget in config.budgets:
        stored = at(model, budget.active)
        for step in (-2e-6, 2e-6):
            near = at(model, budget.active + step)
            assert float((near - stored).norm()) < 1e-3 * float((stored - at(model, 1)).norm())


@pytest.mark.parametrize("fade", [1.0, 0.6, 0.0])
def test_fading_scales_every_stand_in(fade):
    """As if constants, change of the down projection and linear term had been stored at that scale."""
    model, _ = fitted(gate="max")
    layer = layers(model)[0]
    x = torch.randn(7, 32, dtype=torch.float64)
    layer.gate_state = GateState("max", 0.5, 1, fade=fade)
    with torch.no_grad(), use_backend("reference"):
        faded = layer(x)
        with torch.enable_grad():
            assert_close(layer(x).detach(), faded)
        layer.gate_state = GateState("max", 0.5, 1)
        whole = layer(x)
        for name in {"constants", "delta_out", "linear_out"} & layer.stand_ins().keys():
            getattr(layer, name)[1] *= fade
        assert_close(layer(x), faded)
    assert torch.equal(faded, whole) == (fade == 1)


def test_the_backends_fade_alike_and_so_does_a_merged_model():
    model, _ = fitted(gate="max")
    model.float()
    for active in (0.7, 0.9, 0.7):  # a plan made for one scale does not serve another
        with use_backend("reference"):
            expected = at(model, active)
        assert_close(at(model, active), expected, rtol=1e-4, atol=1e-4)
    with warnings.catch_warnings(action="ignore"):
        set_gate(model, active=0.7)
    merge(model)
    assert_close(output(model), expected, rtol=1e-4, atol=1e-4)


def many_experts(experts: int, gate: str) -> tuple[torch.nn.Module, D2DMoEConfig]:
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, n_inner=256, vocab_size=99, n_positions=32)
    model = GPT2LMHeadModel(config).double().eval()
    randomise_vectors(model)
    blocks = discover(model).blocks
    for block in blocks:
        block.experts = experts
    config = D2DMoEConfig(blocks=blocks, router_width=8, gate=gate, stand_in="constants")
    attach(model, config, [torch.arange(block.width) for block in blocks], budgets=2)
    randomise_routers(model)
    with torch.no_grad():
        layers(model)[1].down_weight.mul_(50)  # so that the other layer gets as little as there is
        for layer in layers(model):
            layer.constants.zero_()
    return model, config


@pytest.mark.parametrize("gate", ["share", "max", "absolute", "topk"])
@pytest.mark.parametrize("experts", [16, 128])
@pytest.mark.parametrize("active", [0.01, 0.02])
def test_low_fractions_are_calibrated(gate, experts, active):
    model, config = many_experts(experts, gate)
    batches = documents(12)
    calibrate(model, batches, config, points(active, 0.5), allocation="sensitivity")
    low, half = config.budgets
    assert (low.active, half.active) == (active, 0.5)
    assert half.measured == pytest.approx(0.5, rel=0.05)
    with set_gate(model, active=active):
        assert measure_active(model, batches) == pytest.approx(low.measured, rel=1e-9)
    floor = 1 / experts if gate in ("max", "topk") else 0
    assert low.measured == pytest.approx(max(active, floor), rel=0.3, abs=0.6 / experts)


def test_healing_measures_the_objectives_again(monkeypatch):
    model, config = encoder(3)
    batches, unseen = documents(100), documents(100, seed=2)
    monkeypatch.setattr(goals_module, "speedup", lambda *_: 1 / (0.2 + 0.8 * measure_active(model, batches)))
    targets = asked(active=[0.8], max_loss=[0.02], speedup=[1.5])
    calibrate(model, batches, config, targets, unseen=unseen, dense=lambda: None)
    before = {budget.objective: (budget.active, budget.achieved) for budget in config.budgets}
    for layer in layers(model):  # training of some kind
        layer.constants.data.mul_(0.2)
        layer.router.score.data.add_(0.3 * torch.randn_like(layer.router.score))
    calibrate_again(model, batches, config, targets, unseen=unseen, dense=lambda: None)
    for number, budget in enumerate(config.budgets):
        assert budget.active == before[budget.objective][0]
        assert budget.measured == pytest.approx(budget.active, rel=0.02)
        if budget.objective == "max-loss=0.02":
            assert budget.achieved == pytest.approx(relative_loss(model, unseen, number), rel=1e-9)
            assert budget.achieved != pytest.approx(before[budget.objective][1], rel=0.01)
        elif budget.objective == "speedup=1.5":
            assert budget.achieved == pytest.approx(1 / (0.2 + 0.8 * budget.measured), abs=0.01)
        else:
            assert budget.achieved == 0


def test_every_kind_of_target_has_a_goal():
    kinds = {target.kind for target in asked(active=[0.5], flops=[0.8], max_loss=[0.1], speedup=[2.0])}
    assert kinds == set(goals_module.GOALS)
    assert str(Target("max-loss", 0.01)) == "max-loss=0.01"
