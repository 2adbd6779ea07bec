"""Narrower heads: against their formula, exact where heads are of low rank, saved, merged, and with a cache."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from conftest import randomise_vectors
from peft import IA3Config, LoraConfig, get_peft_model
from torch.testing import assert_close
from zoo import attached, check_generation, refit_randomly, tiny

import d2dmoe
from d2dmoe.attention.fit import fit_all
from d2dmoe.attention.heads import heads_of
from d2dmoe.config.budgets import Budget
from d2dmoe.config.projections import HEAD, ProjectionState
from d2dmoe.data import Batches
from d2dmoe.discovery import dummy_inputs, find_projections
from d2dmoe.errors import UserError
from d2dmoe.measure.flops import model_flops, projection_flops
from d2dmoe.moe.gating import set_gate, use_gate
from d2dmoe.moe.heads import parts_of
from d2dmoe.moe.projected import trim_projections
from d2dmoe.moe.projection import projections

MODELS = ("gpt2", "bert", "vit", "llama", "t5", "phi3")


def converted(name: str, dtype: torch.dtype = torch.float64, seed: int = 3) -> torch.nn.Module:
    """A tiny model with random bases; at active=0.5 heads have random widths, alike on both sides."""
    model = attached(tiny(name).to(dtype))
    torch.manual_seed(seed)
    layers = projections(model)
    widths: dict[int, list[int]] = {n: [] for n in range(len(layers))}
    shared = {}  # widths by pair
    for pair, members in heads_of(layers).items():
        counts = {
            role: layers[n].projection.heads[layers[n].projection.role.index(role)] for role, n in members.items()
        }
        full = layers[min(members.values())].projection.head_widths[0]
        shared[pair] = torch.randint(0, full + 1, (min(counts.values()),)).tolist()
    for n, layer in enumerate(layers):
        for name_ in layer.ADDED:
            getattr(layer, name_).normal_()
        p = layer.projection
        for role, count in zip(p.role, p.heads, strict=False):
            if count:
                own = shared[f"{p.attention}.{'qk' if role in 'qk' else 'vo'}"]
                widths[n] += [w for w in own for _ in range(count // len(own))]
    states = [ProjectionState("heads", tuple(w)) if w else ProjectionState() for w in widths.values()]
    config = model.config.quantization_config.d2dmoe
    budget = Budget(0.5, [0.0] * len(config.blocks))
    budget.projection_states = states
    config.budgets.replace([budget])
    refit_randomly(model)
    return model


def by_formula(layer, x: torch.Tensor, widths: tuple[int, ...]) -> torch.Tensor:
    """The docstring of `moe/heads.py`, head by head."""
    p, weight = layer.projection, layer.matrix()
    bias = layer.bias if layer.bias is not None else torch.zeros(p.outputs).to(weight)
    parts = parts_of(p, widths)
    if p.role == "o":
        y = bias + layer.output_mean
        for head, (rows, width) in enumerate(parts):
            own, basis = weight[:, rows], layer.head_basis[rows, :width]
            kept = x[..., rows.start : rows.start + width] - layer.head_mean[head, :width]
            if width == rows.stop - rows.start:  # as it is, but the mean goes by the basis
                y = y + x[..., rows] @ own.T - layer.head_mean[head, :width] @ basis.T @ own.T
            else:
                y = y + kept @ basis.T @ own.T
        thin = torch.cat([x[..., rows.start : rows.start + width] for rows, width in parts], -1)
        return y + thin @ layer.refit_out[0, : sum(widths)] + layer.refit_constant[0]
    y = torch.zeros(*x.shape[:-1], p.outputs).to(x)
    for rows, width in parts:
        full = x @ weight[rows].T + bias[rows]
        thin = full if width == rows.stop - rows.start else full @ layer.head_basis[rows, :width]
        y[..., rows.start : rows.start + width] = thin
    return y


@pytest.mark.parametrize("name", MODELS)
def test_every_projection_is_its_formula(name):
    model = converted(name)
    set_gate(model, active=0.5)
    narrow = 0
    for layer in projections(model):
        x, state = torch.randn(2, 5, layer.projection.inputs).double(), layer.gate_state
        if state.method == "heads":
            narrow += 1
            assert_close(layer(x), by_formula(layer, x, state.ranks))
            with torch.no_grad():
                assert_close(layer(x), by_formula(layer, x, state.ranks))
    assert narrow >= 4


@torch.no_grad()
def of_low_rank(model: torch.nn.Module, rank: int) -> None:
    """Give every head that can be narrower weights of this rank."""
    for p in find_projections(model).found:
        if p.role == "o":
            continue
        module = model.get_submodule(p.name)
        weight = module.weight.T if type(module).__name__ == "Conv1D" else module.weight
        parts = parts_of(p, p.head_widths) if p.heads else []
        counts = [count for count in p.heads for _ in range(max(count, 1))]
        for (rows, width), count in zip(parts, counts, strict=True):
            if count:
                weight[rows] = torch.randn(width, rank).to(weight) @ torch.randn(rank, p.inputs).to(weight) / 4


@pytest.mark.parametrize("name", [name for name in MODELS if name != "vit"])
def test_heads_of_low_rank_lose_nothing(name):
    """Queries have one dimension more: that of their mean."""
    dense = tiny(name).double()
    randomise_vectors(dense)
    of_low_rank(dense, 2)
    model = attached(copy.deepcopy(dense))
    inputs = dummy_inputs(dense)
    data = Batches([{k: v[n].tolist() for k, v in inputs.items()} for n in range(2)], 8)
    layers = projections(model)
    spectra = fit_all(model, data).heads
    assert {pair.split(".")[1] for pair in spectra} == ({"vo"} if name in ("llama", "phi3") else {"qk", "vo"})
    assert all(float(s[:, 3:].sum()) < 1e-6 * float(s.sum()) for s in spectra.values())
    for layer in layers:
        p = layer.projection
        if p.heads:
            layer.gate_state = ProjectionState("heads", (3,) * len(p.head_widths))
    key = next(k for k, v in dense(**inputs).items() if isinstance(v, torch.Tensor) and v.is_floating_point())
    with torch.no_grad():
        assert_close(model(**inputs)[key], dense(**inputs)[key], rtol=1e-4, atol=1e-5)  # moments are sums in fp32
        for layer in layers:
            if layer.projection.heads:
                layer.gate_state = ProjectionState("heads", (1,) * len(layer.projection.head_widths))
        assert not torch.allclose(model(**inputs)[key], dense(**inputs)[key], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_all_on_is_dense_and_a_budget_survives_saving(name, tmp_path):
    dense, inputs = tiny(name), dummy_inputs(tiny(name))
    model = converted(name, torch.float32)
    trim_projections(model, model.config.quantization_config.d2dmoe)
    key = next(k for k, v in dense(**inputs).items() if isinstance(v, torch.Tensor) and v.is_floating_point())
    with torch.no_grad():
        with set_gate(model, active=1):
            assert_close(model(**inputs)[key], dense(**inputs)[key])
        with set_gate(model, active=0.5):
            cheap = model(**inputs)[key]
        assert not torch.allclose(cheap, dense(**inputs)[key])
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path)
        with set_gate(again, active=0.5):
            assert_close(again(**inputs)[key], cheap)  # products depend on where weights lie
        assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["version"] == 5
        stored = again.state_dict()
        assert all(torch.equal(p, stored[n]) for n, p in dense.named_parameters() if n in stored)
        set_gate(again, active=0.5)
        d2dmoe.merge(again)
        assert_close(again(**inputs)[key], cheap)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_and_without_cache(name, beams):
    model = converted(name, torch.float32)
    set_gate(model, active=0.5)
    check_generation(model, beams, static=beams == 1 and name == "llama")


def test_a_cache_belongs_to_the_heads_that_filled_it():
    model, ids = converted("gpt2", torch.float32), torch.randint(5, 30, (2, 6))
    set_gate(model, active=0.5)
    with torch.no_grad():
        cache = model(ids[:, :4], use_cache=True).past_key_values
        continued = model(ids[:, 4:], past_key_values=copy.deepcopy(cache)).logits
        assert_close(continued, model(ids).logits[:, 4:], rtol=1e-4, atol=1e-5)
        for gate in (lambda: set_gate(model, active=1), lambda: use_gate(model, active=[0.5, 1])):
            with gate(), pytest.raises(UserError, match="filled at another budget"):
                model(ids[:, 4:], past_key_values=copy.deepcopy(cache))
        with set_gate(model, active=1):
            dense = model(ids[:, :4], use_cache=True).past_key_values
            model(ids[:, 4:], past_key_values=dense)
        with pytest.raises(UserError, match="filled at another budget"):
            model(ids[:, 4:], past_key_values=dense)
        again = copy.deepcopy(model)
        with set_gate(again, active=1), pytest.raises(UserError, match="filled at another budget"):
            again(ids[:, 4:], past_key_values=cache)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_no_way_around_the_guard_of_caches(name):
    """Whoever filled it, and however it is handed over."""
    model, ids = converted(name, torch.float32), torch.randint(5, 30, (2, 6))
    dense, start, rest = tiny(name), ids[:, :4], ids[:, 4:]
    fill = {
        "a tuple": lambda: model(start, use_cache=True, return_dict=False)[1],
        "the inner model": lambda: model.base_model(start, use_cache=True).past_key_values,
        "another model": lambda: dense(start, use_cache=True).past_key_values,
    }
    with torch.no_grad():
        for filled in fill.values():
            with set_gate(model, active=1):
                cache = filled()
                model(rest, past_key_values=copy.deepcopy(cache))
            with set_gate(model, active=0.5):
                for run in (
                    lambda cache: model(rest, past_key_values=cache),
                    lambda cache: model.base_model(rest, past_key_values=cache),
                    lambda cache: model.base_model(rest, cache) if name == "gpt2" else model(rest, None, None, cache),
                ):
                    with pytest.raises(UserError, match="filled at another budget"):
                        run(copy.deepcopy(cache))


@pytest.mark.parametrize("adapter", [LoraConfig, IA3Config])
def test_an_adapter_around_narrow_heads_is_refused(adapter):
    """It would act in their basis, and in the dense one when it is merged."""
    model, ids = converted("llama", torch.float32), torch.randint(5, 30, (2, 6))
    options = {"feedforward_modules": []} if adapter is IA3Config else {"init_lora_weights": False}
    adapted = get_peft_model(model, adapter(target_modules=["v_proj"], **options))
    with set_gate(adapted, active=1):
        adapted(ids)
    with set_gate(adapted, active=0.5):
        for run in (adapted, lambda ids: adapted.generate(input_ids=ids, max_new_tokens=2, do_sample=False)):
            with pytest.raises(UserError, match=r"an adapter is around model.layers.0.self_attn.v_proj, whose heads"):
                run(ids)
        with adapted.disable_adapter():
            adapted(ids)
        adapted.merge_and_unload()(ids)


def test_flops_are_those_of_the_counter():
    model, inputs = converted("gpt2", torch.float32), dummy_inputs(tiny("gpt2"))
    with torch.no_grad(), set_gate(model, active=1):
        dense = model_flops(model, inputs)
    with torch.no_grad(), set_gate(model, active=0.5):
        model(**inputs)  # weights are derived outside the count
        set_gate(model, active=0.5)
        narrow = model_flops(model, inputs)
        tokens, states = inputs["input_ids"].numel(), [x.gate_state for x in projections(model)]
        found = [projection_flops(x, state=s) for x, s in zip(projections(model), states, strict=True)]
        saved = sum(projection_flops(x, state=ProjectionState()) for x in projections(model)) - sum(found)
    experts = dense - narrow - saved * tokens
    assert saved > 0
    assert experts == 0


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("heads", [3, 3, 3], r"projections\[0\].heads\[0\] is 3"),
        ("heads", [4], r"projections\[0\].heads is \[4\]"),
        ("head_rank", 1000, r"projections\[0\].head_rank is 1000"),
        ("head_rank", 1, r"ranks\[0\]\[\d+\] is"),
        ("attention", -1, r"projections\[0\].attention is -1"),
        ("refits", 1, r"projections\[0\].refits is 1"),
        ("refits", 2, r"projections\[1\].refits is 2"),
        ("refit_rank", 1, r"projections\[1\].refit_rank is 1"),
        ("refit_rank", 1000, r"projections\[1\].refit_rank is 1000"),
    ],
)
def test_a_record_that_does_not_fit(field, value, said, tmp_path):
    model = converted("gpt2", torch.float32)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"].pop("checksums", None)
    number = int(said[len(r"projections\[")]) if said.startswith("projections") else 0
    config["quantization_config"]["projections"][number][field] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=said):
        type(model).from_pretrained(tmp_path)


def test_in_int8():
    model, inputs = converted("gpt2", torch.float32), dummy_inputs(tiny("gpt2"))
    set_gate(model, active=0.5)
    with torch.no_grad():
        exact = model(**inputs).logits
        d2dmoe.set_linear_dtype(model, "int8-dynamic")
        rounded = model(**inputs).logits
    assert not torch.equal(exact, rounded)
    assert torch.nn.functional.cosine_similarity(exact.flatten(), rounded.flatten(), 0) > 0.98


def test_gradients_reach_the_bases():
    model, inputs = converted("bert"), dummy_inputs(tiny("bert"))
    set_gate(model, active=0.5)
    layers = [x for x in projections(model) if x.projection.role != HEAD]
    for layer in layers:
        layer.head_basis.requires_grad_(True)
    model(**inputs).logits.square().sum().backward()
    assert all(layer.head_basis.grad.norm() > 0 for layer in layers)
