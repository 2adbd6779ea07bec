"""A walk meets every module as a pass of the whole model does, and does not run again what lies behind it."""

from __future__ import annotations

import pytest
import torch
from zoo import converted_tiny

from d2dmoe import set_gate
from d2dmoe.data import Batches
from d2dmoe.measure import layer_inputs
from d2dmoe.measure.observe import model_inputs
from d2dmoe.measure.walk import Walk
from d2dmoe.moe.layer import DynamicFFN, layers

QUARTER = {"active": 0.25}
GENERATOR = torch.Generator().manual_seed(0)
ITEMS = [{"input_ids": torch.randint(4, 99, (length,), generator=GENERATOR).tolist()} for length in (9, 4, 12, 7, 5, 6)]
BATCHES = Batches(ITEMS, 2)


def in_whole_passes(model: torch.nn.Module, gate: dict[str, float]) -> dict[DynamicFFN, list[tuple]]:
    """What each layer reads and writes, padding left out."""
    found, mask = {layer: [] for layer in layers(model)}, []

    def keep(layer: DynamicFFN, args: tuple, output: torch.Tensor) -> None:
        wanted = mask[-1].reshape(-1).bool()
        found[layer].append(tuple(t.reshape(-1, t.shape[-1])[wanted] for t in (args[0], output)))

    handles = [layer.register_forward_hook(keep) for layer in found]
    with torch.no_grad(), set_gate(model, **gate):
        for batch in BATCHES:
            mask.append(batch["attention_mask"])
            model(**model_inputs(model, batch))
    for handle in handles:
        handle.remove()
    return found


def count_calls(model: torch.nn.Module) -> list[DynamicFFN]:
    calls: list[DynamicFFN] = []
    for layer in layers(model):
        layer.register_forward_hook(lambda module, *_: calls.append(module))
    return calls


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama"])
def test_every_module_is_met_as_in_the_whole_model(name):
    model = converted_tiny(name)
    wanted = in_whole_passes(model, QUARTER)
    steps = Walk(model, BATCHES, layers(model)[::-1], QUARTER)
    assert steps.order == layers(model)
    for layer in steps.order:
        for ours, theirs in zip(steps.at(layer), wanted[layer], strict=True):
            assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize(("room", "in_file", "again"), [(2**20, False, 1), (0, True, 1), (0, False, 3)])
def test_what_was_passed_is_run_once_where_there_is_room(room, in_file, again, tmp_path):
    """But for the check, once on the first piece."""
    model = converted_tiny("gpt2")
    first, second = layers(model)
    calls = count_calls(model)
    steps = Walk(model, BATCHES, layers(model), QUARTER, tmp_path if in_file else None, room)
    calls.clear()
    list(steps.at(first))
    assert calls == [first] * 3
    list(steps.at(second))
    calls.clear()
    list(steps.at(second))
    assert calls.count(first) == again
    assert calls.count(second) == 3 + (again == 1) * 2
    calls.clear()
    list(steps.at(second))
    assert calls.count(first) == (again == 3) * 3


def test_a_full_disk_is_not_filled(monkeypatch, tmp_path):
    monkeypatch.setattr(layer_inputs, "ROOM", 10**15)
    model = converted_tiny("gpt2")
    first, second = layers(model)
    calls = count_calls(model)
    steps = Walk(model, BATCHES, layers(model), QUARTER, tmp_path, 0)
    for layer in (first, second, second):
        calls.clear()
        list(steps.at(layer))
    assert calls.count(first) == 3


def test_a_change_of_a_module_is_met_by_those_after_it():
    model = converted_tiny("gpt2")
    first, second = layers(model)
    steps = Walk(model, BATCHES, layers(model), QUARTER)
    list(steps.at(first))
    with torch.no_grad():
        first.down_weight.mul_(-2)
    wanted = in_whole_passes(model, QUARTER)[second]
    for _ in range(2):  # the second time with what was kept
        for ours, theirs in zip(steps.at(second), wanted, strict=True):
            assert all(map(torch.equal, ours, theirs))


def test_everything_runs_again_where_a_part_passes_something_on_by_another_way():
    model = converted_tiny("gpt2")
    held: dict[str, torch.Tensor] = {}
    blocks = model.transformer.h
    blocks[0].attn.register_forward_hook(lambda _, __, output: held.update(mean=output[0].mean()))
    blocks[1].register_forward_pre_hook(lambda _, args: (args[0] + held.pop("mean", 0), *args[1:]))
    wanted = in_whole_passes(model, QUARTER)
    steps = Walk(model, BATCHES, layers(model), QUARTER)
    for layer in steps.order:
        for _ in range(2):
            for ours, theirs in zip(steps.at(layer), wanted[layer], strict=True):
                assert all(map(torch.equal, ours, theirs))
