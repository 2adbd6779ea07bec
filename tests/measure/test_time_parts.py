"""Where the time of a forward pass goes: every linear map belongs to one part, and time counts where it is spent."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from zoo import converted_tiny, tiny

from d2dmoe.measure.parts import PARTS, parts_of, time_parts
from d2dmoe.measure.timing import CLOCKS
from d2dmoe.moe.layer import DynamicFFN, layers


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """A tiny dense model and a converted one of its shape."""
    return tiny(name), converted_tiny(name)


def inputs_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """One small batch."""
    if model.main_input_name == "pixel_values":
        size = model.config.image_size
        return {"pixel_values": torch.zeros(1, model.config.num_channels, size, size)}
    return {"input_ids": torch.arange(1, 7)[None]}


@pytest.mark.parametrize("name", ["gpt2", "bert", "vit", "llama"])
def test_every_linear_map_is_in_one_part(name):
    dense, model = pair(name)
    blocks = [layer.block for layer in layers(model)]
    maps = {id(m): n for n, m in dense.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    in_blocks = {path for b in blocks for path in (b.up, b.gate, b.down) if path}
    found = parts_of(dense, blocks)
    inside = [id(m) for place in found["blocks"] for m in place.modules() if id(m) in maps]
    assert sorted(maps[i] for i in inside) == sorted(in_blocks)
    others = [id(m) for part in ("linear maps", "head") for m in found[part]]
    assert sorted(others + inside) == sorted(maps)
    if name in ("gpt2", "llama"):
        assert found["head"] == [dense.get_output_embeddings()]
    ours = parts_of(model, blocks)
    assert ours["blocks"] == layers(model)
    assert all(isinstance(m, DynamicFFN) for m in ours["blocks"])
    assert [len(ours[part]) for part in ("linear maps", "head")] == [
        len(found[part]) for part in ("linear maps", "head")
    ]


@pytest.mark.parametrize("name", ["gpt2", "bert", "vit"])
@torch.no_grad()
def test_time_counts_where_it_is_spent(name, monkeypatch):
    """With a clock that stands still but for what each part's modules add to it."""
    dense, model = pair(name)
    blocks, at = [layer.block for layer in layers(model)], [0.0]
    monkeypatch.setitem(CLOCKS, "wall", lambda: at[0])
    takes = dict(zip(PARTS, (0.5, 0.25, 0.125, 2.0), strict=True))

    def slow(module: nn.Module, seconds: float) -> None:
        forward = module.forward

        def run(*args, **kwargs):
            at[0] += seconds
            return forward(*args, **kwargs)

        module.forward = run

    for one in (dense, model):
        calls = {part: len(modules) for part, modules in parts_of(one, blocks).items()}
        for part, modules in parts_of(one, blocks).items():
            for module in modules:
                slow(module, takes[part])
        slow(one, takes["everything else"])
        spent = time_parts(one, blocks, lambda x, m=one: m(**x), [inputs_of(one)], seconds=0.0)
        assert spent == {part: 1000 * takes[part] * calls.get(part, 1) for part in PARTS}
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in one.modules())
