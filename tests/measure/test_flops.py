"""Analytic counts against torch's `FlopCounterMode` on the dense model, and by hand. One MAC is two operations."""

from __future__ import annotations

import pytest
import torch
from conftest import randomise_routers
from torch.utils.flop_counter import FlopCounterMode
from zoo import tiny

from d2dmoe.config import D2DMoEConfig
from d2dmoe.data import Batches
from d2dmoe.discovery import discover, dummy_inputs
from d2dmoe.kernels import native, use_backend
from d2dmoe.measure.evaluate import evaluate
from d2dmoe.measure.flops import dense_cost, dense_ffn_flops, model_flops, sparse_ffn_flops
from d2dmoe.measure.observe import ActiveCounter, model_inputs, observing
from d2dmoe.moe.layer import DynamicFFN, GateState, layers
from d2dmoe.moe.loader import attach

TOKENS, EXPERTS, ROUTER = 7, 8, 5
FAMILIES = {  # zoo name -> path of the first dense block
    "gpt2": "transformer.h.0.mlp",
    "llama": "model.layers.0.mlp",
    "phi3": "model.layers.0.mlp",
    "granite": "model.layers.0.mlp",
}


def converted(name: str, budgets: int = 1, stand_in: str = "mean", experts: int = EXPERTS) -> torch.nn.Module:
    model = tiny(name)
    blocks = discover(model).blocks
    for block in blocks:
        block.experts = experts
    config = D2DMoEConfig(blocks=blocks, router_width=ROUTER, stand_in=stand_in)
    attach(model, config, [torch.arange(b.width) for b in blocks], budgets=budgets)
    for layer in layers(model):
        if layer.constants is not None:
            torch.nn.init.zeros_(layer.constants)
    randomise_routers(model)
    return model


def first_layer(name: str, **options) -> DynamicFFN:
    return layers(converted(name, **options))[0]


def counted(module: torch.nn.Module, *inputs: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", FAMILIES)
def test_dense_count_is_what_torch_counts(name):
    model = tiny(name)
    hidden = model.config.hidden_size
    width = getattr(model.config, "intermediate_size", None) or model.config.n_inner
    block = counted(model.get_submodule(FAMILIES[name]), torch.randn(1, TOKENS, hidden))
    assert block == 2 * TOKENS * hidden * width * (2 if name == "gpt2" else 3)
    assert dense_ffn_flops(first_layer(name)) * TOKENS == block


def test_dense_count_of_known_sizes():
    """The zoo's GPT-2 is 32 -> 64 -> 32; its Llama has a gate besides."""
    assert dense_ffn_flops(first_layer("gpt2")) == 2 * (32 * 64 + 64 * 32)
    assert dense_ffn_flops(first_layer("llama")) == 2 * (2 * 32 * 64 + 64 * 32)


def test_dense_count_covers_every_call_of_a_shared_block():
    model = tiny("albert")
    inner = model.config.intermediate_size
    per_call = 2 * 2 * model.config.hidden_size * inner
    assert dense_ffn_flops(first_layer("albert")) == per_call * model.config.num_hidden_layers


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "albert"])
def test_blocks_are_what_the_model_loses_without_them(name):
    """Whole-model count minus the same model with its blocks removed = the blocks' analytic count."""
    inputs = {"input_ids": torch.randint(5, 99, (1, TOKENS))}
    model = converted(name)
    whole, blocks = model_flops(model, inputs), sum(dense_ffn_flops(layer) for layer in layers(model))
    for layer in layers(model):
        layer.forward = torch.zeros_like if name != "bert" else lambda x: x[..., :32] * 0
    assert whole - model_flops(model, inputs) == blocks * TOKENS


@pytest.mark.parametrize("name", ["gpt2", "albert", "swin", "t5-gated"])
def test_share_of_the_blocks_where_layers_see_different_numbers_of_rows(name):
    """Swin merges patches from stage to stage; here the encoder of T5 reads three times what the decoder writes."""
    model = converted(name, stand_in="zero", budgets=0)
    inputs = dummy_inputs(tiny(name))
    if "decoder_input_ids" in inputs:
        inputs["decoder_input_ids"] = inputs["decoder_input_ids"][:, :3]
    cost = dense_cost(model, inputs)
    share = cost.blocks(dense_ffn_flops(layer) for layer in layers(model)) / cost.total
    assert (len({round(count, 6) for count in cost.rows}) > 1) == (name in ("swin", "t5-gated"))
    for layer in layers(model):
        layer.gate_state = GateState("topk", 0.5)
    counter = ActiveCounter()
    with torch.no_grad(), observing(model, counter):
        model(**inputs)
    active = counter.by_layer(len(layers(model)))
    halved = cost.blocks(sparse_ffn_flops(x, a) for x, a in zip(layers(model), active, strict=True))
    with use_backend("native" if native.LIVE else "reference"):
        counted_halved = model_flops(model, inputs)
    whole = model_flops(tiny(name), inputs)
    for layer in layers(model):
        layer.forward = lambda x, d=layer.down_weight.shape[-1]: x.new_zeros(*x.shape[:-1], d)
    without = model_flops(model, inputs)
    assert share == pytest.approx(1 - without / whole, rel=1e-6)
    if native.LIVE:
        gates = cost.blocks(layer.block.experts * layer.block.calls for layer in layers(model))
        saved = (whole - counted_halved) / whole
        assert saved == pytest.approx(share - (halved - gates) / cost.total, rel=1e-6)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("samples", "length"), [(1, 5), (3, 11)])
def test_whole_model_by_hand(samples, length, attention):
    """Projections, FFN and LM head per token; two products of length x length x hidden per layer for attention."""
    model = tiny("gpt2")
    model.set_attn_implementation(attention)
    per_token = 2 * (4 * 32 * 32 + 2 * 32 * 64) + 32 * 99
    products = 2 * 2 * length * 32
    inputs = {"input_ids": torch.randint(5, 99, (samples, length))}
    assert model_flops(model, inputs) == 2 * samples * length * (per_token + products)


def test_whole_model_scales_with_the_batch_and_counts_the_setting():
    model = converted("gpt2")
    ids = torch.randint(5, 99, (1, 6))
    once = model_flops(model, {"input_ids": ids})
    assert model_flops(model, {"input_ids": ids.expand(3, -1)}) == 3 * once
    assert once == model_flops(tiny("gpt2"), {"input_ids": ids})  # all experts on: the dense model
    for layer in layers(model):
        layer.gate_state = GateState("topk", 0.5)
    routers = len(layers(model)) * 2 * (32 * ROUTER + ROUTER * EXPERTS)
    with use_backend("reference"):  # masks and saves nothing
        assert model_flops(model, {"input_ids": ids}) == once + 6 * routers
    if native.library()[0] is not None:
        saved = sum(dense_ffn_flops(layer) for layer in layers(model)) // 2
        assert model_flops(model, {"input_ids": ids}) == once + 6 * (routers - saved)


@pytest.mark.parametrize("active", [0.0, 0.25, 1.0])
@pytest.mark.parametrize(("name", "per_token"), [("gpt2", 8192), ("llama", 12288)])
def test_sparse_count_by_hand(name, per_token, active):
    """Router 2 (32 x 5 + 5 x 8) = 400, gate 8 comparisons, a 32-vector addition for each executed expert."""
    layer = first_layer(name)
    layer.gate_state = GateState("topk", 0.75)
    assert sparse_ffn_flops(layer, active) == active * per_token + 400 + 8
    layer.gate_state = GateState("topk", 0.75, stand_in=0)
    assert sparse_ffn_flops(layer, active) == active * per_token + 400 + 8 + active * 8 * 32


def test_sparse_count_with_everything_on_is_the_dense_count():
    layer = first_layer("llama")
    layer.gate_state = GateState("topk", 0.0, stand_in=0)
    assert sparse_ffn_flops(layer, 1.0) == dense_ffn_flops(layer)


def test_sparse_count_without_stand_ins_in_the_checkpoint():
    layer = first_layer("gpt2", stand_in="zero")
    assert layer.constants is None
    layer.gate_state = GateState("topk", 0.5, stand_in=0)
    assert sparse_ffn_flops(layer, 0.5) == 0.5 * 8192 + 408


def test_sparse_count_of_a_shared_block_covers_every_call():
    layer = first_layer("albert")
    layer.gate_state = GateState("max", 0.5, stand_in=0)
    calls = tiny("albert").config.num_hidden_layers
    assert sparse_ffn_flops(layer, 0.5) == calls * (0.5 * 8192 + 408 + 0.5 * 8 * 32)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_padding_is_executed_and_counted(name):
    """Seven experts of ten neurons hold the 64 of a block; the dense count stays what it was."""
    layer = first_layer(name, experts=7)
    assert dense_ffn_flops(layer) == dense_ffn_flops(first_layer(name))
    layer.gate_state = GateState("topk", 0.0)
    with_padding = counted(layer, torch.randn(1, TOKENS, 32)) / TOKENS
    assert sparse_ffn_flops(layer, 1.0) == with_padding == dense_ffn_flops(layer) * 70 / 64


def test_fractions_of_a_padded_model_are_those_of_the_dense_one():
    model, dense = converted("gpt2", stand_in="zero", budgets=0, experts=7), tiny("gpt2")
    batches = Batches([{"input_ids": list(range(5, 17))}] * 4, 4)
    (row,) = evaluate(model, batches, [{"tau": 0.5}])
    total = model_flops(dense, model_inputs(dense, batches[0])) / 48
    blocks = sum(dense_ffn_flops(layer) for layer in layers(model))
    assert (1 - row["flops_fraction_model"]) * total == pytest.approx((1 - row["flops_fraction_ffn"]) * blocks)


def test_a_model_that_hands_a_view_of_a_parameter_to_a_module():
    """DeBERTa gives its table of relative positions to a linear map; the counter asks for the history of that."""
    model = tiny("deberta-v2")
    inputs = dummy_inputs(model)
    before = [parameter.requires_grad for parameter in model.parameters()]
    assert all(before)
    counted = model_flops(model, inputs)
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    assert model_flops(model.requires_grad_(False), inputs) == counted > 0
