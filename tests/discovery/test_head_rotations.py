"""Which heads can be narrower, in many architectures; and that it has to be proved."""

from __future__ import annotations

import pytest
import torch
from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM
from zoo import tiny

from d2dmoe.config import ConvertConfig
from d2dmoe.config.sizes import choose_projections
from d2dmoe.discovery import find_projections

SMALL = {"num_hidden_layers": 1, "vocab_size": 99, "bos_token_id": 0, "eos_token_id": 0}


def heads(model: torch.nn.Module, **options) -> dict[str, list[int]]:
    """Of the first attention, by role."""
    found = find_projections(model, **options).found
    first = next(p.name.rpartition(".")[0].rpartition(".")[0] for p in found)
    return {p.role: p.heads for p in reversed(found) if p.name.startswith(first)}


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("gpt2", {"qkv": [4, 4, 4], "o": [4]}),
        ("bert", {"q": [4], "k": [4], "v": [4], "o": [4]}),
        ("vit", {"q": [4], "k": [4], "v": [4], "o": [4]}),
        ("t5", {"q": [4], "k": [4], "v": [4], "o": [4]}),
        ("llama", {"q": [], "k": [], "v": [2], "o": [4]}),  # rotary positions
        ("phi3", {"qkv": [0, 0, 2], "o": [4]}),
    ],
)
def test_what_rotations_prove(name, wanted):
    assert heads(tiny(name)) == wanted


def test_one_key_head_for_all_queries():
    model = GPTBigCodeForCausalLM(GPTBigCodeConfig(n_embd=32, n_head=4, n_layer=1, vocab_size=99)).eval()
    assert heads(model) == {"qkv": [4, 1, 1], "o": [4]}


def test_other_layouts_are_left_alone():
    """GPT-NeoX has queries, keys and values of a head side by side."""
    config = GPTNeoXConfig(hidden_size=32, num_attention_heads=4, intermediate_size=64, **SMALL)
    assert heads(GPTNeoXForCausalLM(config).eval()) == {"qkv": [], "o": []}


def test_nothing_is_proved_on_one_token():
    """There a softmax is 1 whatever queries and keys are; values show all the same."""
    model = tiny("bert")
    one = {"input_ids": torch.tensor([[7], [8]])}
    assert heads(model, inputs=one) == {"q": [], "k": [], "v": [4], "o": [4]}


@pytest.mark.parametrize(
    ("attention", "name", "wanted"),
    [
        ("auto", "bert", {"q": [4], "k": [4], "v": [4], "o": [4]}),
        ("heads:q,k", "bert", {"q": [4], "k": [4]}),
        ("heads:q,v,o", "bert", {"q": [], "v": [4], "o": [4]}),
        ("heads:q,k,v", "gpt2", {"qkv": [4, 4, 0]}),
        ("low-rank", "bert", {"q": [], "k": [], "v": [], "o": []}),
    ],
)
def test_both_sides_or_none(attention, name, wanted):
    found = choose_projections(ConvertConfig(attention=attention), find_projections(tiny(name)).found)
    assert {p.role: p.heads for p in found} == wanted
    assert all(bool(p.head_rank) == bool(p.heads) for p in found)
