"""What the prediction of the time counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from zoo import tiny

from d2dmoe import ConvertConfig
from d2dmoe.discovery import discover
from d2dmoe.pipeline import estimate
from d2dmoe.pipeline.estimate import _counts, predicted_seconds

CONFIG = ConvertConfig(active=[0.25, 0.5], router_fit="closed-form", calibration_tokens=1000, eval_tokens=100)


def prepared(name: str):
    model = tiny(name)
    blocks = discover(model).blocks
    for block in blocks:
        block.experts = 8
    return model, blocks


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_token_of_evaluation_is_the_products_of_a_forward_pass(name):
    model, blocks = prepared(name)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.tensor([[5]]))
    less, more = (_counts(model, blocks, replace(CONFIG, eval_tokens=n))[0] for n in (100, 200))
    per_token = (more - less) / 100 / 3  # dense, and two budgets
    assert per_token == pytest.approx(counter.get_total_flops(), rel=0.05)  # vectors count, attention of one does not


def test_time_grows_with_what_is_asked_for(monkeypatch):
    model, blocks = prepared("gpt2")
    monkeypatch.setattr(estimate, "_throughput", lambda dtype: 1e9)
    base = predicted_seconds(model, blocks, CONFIG)
    for change in (
        {"calibration_tokens": 4000}, {"active": [0.25, 0.5, 0.75]}, {"eval_tokens": 5000}, {"router_fit": "refined"},
        {"also_eval": "builtin"},
    ):  # fmt: skip
        assert predicted_seconds(model, blocks, replace(CONFIG, **change)) > base
    assert predicted_seconds(model, blocks, replace(CONFIG, stand_in="zero", allocation="uniform")) < base
