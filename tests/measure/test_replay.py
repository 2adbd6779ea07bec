"""A repeated pass runs only what can have changed, and gives what the whole model gives."""

from __future__ import annotations

import pytest
import torch
from zoo import converted_tiny

from d2dmoe import set_gate
from d2dmoe.measure.replay import Replay
from d2dmoe.moe.layer import layers

QUARTER = {"active": 0.25}


def inputs_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    ids = torch.randint(4, 99, (3, 9), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": (torch.arange(9) < torch.tensor([[9], [5], [7]])).long()}


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama"])
def test_a_repetition_with_one_layer_changed_is_the_pass_of_the_whole_model(name):
    model = converted_tiny(name)
    inputs, runs = inputs_of(model), []
    for number, layer in enumerate(layers(model)):
        layer.register_forward_hook(lambda *_, number=number: runs.append(number))
    count = len(layers(model))
    with torch.no_grad(), set_gate(model, active=1):
        replay = Replay(model)
        dense = replay.first(inputs)
        for index in range(count):
            with set_gate(model, **QUARTER, layers=[index]):
                runs.clear()
                ours = replay.again(index)
                assert runs == list(range(index, count))
                assert torch.equal(ours.logits, model(**inputs).logits)
                assert not torch.equal(ours.logits, dense.logits)
        assert torch.equal(model(**inputs).logits, dense.logits)


def test_the_whole_model_runs_where_a_part_gives_something_on_by_another_way():
    model = converted_tiny("gpt2")
    inputs, held = inputs_of(model), {}
    first, last = model.transformer.h[0], model.transformer.h[-1]
    first.attn.register_forward_hook(lambda *_: held.update(runs=held.get("runs", 0) + 1))
    last.register_forward_hook(lambda _, __, output: output * held.pop("runs", 0))
    with torch.no_grad(), set_gate(model, active=1):
        replay = Replay(model)
        dense = replay.first(inputs)
        assert torch.equal(replay.again(len(layers(model)) - 1).logits, dense.logits)


def test_the_whole_model_runs_where_no_list_holds_the_layers():
    model = converted_tiny("gpt2")
    inputs = inputs_of(model)
    model.transformer.h = torch.nn.Sequential(*model.transformer.h)
    with torch.no_grad(), set_gate(model, active=1):
        replay = Replay(model)
        dense = replay.first(inputs)
        with set_gate(model, **QUARTER, layers=[1]):
            assert torch.equal(replay.again(1).logits, model(**inputs).logits)
        assert torch.equal(replay.again(0).logits, dense.logits)
