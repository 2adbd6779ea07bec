"""Projections around attention: every way against its formula, in every kind of model, saved and opened again."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from conftest import randomise_routers
from torch.testing import assert_close
from zoo import check_generation, refit_randomly, tiny

import d2dmoe
from d2dmoe.config import D2DMoEConfig
from d2dmoe.config.budgets import Budget
from d2dmoe.config.projections import ProjectionState
from d2dmoe.discovery import discover, dummy_inputs, find_projections
from d2dmoe.errors import UserError
from d2dmoe.moe.gating import set_gate, use_gate
from d2dmoe.moe.loader import attach
from d2dmoe.moe.projection import projections

MODELS = ("gpt2", "bert", "vit", "llama", "t5", "phi3")


def converted(name: str, dtype: torch.dtype = torch.float64):
    """A tiny model whose projections take turns at low rank and channels at active=0.5; FFNs run everything there."""
    model = tiny(name).to(dtype)
    blocks = discover(model).blocks
    for block in blocks:
        block.experts = 8
    found = find_projections(model).found
    for projection in found:
        projection.rank = max(projection.full_ranks)
    config = D2DMoEConfig(blocks=blocks, router_width=8, projections=found)
    attach(model, config, [torch.arange(block.width) for block in blocks])
    randomise_routers(model)
    torch.manual_seed(3)
    for layer in projections(model):
        p = layer.projection
        layer.low_rank_in.normal_(std=p.outputs**-0.5)
        layer.low_rank_out.normal_()
        layer.output_mean.normal_()
        layer.channel_norms.uniform_(0.5, 2)
    budget = Budget(0.5, [0.0] * len(blocks))
    budget.projection_states = [state_for(n, p) for n, p in enumerate(found)]
    config.budgets.replace([budget])
    refit_randomly(model)
    return model


def state_for(number: int, p) -> ProjectionState:
    ranks = tuple(max(r // 2, 1) for r in p.full_ranks)
    ways = [
        ProjectionState("low-rank", ranks),
        ProjectionState("channels", ranks, 0.7),
        ProjectionState("channels", (), 1),
    ]
    return ways[number % 3]


def by_formula(layer, x, state):
    """The docstring of `moe/projection.py`, section by section."""
    weight, y, start = layer.matrix(), [], 0
    keep = (x.abs() * layer.channel_norms >= state.threshold).to(x.dtype) if state.method == "channels" else 0 * x
    for number, width in enumerate(layer.projection.sections):
        rows = slice(start, start + width)
        rank = state.ranks[number] if state.ranks else 0
        into, back, mean = layer.low_rank_in[rows, :rank], layer.low_rank_out[:rank, rows], layer.output_mean[rows]
        part = (x * keep) @ weight[rows].T + (x - x * keep) @ weight[rows].T @ into @ back
        part = part if layer.bias is None else part + layer.bias[rows]
        if state.refit >= 0:
            part = part + layer.refit_constant[state.refit]
            if state.method == "low-rank":
                part = part + x @ weight.T @ into @ layer.refit_out[state.refit, :rank]
        y.append(part + mean - mean @ into @ back if state.method == "low-rank" else part)
        start += width
    return torch.cat(y, -1)


@pytest.mark.parametrize("name", MODELS)
def test_every_way_is_its_formula(name):
    model = converted(name)
    for layer in projections(model):
        x = torch.randn(2, 5, layer.projection.inputs).double()
        states = [state_for(n, layer.projection) for n in range(3)]
        for state in states + [replace(state, refit=0) for state in states if layer.projection.refits]:
            layer.gate_state = state
            assert_close(
                layer(x).detach(), by_formula(layer, x, state).detach(), msg=f"{layer.projection.name} {state}"
            )
            with torch.no_grad():
                assert_close(layer(x), by_formula(layer, x, state))


@pytest.mark.parametrize("name", MODELS)
def test_all_on_is_dense_and_a_budget_survives_saving(name, tmp_path):
    dense, inputs = tiny(name), dummy_inputs(tiny(name))
    model = converted(name, torch.float32)
    key = next(k for k, v in dense(**inputs).items() if isinstance(v, torch.Tensor) and v.is_floating_point())
    with torch.no_grad():
        with set_gate(model, active=1):
            assert_close(model(**inputs)[key], dense(**inputs)[key])
        with set_gate(model, active=0.5):
            cheap = model(**inputs)[key]
        assert not torch.allclose(cheap, dense(**inputs)[key])
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path)
        assert not any(getattr(x, n).requires_grad for x in projections(again) for n in x.ADDED)
        with set_gate(again, active=0.5):
            assert torch.equal(again(**inputs)[key], cheap)
        set_gate(again, active=0.5)
        d2dmoe.merge(again)
        assert torch.equal(again(**inputs)[key], cheap)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_and_without_cache(name, beams):
    model = converted(name, torch.float32)
    set_gate(model, active=0.5)
    check_generation(model, beams, static=beams == 1 and name == "llama")


def test_rows_have_their_own_budgets():
    model, ids = converted("llama", torch.float32), torch.randint(5, 30, (3, 6))
    with torch.no_grad():
        alone = []
        for row, active in zip(ids, (0.5, 1, 0.5), strict=True):
            with use_gate(model, active=active):
                alone.append(model(row[None]).logits)
        with use_gate(model, active=[0.5, 1, 0.5]):
            assert_close(model(ids).logits, torch.cat(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", ["data", "in place", "load", "half and back", "copy"])
def test_weights_that_change_are_seen(change):
    model = converted("gpt2", torch.float32)
    layer = next(x for x in projections(model))
    layer.gate_state = state_for(0, layer.projection)
    x = torch.randn(4, layer.projection.inputs)
    with torch.no_grad():
        layer(x)
        new = torch.randn_like(layer.weight)
        if change == "data":
            layer.weight.data.copy_(new)
        elif change == "in place":
            layer.weight.copy_(new)
        elif change == "load":
            layer.load_state_dict({**layer.state_dict(), "weight": new})
        elif change == "half and back":
            layer.half().float()
        else:
            layer = copy.deepcopy(layer)
            layer.weight.data.mul_(2)
        assert_close(layer(x), by_formula(layer, x, layer.gate_state), rtol=1e-4, atol=1e-4)


def test_lora_on_a_projection():
    peft = pytest.importorskip("peft")
    model = converted("llama", torch.float32)
    set_gate(model, active=0.5)
    inputs = {"input_ids": torch.randint(5, 30, (2, 6))}
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=False))
    loss = adapted(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    assert all(p.grad is not None for n, p in adapted.named_parameters() if "lora_B" in n)
    with torch.no_grad():
        separate = adapted(**inputs).logits
        plain = copy.deepcopy(model)
        with adapted.disable_adapter():
            assert not torch.allclose(adapted(**inputs).logits, separate)
        merged = adapted.merge_and_unload()
        merged(**inputs)
    assert plain is not merged


def test_an_unstored_budget_takes_the_next_one_above():
    model = converted("gpt2")
    stored = [layer.projection.name for layer in projections(model)]
    for active, wanted in ((0.3, "stored"), (0.5, "stored"), (0.6, "dense"), (1, "dense")):
        with set_gate(model, active=active):
            methods = {layer.gate_state.method for layer in projections(model)}
            assert (methods == {"dense"}) == (wanted == "dense"), (active, stored)
    with set_gate(model, tau=0.5):
        assert {layer.gate_state.method for layer in projections(model)} == {"dense"}


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("rank", 10_000, r"projections\[0\].rank is 10000"),
        ("inputs", 7, r"projections\[0\].inputs is 7"),
        ("sections", [3], r"projections\[0\].sections"),
        ("role", "x", r"projections\[0\].role"),
        ("name", "transformer.h.0.attn.nothing", r"projections\[0\].name"),
        ("name", "transformer.h.0.ln_1", "the path of a linear map"),
    ],
)
def test_a_record_that_does_not_fit(field, value, said, tmp_path):
    import json

    model = converted("gpt2", torch.float32)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"].pop("checksums", None)
    config["quantization_config"]["projections"][0][field] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=said):
        type(model).from_pretrained(tmp_path)
