"""Statistics from inputs that were kept are those of running the model again."""

from __future__ import annotations

import pytest
import torch
from zoo import converted_tiny

from d2dmoe.data import Batches
from d2dmoe.measure import layer_inputs
from d2dmoe.measure.layer_inputs import LayerInputs
from d2dmoe.measure.observe import EnoughSeen
from d2dmoe.moe.layer import layers

GENERATOR = torch.Generator().manual_seed(0)
ITEMS = [{"input_ids": torch.randint(4, 99, (length,), generator=GENERATOR).tolist()} for length in (9, 4, 12, 7, 5, 6)]


def seen(inputs: LayerInputs, **options) -> dict[int, list]:
    found: dict[int, list] = {}
    inputs.observe(lambda i, layer, x, hidden, *_: found.setdefault(i, []).append((x.clone(), hidden)), **options)
    return found


def passes(model: torch.nn.Module) -> list[int]:
    count = [0]
    model.transformer.register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    return count


@pytest.mark.parametrize(("room", "in_file"), [(2**20, False), (10_000, True), (10_000, False)])
def test_kept_inputs_are_those_of_the_dense_pass(room, in_file, monkeypatch, tmp_path):
    """With room for them the model runs once, otherwise every time; what is seen is the same, padding left out."""
    monkeypatch.setattr(layer_inputs, "KEPT", room)
    model = converted_tiny("gpt2")
    count, inputs = passes(model), LayerInputs(model, Batches(ITEMS, 2), tmp_path if in_file else None)
    first, second = seen(inputs), seen(inputs)
    assert count[0] == (3 if inputs.kept else 6)
    assert inputs.kept == (room > 10_000 or in_file)
    assert sum(len(x) for x, _ in first[0]) == sum(len(item["input_ids"]) for item in ITEMS)
    for index in range(len(layers(model))):
        for (x, hidden), (again, activations) in zip(first[index], second[index], strict=True):
            assert torch.equal(x, again)
            torch.testing.assert_close(hidden, activations, rtol=1e-5, atol=1e-6)
    inputs.forget()
    assert not inputs.kept
    assert not any(tmp_path.iterdir())


def test_a_full_disk_is_not_filled(monkeypatch, tmp_path):
    monkeypatch.setattr(layer_inputs, "KEPT", 0)
    monkeypatch.setattr(layer_inputs, "ROOM", 10**15)
    inputs = LayerInputs(converted_tiny("gpt2"), Batches(ITEMS, 2), tmp_path)
    seen(inputs)
    assert not inputs.kept


def test_only_some_layers_and_only_the_first_tokens():
    model = converted_tiny("gpt2")
    inputs = LayerInputs(model, Batches(ITEMS, 2))
    seen(inputs)
    count = passes(model)
    assert set(seen(inputs, only={1})) == {1}
    few = inputs.leading(14)
    assert [len(x) for x, _ in seen(few)[0]] == [13, 19]  # two batches of two sequences
    assert count[0] == 0
    assert [len(x) for x, _ in seen(LayerInputs(model, Batches(ITEMS, 2)).leading(14))[0]] == [13, 12]


def test_a_pass_that_an_observer_ends_is_not_kept():
    def enough(*_):
        raise EnoughSeen

    inputs = LayerInputs(converted_tiny("gpt2"), Batches(ITEMS, 2))
    inputs.observe(enough)
    assert not inputs.kept
    assert set(seen(inputs)) == {0, 1}
