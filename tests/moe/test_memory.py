"""A model that keeps one budget: same outputs, less memory, no way back."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import randomise_routers
from transformers import GPT2Config, GPT2LMHeadModel
from zoo import tiny

from d2dmoe import UserError, merge, set_gate
from d2dmoe.config import Budget, D2DMoEConfig
from d2dmoe.discovery import discover, dummy_inputs
from d2dmoe.moe.layer import layers
from d2dmoe.moe.loader import attach


def converted(dense: torch.nn.Module, *, delta_rank: int, linear_rank: int, router_width: int, experts: int):
    """Three budgets with random routers and stand-ins."""
    blocks = discover(dense).blocks
    for block in blocks:
        block.experts = experts
    budgets = [Budget(a, [1 - a] * len(blocks)) for a in (0.25, 0.5, 0.75)]
    config = D2DMoEConfig(
        blocks,
        "topk",
        "linear",
        delta_rank,
        linear_rank,
        router_width,
        budgets=budgets,
        curve=[[0.5, [0.5] * len(blocks)]],
    )
    attach(dense, config, [torch.arange(block.width) for block in blocks], budgets=3)
    randomise_routers(dense)
    for layer in layers(dense):
        for value in layer.stand_ins().values():
            torch.nn.init.normal_(value, std=0.05)
    return dense.eval()


def small() -> torch.nn.Module:
    return converted(tiny("gpt2"), delta_rank=8, linear_rank=4, router_width=8, experts=8)


@pytest.mark.parametrize("active", [0.25, 0.75, 1])
@torch.no_grad()
def test_outputs_stay(active):
    model = small()
    inputs = dummy_inputs(model)
    set_gate(model, active=active)
    before = model(**inputs).logits
    whole = copy.deepcopy(model)
    assert merge(model) is model
    assert torch.equal(model(**inputs).logits, before)
    model.to(torch.bfloat16).float()
    assert not torch.equal(model(**inputs).logits, before)  # nothing of the old weights is kept aside
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in whole.parameters())


def test_there_is_no_way_back(tmp_path):
    model = merge(small())
    with pytest.raises(UserError, match="merged at one budget"):
        set_gate(model, active=0.5)
    with pytest.raises(UserError, match="save it before merging"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="merged already"):
        merge(model)
    with pytest.raises(UserError, match="not converted"):
        merge(tiny("gpt2"))


def test_memory_is_at_most_a_tenth_above_dense():
    with torch.device("meta"):
        dense = GPT2LMHeadModel(GPT2Config(n_layer=2))
    before = sum(p.numel() for p in dense.transformer.h.parameters())  # without the embeddings, which hide the cost
    dense = GPT2LMHeadModel(GPT2Config(n_layer=2, vocab_size=64, n_positions=16))
    model = converted(dense, delta_rank=192, linear_rank=96, router_width=128, experts=96)
    set_gate(model, active=0.25)
    with torch.no_grad():
        merge(model)(torch.zeros(1, 4, dtype=torch.long))
    held = sum(p.numel() for p in model.transformer.h.parameters())
    for layer in layers(model):
        own = {p.data_ptr() for p in layer.parameters()}
        for entry in layer.prepared.entries.values():
            held += sum(t.numel() for t in entry.sparse.keep.values() if t is not None and t.data_ptr() not in own)
    assert held <= 1.1 * before
