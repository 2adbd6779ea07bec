"""Weights that change behind what was derived from them, in every way that libraries change weights."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from test_memory import converted, small
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.testing import assert_close
from zoo import tiny

from d2dmoe import keep_dense, set_gate, use_gate
from d2dmoe.discovery import dummy_inputs
from d2dmoe.kernels import dispatching, native, use_backend
from d2dmoe.moe.layer import DynamicFFN, GateState, layers

DTYPES = {torch.float32: {"rtol": 1e-4, "atol": 1e-4}, torch.float64: {"rtol": 1e-10, "atol": 1e-10}}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
needs_native = pytest.mark.skipif(not native.LIVE, reason="the CPU kernels were not built")
NAMES = ("up_weight", "up_bias", "down_weight", "down_bias", "constants", "delta_in", "delta_out", "linear_in")


class Scaled(nn.Module):
    def __init__(self, factor: float):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.factor


def each(model: nn.Module, change) -> None:
    for layer in layers(model):
        change(layer)


def averaged(model: nn.Module) -> None:
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.mul_(1.2)
    for parameter, new in zip(model.parameters(), other.parameters(), strict=True):
        parameter.data.copy_(0.5 * parameter.data + 0.5 * new.data)


def swapped(model: nn.Module) -> None:
    for parameter in model.parameters():
        kept = parameter.data
        parameter.data = kept * 0.8
        del kept


def replaced(model: nn.Module) -> None:
    def change(layer):
        for name in NAMES:
            setattr(layer, name, nn.Parameter(getattr(layer, name) * 1.3, requires_grad=False))

    each(model, change)


def parametrised(model: nn.Module) -> None:
    def change(layer):
        for name in ("up_weight", "down_weight"):
            parametrize.register_parametrization(layer, name, Scaled(1.5))

    each(model, change)


def parametrisation_changed(model: nn.Module) -> None:
    each(model, lambda layer: layer.parametrizations.up_weight[0].factor.data.fill_(0.3))


def parametrisation_removed(model: nn.Module) -> None:
    each(model, lambda layer: [parametrize.remove_parametrizations(layer, n) for n in ("up_weight", "down_weight")])


def pruned(model: nn.Module) -> None:
    each(model, lambda layer: prune.random_unstructured(layer, "up_weight", amount=0.4))


def pruning_removed(model: nn.Module) -> None:
    each(model, lambda layer: prune.remove(layer, "up_weight"))


def in_place(name: str):
    return lambda model: each(model, lambda layer: getattr(layer, name).mul_(1.5))


def through_data(name: str):
    return lambda model: each(model, lambda layer: getattr(layer, name).data.mul_(1.5))


CHANGES = {
    "one tensor in place": [in_place(name) for name in NAMES],
    "one tensor through .data": [through_data(name) for name in NAMES],
    "averaged": [averaged, averaged],
    "swapped": [swapped, swapped],
    "load_state_dict": [lambda m: m.load_state_dict({k: v * 0.9 for k, v in m.state_dict().items()})] * 2,
    "replaced": [replaced, replaced],
    "parametrised": [parametrised, parametrisation_changed, parametrisation_removed],
    "pruned twice": [pruned, pruned, pruning_removed],
    "cast": [lambda m: m.double(), lambda m: m.float()],
}


@needs_native
@pytest.mark.parametrize("keep", [False, True], ids=["", "dense kept"])
@pytest.mark.parametrize("active", [0.25, 0.5, 1])
@pytest.mark.parametrize("name", CHANGES)
@each_dtype
@torch.no_grad()
def test_outputs_follow_the_weights(dtype, name, active, keep):
    model = small().to(dtype)
    inputs = dummy_inputs(model)
    if keep:
        keep_dense(model)
    set_gate(model, active=active)
    mode = "auto" if keep else "sparse"
    with dispatching(mode):
        before = model(**inputs).logits
        for change in CHANGES[name]:
            change(model)
            y = model(**inputs).logits
            with use_backend("reference"):
                expected = model(**inputs).logits
            assert_close(y, expected, **DTYPES[y.dtype])
            if y.dtype == torch.float64:  # for which there are no kernels: nothing is derived, so the others tell
                single = copy.deepcopy(model).float()
                assert_close(single(**inputs).logits.double(), y, **DTYPES[torch.float32])
            fresh = model(**inputs).logits
            assert torch.equal(fresh, y)
    if name not in ("cast", "one tensor in place", "one tensor through .data", "pruned twice"):
        assert not torch.allclose(y, before, rtol=1e-3, atol=1e-3)


@needs_native
@each_dtype
@torch.no_grad()
def test_toggling_the_gate_changes_nothing(dtype):
    model = small().to(dtype)
    inputs = dummy_inputs(model)
    set_gate(model, active=0.25)
    model(**inputs)
    averaged(model)
    y = model(**inputs).logits
    set_gate(model, active=1)
    model(**inputs)
    set_gate(model, active=0.25)
    assert torch.equal(model(**inputs).logits, y)


@each_dtype
def test_an_adapter_on_the_experts_acts_and_learns(dtype):
    model = small().to(dtype)
    inputs = dummy_inputs(model)
    set_gate(model, active=0.5)
    with torch.no_grad():
        before = model(**inputs).logits
    adapted = get_peft_model(
        model, LoraConfig(r=4, target_modules=[], target_parameters=["mlp.up_weight"], init_lora_weights=False)
    ).eval()
    adapted.to(dtype)  # peft makes its own matrices in fp32
    with torch.no_grad():
        y = adapted(**inputs).logits
        assert not torch.allclose(y, before, rtol=1e-3, atol=1e-3)
        with use_backend("reference"):
            assert_close(adapted(**inputs).logits, y, **DTYPES[dtype])
        with adapted.disable_adapter():
            assert_close(adapted(**inputs).logits, before, **DTYPES[dtype])
    adapted(**inputs).logits.square().sum().backward()
    grads = [p.grad for n, p in adapted.named_parameters() if "lora_" in n]
    assert len(grads) == 4
    assert all(g is not None and g.abs().sum() > 0 for g in grads)
    merged = adapted.merge_and_unload()
    with torch.no_grad():
        assert_close(merged(**inputs).logits, y, **DTYPES[dtype])


OFFLOADS = {
    "cpu_offload": lambda m, folder: cpu_offload(m, torch.device("cpu")),
    "disk_offload": lambda m, folder: disk_offload(m, str(folder), torch.device("cpu")),
    "device_map": lambda m, folder: dispatch_model(
        m, {"transformer.wte": "cpu", "transformer.wpe": "cpu", "transformer.h": "disk", "transformer.ln_f": "cpu",
            "lm_head": "cpu"}, main_device="cpu", offload_dir=str(folder), force_hooks=True,
    ),
}  # fmt: skip


@needs_native
@pytest.mark.parametrize("active", [0.25, 1])
@pytest.mark.parametrize("kind", OFFLOADS)
@torch.no_grad()
def test_offloaded_layers_work_and_hold_nothing(kind, active, tmp_path):
    model = small()
    inputs = dummy_inputs(model)
    set_gate(model, active=active)
    expected = model(**inputs).logits
    model = OFFLOADS[kind](copy.deepcopy(model), tmp_path)
    assert all(p.is_meta for layer in layers(model) for p in layer.parameters())
    for _ in range(2):
        assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    assert not any(layer.prepared.entries for layer in layers(model))


@needs_native
@torch.no_grad()
def test_tensors_that_are_not_in_memory_never_reach_native_code():
    layer: DynamicFFN = layers(small())[0]
    layer.router.hidden = nn.Parameter(layer.router.hidden.to("meta"), requires_grad=False)
    set_gate_of(layer)
    with pytest.raises(RuntimeError, match="router_hidden is on the device meta"):
        layer(torch.randn(3, layer.block.d_model))
    plan_layer = layers(small())[0]
    set_gate_of(plan_layer)
    for bad in (torch.randn(3, layer.block.d_model + 1), torch.randn(3, layer.block.d_model - 1)):
        with pytest.raises((ValueError, RuntimeError), match=r"for a layer of|must match|shape"):
            plan_layer(bad)


def set_gate_of(layer: DynamicFFN) -> None:
    layer.gate_state = replace(layer.gate_state, tau=0.5)


ACTIONS = {
    "averaged": averaged,
    "swapped": swapped,
    "in place": lambda m: each(m, lambda layer: layer.constants.mul_(0.7)),
    "through .data": lambda m: each(m, lambda layer: layer.delta_in.data.add_(0.1)),
    "loaded": lambda m: m.load_state_dict({k: v * 0.95 for k, v in m.state_dict().items()}),
    "cast": lambda m: m.double().float(),
    "frozen": lambda m: m.requires_grad_(False),
    "gate 0.25": lambda m: set_gate(m, active=0.25),
    "gate 0.75": lambda m: set_gate(m, active=0.75),
    "gate 1": lambda m: set_gate(m, active=1),
    "dense kept": keep_dense,
    "adapter on": lambda m: None if adapted(m) else parametrised(m),
    "adapter changed": lambda m: parametrisation_changed(m) if adapted(m) else None,
    "adapter off": lambda m: parametrisation_removed(m) if adapted(m) else None,
}


def adapted(model: nn.Module) -> bool:
    return any(parametrize.is_parametrized(layer) for layer in layers(model))


@needs_native
@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(sorted(ACTIONS)), min_size=1, max_size=7))
def test_any_sequence_of_changes_equals_a_model_that_never_derived_anything(actions):
    """After each of them, three threads with budgets of their own and one without, all at once."""
    with torch.no_grad():
        model = small()
        ids = dummy_inputs(model)["input_ids"][:1]

        def logits(of: nn.Module, active: float | None) -> torch.Tensor:
            with torch.no_grad(), use_gate(of, active=active) if active else nullcontext():
                return of(input_ids=ids).logits

        with ThreadPoolExecutor(4) as pool:
            for action in actions:
                ACTIONS[action](model)
                fresh = copy.deepcopy(model)
                budgets = [None, 0.25, 0.5, 1]
                expected = [logits(fresh, active) for active in budgets]
                for y, wanted in zip(pool.map(lambda a: logits(model, a), budgets), expected, strict=True):
                    assert torch.equal(y, wanted), actions
                with use_backend("reference"):
                    assert_close(logits(model, None), expected[0], rtol=1e-4, atol=1e-4)


@needs_native
@torch.no_grad()
def test_settings_that_share_stand_ins_share_their_down_projection():
    """And not after a change that a setting is the first to see."""
    model = small()
    layer = layers(model)[0]
    x = torch.randn(3, layer.block.d_model)
    for tau in (0.5, 0.6, 0.7):
        layer.gate_state = GateState("topk", tau, 1)
        layer(x)
    folds = {entry.tensors["down_weight"].data_ptr() for entry in layer.prepared.entries.values()}
    assert len(layer.prepared.entries) == 3
    assert len(folds) == 1
    layer.delta_out.data.mul_(3)
    layer.gate_state = GateState("topk", 0.8, 1)
    y = layer(x)
    with use_backend("reference"):
        assert_close(y, layer(x), rtol=1e-4, atol=1e-4)


@needs_native
@pytest.mark.parametrize("active", [0.25, 1])
@each_dtype
@torch.no_grad()
def test_rows_of_zero_neurons_that_an_adapter_has_filled_follow_as_well(dtype, active):
    model = converted(tiny("gpt2"), delta_rank=0, linear_rank=0, router_width=8, experts=7).to(dtype)
    inputs = dummy_inputs(model)
    set_gate(model, active=active)
    for factor in (1.0, 1.5, 0.5):
        each(model, lambda layer, f=factor: layer.down_weight.data.mul_(f).add_(0.1))
        y = model(**inputs).logits
        with use_backend("reference"):
            assert_close(y, model(**inputs).logits, **DTYPES[dtype])
