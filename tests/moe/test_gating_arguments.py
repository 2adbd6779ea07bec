"""What `set_gate` takes for a model, a number and a layer."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_memory import small

from d2dmoe import UserError, set_gate
from d2dmoe.moe.layer import layers

NUMBERS = [0.25, "0.25", "25%", " 25 %", np.float32(0.25), torch.tensor(0.25), np.array(0.25)]


@pytest.mark.parametrize("value", NUMBERS, ids=repr)
def test_numbers_in_every_form(value):
    model = small()
    set_gate(model, active=value)
    assert layers(model)[0].gate_state.tau == 0.75
    assert layers(model)[0].gate_state.stand_in == 0


BAD = {
    "active": [True, "a quarter", None.__class__, [0.25], {}, "", float("nan"), 0, -1, 1.01],
    "tau": [True, "x", -0.1, float("nan"), 1.5],
    "budget": [True, False, 0.0, "0", -1, 3, float("nan")],
    "layers": [True, 7, -3, "mlp", ["nobody"], [0.5], [None]],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD.items() for v in values], ids=repr)
def test_everything_else_is_a_sentence(name, value):
    arguments = {name: value} if name != "layers" else {"active": 0.5, "layers": value}
    with pytest.raises(UserError):
        set_gate(small(), **arguments)


@pytest.mark.parametrize("which", [0, np.int64(0), "transformer.h.0.mlp", [0], ["transformer.h.0.mlp"], range(1), -2])
def test_layers_in_every_form(which):
    model = small()
    set_gate(model, active=1)
    set_gate(model, active=0.5, layers=which)
    assert [layer.gate_state.tau for layer in layers(model)] == [0.5, 0]


def test_models_in_wrappers_and_pipelines():
    model = small()
    wrapped = [
        torch.nn.Sequential(model), torch.compile(model), SimpleNamespace(model=model),
        SimpleNamespace(model=torch.nn.Sequential(model)),
    ]  # fmt: skip
    for number, outer in enumerate(wrapped):
        set_gate(outer, active=(0.25, 0.5)[number % 2])
        assert layers(model)[0].gate_state.tau == (0.75, 0.5)[number % 2]
    for wrong in ("gpt2", None, SimpleNamespace(model="gpt2")):
        with pytest.raises(UserError, match="is not a model"):
            set_gate(wrong, active=0.5)
    with pytest.raises(UserError, match="not converted"):
        set_gate(torch.nn.Linear(2, 2), active=0.5)


def test_notes_are_given_once_and_do_not_pile_up():
    model = small()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for n in range(1000):
            set_gate(model, active=0.3 + n / 10_000)
        set_gate(model, active=0.3999)
    assert len(seen) == 1000
    assert len(model.config.quantization_config.d2dmoe.__dict__["_said"]) <= 64
