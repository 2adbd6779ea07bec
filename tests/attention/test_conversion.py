"""Conversions with attention: what is stored, what it costs, and what the budgets share out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import randomise_vectors
from torch.testing import assert_close
from zoo import tiny

from d2dmoe import ConvertConfig, UserError
from d2dmoe.config.projections import ProjectionState
from d2dmoe.config.sizes import choose_projections
from d2dmoe.convert import convert_model
from d2dmoe.data import Batches
from d2dmoe.discovery import find_projections
from d2dmoe.measure.evaluate import evaluate
from d2dmoe.measure.flops import dense_cost, model_flops, projection_flops
from d2dmoe.measure.observe import model_inputs
from d2dmoe.moe.gating import set_gate, stored_config
from d2dmoe.moe.projection import projections

QUICK = ConvertConfig(
    experts=8, router_width=8, router_tokens=64, router_batch=16, calibration_tokens=400, active=[0.5],
    attention="auto",
)  # fmt: skip


def batches(rows: int = 60, length: int = 12) -> Batches:
    ids = torch.randint(5, 99, (rows, length), generator=torch.Generator().manual_seed(4)).tolist()
    return Batches([{"input_ids": row} for row in ids], 8)


def wide(name: str) -> torch.nn.Module:
    """A tiny model whose biases are not zero."""
    model = tiny(name)
    randomise_vectors(model)
    return model


@pytest.mark.parametrize(
    ("name", "way"),
    [
        *((name, way) for name in ("gpt2", "llama", "bert") for way in ("auto", "low-rank", "channels", "heads")),
        ("falcon", "auto"), ("t5", "auto"),
        *(pytest.param("t5", way, marks=pytest.mark.slow) for way in ("low-rank", "channels")),
    ],
)  # fmt: skip
def test_convert_save_and_open(name, way, tmp_path):
    model, data = wide(name), batches()
    inputs = model_inputs(model, data[0])
    with torch.no_grad():
        dense = next(v for v in model(**inputs).values() if isinstance(v, torch.Tensor))
    convert_model(model, replace(QUICK, attention=way, attention_active=0.5), data)
    (row,) = evaluate(model, data, [{"active": 0.5}], metric="cosine_to_dense")
    assert 0.3 < row["flops_fraction_attention"] < 0.56
    (budget,) = stored_config(model).budgets
    kinds = {s.method for s in budget.projection_states}
    also = {"auto": {"low-rank", "channels", "heads"}, "heads": {"low-rank"}}.get(way, set())
    assert kinds <= {way, "dense"} | also
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        for active in (0.5, 1):
            set_gate(model, active=active)
            set_gate(again, active=active)
            ours, theirs = (
                next(v for v in m(**inputs).values() if isinstance(v, torch.Tensor)) for m in (model, again)
            )
            assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # products depend on where weights lie
        assert_close(ours, dense, rtol=1e-4, atol=1e-5)


def test_a_budget_holds_for_everything_together():
    model, data = wide("llama"), batches()
    convert_model(model, replace(QUICK, active=[0.4, 0.7]), data)
    cost = dense_cost(model, model_inputs(model, data[0]))
    for row in evaluate(model, data, [{"active": 0.4}, {"active": 0.7}]):
        before = cost.blocks(6 * x.block.width * x.block.d_model for x in _layers(model)), cost.dense_projections(model)
        spent = row["active_fraction"] * before[0] + row["flops_fraction_attention"] * before[1]
        assert spent / sum(before) == pytest.approx(row["active"], abs=0.06)


def _layers(model):
    from d2dmoe.moe.layer import layers

    return layers(model)


def test_flops_are_those_of_the_counter():
    """Low rank is two products per section: counted against `FlopCounterMode`."""
    model, data = wide("gpt2"), batches()
    convert_model(model, replace(QUICK, attention="low-rank", attention_active=0.4), data)
    inputs = model_inputs(model, data[0])
    states = stored_config(model).budgets[0].projection_states
    with torch.no_grad(), set_gate(model, active=1):
        dense = model_flops(model, inputs)
        for layer, state in zip(projections(model), states, strict=True):
            layer.gate_state = state
            layer(torch.zeros(1, layer.projection.inputs))  # factors are derived outside the count
        saved = sum(projection_flops(x, state=ProjectionState()) - projection_flops(x) for x in projections(model))
        assert dense - model_flops(model, inputs) == saved * inputs["input_ids"].numel()


def test_bases_end_where_the_budgets_end():
    model = wide("llama")
    convert_model(model, replace(QUICK, attention="low-rank", attention_active=0.3), batches())
    states = stored_config(model).budgets[0].projection_states
    for layer, state in zip(projections(model), states, strict=True):
        assert layer.projection.rank == layer.low_rank_in.shape[1] == max(state.ranks)


@pytest.mark.parametrize(
    ("name", "attention", "layers", "roles"),
    [
        ("llama", "auto", "", ["q", "k", "v", "o"] * 2),
        ("llama", "auto:q,k", "", ["q", "k"] * 2),
        ("llama", "low-rank:o", "1", ["o"]),
        ("gpt2", "channels:q,k,v", "", ["qkv"] * 2),
        ("llama", "auto", "0-1", ["q", "k", "v", "o"] * 2),
    ],
)
def test_which_projections(name, attention, layers, roles):
    config = ConvertConfig(attention=attention, attention_layers=layers)
    found = choose_projections(config, find_projections(tiny(name)).found)
    assert sorted(p.role for p in found) == sorted(roles)
    assert {p.group for p in found} == set(range(len({p.group for p in found})))


@pytest.mark.parametrize(
    ("attention", "layers", "said"),
    [
        ("some", "", "is none of none, auto"),
        ("auto:x", "", "some of q,k,v,o"),
        ("auto:q", "", "a fused one is converted with all its roles"),
        ("auto", "5", "2 attention layers"),
        ("auto", "a-b", "numbers and ranges"),
    ],
)
def test_what_cannot_be(attention, layers, said):
    with pytest.raises(UserError, match=said):
        choose_projections(
            ConvertConfig(attention=attention, attention_layers=layers), find_projections(tiny("gpt2")).found
        )


def test_a_model_without_attention():
    with pytest.raises(UserError, match="no projection around attention"):
        choose_projections(ConvertConfig(attention="auto"), [])


def test_only_so_much_text_is_read(monkeypatch):
    """The costs of projections come from text that nothing was fitted on, and of that no more than was asked for."""
    read = []

    def measure_ways(model, batches, *_):
        read.append(batches.tokens)
        raise KeyboardInterrupt

    monkeypatch.setattr("d2dmoe.pipeline.model.measure_ways", measure_ways)
    monkeypatch.setattr("d2dmoe.pipeline.model.LEAST_UNSEEN", 32)
    data = batches()
    with pytest.raises(KeyboardInterrupt):
        convert_model(wide("gpt2"), replace(QUICK, attention="auto", calibration_tokens=64), data)
    assert data.tokens > 3 * 64
    assert 0 < read[0] <= 64 + len(data.items[0]["input_ids"])


MORE = replace(QUICK, calibration_tokens=1500)


def strong(name: str) -> torch.nn.Module:
    """A tiny model in which much is lost before the last layer."""
    model = wide(name)
    for parameter in model.parameters():
        parameter.data *= 3
    return model


def test_refits_are_stored_for_every_budget_unless_they_are_not_wanted():
    for wanted in (True, False):
        model, data = strong("gpt2"), batches(200)
        convert_model(model, replace(MORE, attention="low-rank", active=[0.6, 0.3], compensate=wanted), data)
        record = stored_config(model)
        outputs = [layer for layer in projections(model) if layer.projection.role == "o"]
        refitted = [layer for layer in outputs if layer.projection.refits]
        assert {layer.projection.refits for layer in refitted} == ({2} if wanted else set())
        assert record.to_dict()["version"] == (5 if wanted else 1)
        for layer in refitted:
            less, more = (budget.projection_states[layer.number].ranks[0] for budget in record.budgets)
            assert layer.refit_out.shape == (2, more, layer.projection.outputs)
            assert not layer.refit_out[0, less:].any()


def test_a_conversion_that_was_interrupted_after_calibration_has_its_refits(tmp_path, monkeypatch):
    config, data = replace(MORE, attention="heads", active=[0.3, 0.6]), batches(200)
    model, again = strong("gpt2"), strong("gpt2")
    convert_model(model, config, data, work=tmp_path)
    monkeypatch.setattr("d2dmoe.pipeline.model.calibrate", None)  # it would fail
    convert_model(again, config, data, work=tmp_path, resume=True)
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert any(name.endswith("refit_out") for name in ours)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_search_refits_what_it_ends_with():
    """Every fraction that is tried has other ranks."""
    model, data = strong("gpt2"), batches(200)
    convert_model(model, replace(MORE, attention="low-rank", active=[], max_loss=[0.02]), data)
    (budget,) = stored_config(model).budgets
    for layer, state in zip(projections(model), budget.projection_states, strict=True):
        if layer.projection.refits:
            assert layer.refit_out.shape[1] == layer.projection.refit_rank == state.ranks[0]
    assert any(layer.projection.refits for layer in projections(model))
    inputs = model_inputs(model, data[0])
    with torch.no_grad(), set_gate(model, budget=0):
        assert model(**inputs).logits.isfinite().all()
