"""Distillation with the gate in the loop: what it trains, what it leaves alone, and that it helps on unseen tokens."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from test_calibrate import converted, documents, points
from torch.testing import assert_close
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput
from zoo import tiny

import d2dmoe.stages.heal as stage
from d2dmoe import set_gate
from d2dmoe.attention.bases import set_basis
from d2dmoe.config import Budget, ConvertConfig
from d2dmoe.convert import convert_model
from d2dmoe.kernels.gates import select, straight_through
from d2dmoe.moe.gating import stored_config
from d2dmoe.moe.layer import layers
from d2dmoe.moe.projection import projections
from d2dmoe.pipeline.model import _healed
from d2dmoe.stages.budgets.calibrate import calibrate
from d2dmoe.stages.heal import Parts, divergence, heal


def calibrated(**settings):
    torch.manual_seed(0)
    model, config = converted(stand_in="linear", gate="topk", delta_rank=8, linear_rank=4, **settings)
    for layer in layers(model):
        layer.down_weight.data.mul_(100)  # so that the blocks matter to the logits
        layer.up_weight.data.mul_(10)
        for value in layer.stand_ins().values():
            value.data.zero_()
    calibrate(model, documents(64), config, points(0.25, 0.5))
    return model, config


def losses(model, batches) -> list[float]:
    out = []
    for active in (0.25, 0.5):
        total = 0.0
        for batch in batches:
            with torch.no_grad():
                with set_gate(model, active=1):
                    dense = model(**batch)
                with set_gate(model, active=active):
                    total += float(divergence(model(**batch), dense, batch["attention_mask"]))
        out.append(total)
    return out


SETTINGS = {"heal": 60, "heal_tokens": 64, "heal_learning_rate": 3e-3}
GENTLE = {**SETTINGS, "heal_learning_rate": 0}  # of every weight: 5e-5


@pytest.mark.parametrize("what", ["stand-ins", "routers", "all"])
def test_it_lowers_the_divergence_and_trains_what_was_asked(what):
    model, config = calibrated()
    before, unseen = copy.deepcopy(model), documents(40, seed=9)
    start = losses(model, unseen)
    settings = GENTLE if what == "all" else SETTINGS
    log = heal(model, documents(64), ConvertConfig(heal_parameters=what, **settings), config)
    assert log[-1]["step"] == 60
    assert log[-1]["relative"] < 1
    for name, parameter in model.named_parameters():
        trained = not torch.equal(parameter, before.get_parameter(name))
        stand_in = any(name.endswith(end) for end in ("constants", "delta_in", "delta_out", "linear_in", "linear_out"))
        if "router" in name:
            assert trained == (what != "stand-ins"), name
        elif stand_in:
            assert trained, name
        else:
            assert not trained or what == "all", name
        assert parameter.requires_grad == before.get_parameter(name).requires_grad
    if what != "all":  # the dense model that it is compared with has changed
        assert all(now < then for now, then in zip(losses(model, unseen), start, strict=True))
    if what == "stand-ins":
        ids = unseen[0]
        with set_gate(model, tau=0), set_gate(before, tau=0), torch.no_grad():
            assert torch.equal(model(**ids).logits, before(**ids).logits)


@contextmanager
def interrupted(monkeypatch, when: Callable[[int], bool]):
    """Inside, healing is interrupted when it compares outputs, if `when` says so for the number of times."""
    real, calls = stage.divergence, []

    def dies(*args):
        calls.append(1)
        if when(len(calls)):
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(stage, "divergence", dies)
        yield


@pytest.mark.parametrize("what", ["stand-ins", "all"])
def test_what_does_not_help_is_undone(what, monkeypatch):
    """On text that healing did not see; and a failure leaves nothing half trained."""
    model, config = calibrated()
    before = copy.deepcopy(model)
    settings = ConvertConfig(heal_parameters=what, **{**SETTINGS, "heal_learning_rate": 3.0})
    log = heal(model, documents(64), settings, config)
    assert log[-1]["relative"] > 1
    with interrupted(monkeypatch, lambda calls: calls > 30), pytest.raises(KeyboardInterrupt):
        heal(model, documents(64), ConvertConfig(heal_parameters=what, **SETTINGS), config)
    for (name, a), (_, b) in zip(model.named_parameters(), before.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(("after", "kept"), [([0.5, 0.03], False), ([0.9, 0.01], True), ([0.1, 0.019], False)])
def test_budgets_count_alike(after, kept, monkeypatch):
    """A budget that is near the dense model is not given up for one that is far from it."""
    model, config = calibrated()
    before, found = copy.deepcopy(model), [torch.tensor([1.0, 0.01]), torch.tensor(after)]
    monkeypatch.setattr(stage.Student, "distances", lambda *_: found.pop(0))
    log = heal(model, documents(64), ConvertConfig(**{**SETTINGS, "heal": 4}), config)
    assert log[-1]["relative"] == pytest.approx((after[0] + after[1] / 0.01) / 2)
    pairs = zip(model.parameters(), before.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs) != kept


@pytest.mark.parametrize("others", [1, 0])
def test_budgets_at_which_nothing_learns_are_left_out(others):
    """Everything runs at the last one: nothing stands in for anything there."""
    model, config = calibrated()
    config.budgets.replace([*[config.budgets[n] for n in range(others)], Budget(1.0, [0.0] * len(layers(model)))])
    before = copy.deepcopy(model)
    log = heal(model, documents(64), ConvertConfig(**SETTINGS), config)
    assert log[-1]["relative"] < 1
    assert ("step" in log[-1]) == ("left out" not in _healed(log[-1])) == bool(others)
    pairs = zip(model.parameters(), before.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs) == (not others)


@pytest.mark.parametrize(("bases", "when"), [(False, "training"), (True, "trial"), (True, "training")])
def test_it_resumes_to_the_same_weights(bases, when, tmp_path, monkeypatch):
    """After a kill in the first trial of a learning rate, or when the training has saved a state."""
    whole, config = calibrated() if not bases else ((model := attached()), stored_config(model))
    cut, cut_config = copy.deepcopy(whole), copy.deepcopy(config)
    settings, state, chosen = ConvertConfig(heal=120, heal_tokens=64), tmp_path / "state", tmp_path / "heal-rate.json"
    log = heal(whole, documents(64), settings, config)

    cut_off = (lambda calls: calls > 20) if when == "trial" else (lambda _: state.exists())
    with interrupted(monkeypatch, cut_off), pytest.raises(KeyboardInterrupt):
        heal(cut, documents(64), settings, cut_config, state_dir=state)
    assert state.exists() == (when == "training")
    assert chosen.exists() == (bases and when == "training")
    heal(cut, documents(64), settings, cut_config, state_dir=state, resume=True)
    for (name, a), (_, b) in zip(whole.named_parameters(), cut.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert ("bases_learning_rate" in log[-1]) == bases
    if bases:
        assert json.loads(chosen.read_text())["chosen"] == log[-1]["bases_learning_rate"]


@pytest.mark.parametrize("what", ["stand-ins", "all"])
def test_the_learning_rate_of_bases_is_tried_unless_one_is_given(what, monkeypatch):
    usual, asked = {"stand-ins": 1e-4, "all": 5e-5}[what], []
    monkeypatch.setattr(stage, "chosen_rate", lambda tried, rate, *_: asked.append(rate) or 4 * rate)
    config = ConvertConfig(heal=3, heal_tokens=64, heal_parameters=what)
    for given, expected in ((0.0, 4 * usual), (10 * usual, 10 * usual if what == "all" else usual)):
        model = attached()
        log = heal(model, documents(64), replace(config, heal_learning_rate=given), stored_config(model))
        assert log[-1]["bases_learning_rate"] == pytest.approx(expected)
    assert asked == pytest.approx([usual])


def test_divergence_is_the_kl_of_the_positions_that_count():
    ours, dense = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    p, q = dense.float().softmax(-1), ours.float().softmax(-1)
    expected = ((p * (p / q).log()).sum(-1) * mask).sum() / 3
    assert_close(divergence(CausalLMOutput(logits=ours), CausalLMOutput(logits=dense), mask), expected)
    assert float(divergence(CausalLMOutput(logits=ours), CausalLMOutput(logits=ours), mask)) == pytest.approx(0)


def test_divergence_of_hidden_states_is_relative():
    dense = torch.randn(2, 3, 8)
    ours = dense + 0.1 * torch.randn(2, 3, 8)
    each = (ours - dense).square().sum(-1) / dense.square().sum(-1)
    value = divergence(BaseModelOutput(last_hidden_state=ours), BaseModelOutput(last_hidden_state=dense))
    assert_close(value, each.mean())
    scaled = divergence(BaseModelOutput(last_hidden_state=7 * ours), BaseModelOutput(last_hidden_state=7 * dense))
    assert_close(scaled, value)


@pytest.mark.parametrize("at_once", [1, 20, 10**6])
def test_parts_cover_every_sequence_once_an_epoch(at_once):
    batches = documents(48)
    parts = Parts(batches, 80, at_once, seed=3)
    per_epoch = len(batches.items) // parts.rows
    seen = [parts(i) for i in range(per_epoch)]
    pairs = [pair for b in seen for pair in zip(b["input_ids"], b["attention_mask"], strict=True)]
    rows = sorted(tuple(row[: mask.sum()].tolist()) for row, mask in pairs)
    everything = {tuple(item["input_ids"].tolist()) for item in batches.items}
    assert len(rows) == per_epoch * parts.rows
    assert set(rows) <= everything
    assert len(everything) - len(set(rows)) < parts.rows
    assert [b["number"] for b in seen] == [i // parts.per_step for i in range(per_epoch)]
    assert torch.equal(parts(5)["input_ids"], parts(5)["input_ids"])


@pytest.mark.parametrize("gate", ["max", "topk", "share"])
def test_straight_through_keeps_the_choice_and_pulls_at_the_edge(gate):
    scores = torch.rand(7, 16, dtype=torch.float64, requires_grad=True)
    run = select(scores.detach(), gate, 0.4)
    soft = straight_through(scores, run)
    assert_close(soft.detach(), run.double())
    soft.sum().backward()
    assert (scores.grad > 0).all()
    edge = (scores.detach() - scores.detach().masked_fill(~run, 9).amin(1, keepdim=True)).abs()
    nearest, farthest = edge.argmin(1), edge.argmax(1)
    rows = torch.arange(7)
    assert (scores.grad[rows, nearest] >= scores.grad[rows, farthest]).all()


def test_gradients_pass_the_gate_to_routers_and_to_nothing_before_them():
    """What comes before a layer has the gradient of the choice as it was made."""
    model, _ = calibrated()
    layer = layers(model)[0]
    x, found = torch.randn(9, layer.block.d_model, dtype=layer.up_weight.dtype), {}
    for soft in (False, True):
        layer.gate_state = replace(layer.gate_state, tau=0.5, soft=soft)
        layer.router.requires_grad_(True).zero_grad()
        inputs = x.clone().requires_grad_()
        layer(inputs).square().sum().backward()
        found[soft] = inputs.grad
        given = [p.grad for p in layer.router.parameters()]
        assert all(g is not None and g.any() for g in given) if soft else given == [None, None]
    assert_close(found[True], found[False])


@pytest.mark.parametrize("what", ["stand-ins", "all"])
@pytest.mark.parametrize("attention", ["low-rank", "channels"])
def test_bases_of_projections_learn_and_the_dense_model_keeps_its_own(what, attention):
    model = tiny("gpt2")
    quick = {"experts": 8, "router_width": 8, "router_tokens": 64, "router_batch": 16, "calibration_tokens": 400}
    config = ConvertConfig(**quick, active=[0.5], attention=attention, attention_active=0.4, heal_parameters=what,
                           heal=40, heal_tokens=64, head="svd-softmax", head_active=0.5)  # fmt: skip
    convert_model(model, replace(config, heal=0), documents(64))
    before = copy.deepcopy(model)
    log = heal(model, documents(64), config, stored_config(model))
    assert log[-1]["relative"] < 1
    used = [any(state.ranks) for state in stored_config(model).budgets[0].projection_states]
    for layer, old, learns in zip(projections(model), projections(before), used, strict=True):
        for name in ("low_rank_in", "low_rank_out"):
            assert torch.equal(getattr(layer, name), getattr(old, name)) != learns, (layer.projection.name, name)
        assert all(torch.equal(layer.channel_norms, old.channel_norms) for _ in layer.ADDED[3:])
    assert any(used)
    ids = documents(4, seed=3)[0]
    with set_gate(model, active=1), set_gate(before, active=1), torch.no_grad():
        assert torch.equal(model(**ids).logits, before(**ids).logits) == (what == "stand-ins")


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_a_step_on_a_basis_does_not_depend_on_units(scale):
    """Gradients of any size lead to factors that are equally long, with the same product."""
    layer = projections(attached())[0]
    torch.manual_seed(0)
    into, back = torch.randn_like(layer.low_rank_in), torch.randn_like(layer.low_rank_out)
    set_basis(layer, into * scale, back / scale)
    assert_close(layer.low_rank_in @ layer.low_rank_out, into @ back)
    assert_close(layer.low_rank_in.norm(dim=0), layer.low_rank_out.norm(dim=1))
    set_basis(layer, into * 0, back)
    assert not (layer.low_rank_in @ layer.low_rank_out).any()


def attached():
    """A model whose projections have room for bases."""
    model = tiny("gpt2")
    quick = {"experts": 8, "router_width": 8, "router_tokens": 64, "router_batch": 16, "calibration_tokens": 400}
    convert_model(model, ConvertConfig(**quick, active=[0.5], attention="low-rank"), documents(16))
    return model
