"""What a change costs the output: on which text, in what measure, and that less work never costs less."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from test_calibrate import converted, documents, points
from transformers import BertConfig, BertForSequenceClassification

from d2dmoe.data import Batches
from d2dmoe.moe.gating import gate_state
from d2dmoe.moe.layer import layers
from d2dmoe.stages.budgets import costs, projections, receivers
from d2dmoe.stages.budgets.calibrate import calibrate
from d2dmoe.stages.budgets.costs import Trial, output_costs
from d2dmoe.stages.heal import Reference, divergence


def classifier() -> BertForSequenceClassification:
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=99, num_labels=3, **sizes)).eval()


def test_logits_of_sequences_are_compared_by_their_centred_difference():
    torch.manual_seed(0)
    dense, ours = torch.randn(5, 3), torch.randn(5, 3)
    reference = Reference({"logits": dense}, torch.ones(5, 7))
    gap = ours - dense
    expected = (gap - gap.mean(1, keepdim=True)).square().mean()
    assert reference.outputs == 5
    assert reference.divergence({"logits": ours}) == pytest.approx(float(expected))
    assert reference.divergence({"logits": dense + torch.arange(5)[:, None]}) == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("shape", [(2, 6, 9), (4, 1)], ids=["tokens", "one number"])
def test_others_by_their_divergence(shape):
    torch.manual_seed(0)
    dense, ours = ({"logits": torch.randn(shape)} for _ in range(2))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    reference = Reference(dense, mask)
    assert reference.outputs == (10 if len(shape) == 3 else 4)
    assert reference.divergence(ours) == pytest.approx(float(divergence(ours, dense, mask)))


@pytest.mark.parametrize(("samples", "tokens", "kept"), [(10, 10_000, 10), (1000, 50, None)])
def test_classifiers_are_measured_on_the_last_sequences(monkeypatch, samples, tokens, kept):
    monkeypatch.setattr(costs, "TOKENS", 8)
    monkeypatch.setattr(costs, "SAMPLES", samples)
    monkeypatch.setattr(costs, "MOST_TOKENS", tokens)
    model, config = converted(model=classifier(), gate="topk")
    batches = documents(40)
    calibrate(model, batches, config, points(0.25))
    kept = kept or len(batches.last(50).items)
    assert 3 < kept < 40
    trial = Trial(1, [layers(model)[1]], [gate_state(config, config.budgets[0].taus[1], 0)])
    (found,) = output_costs(model, batches, layers(model), [trial], "costs")
    assert layers(model)[1].gate_state.tau == 0
    gaps = []
    with torch.no_grad():
        for item in batches.items[-kept:]:
            batch = batches.collate([item])
            dense = model(**batch).logits
            trial.layers[0].gate_state = trial.states[0]
            gaps.append((model(**batch).logits - dense)[0].var(correction=0))
            trial.layers[0].gate_state = gate_state(config, 0.0)
    assert found > 0
    assert found == pytest.approx(float(torch.stack(gaps).mean()), rel=1e-5)


def test_the_last_tokens():
    batches = Batches([{"input_ids": list(range(5, 5 + n))} for n in (4, 3, 6, 2)], 2)
    assert [len(item["input_ids"]) for item in batches.last(8).items] == [6, 2]
    assert batches.last(15) is batches


def test_less_work_never_costs_less(monkeypatch):
    """A lucky figure at a small share does not win over the way that is steadily better."""
    steady, lucky = [0.4, 0.3, 0.2, 0.1], [0.01, 1.0, 0.5, 0.35]
    measured = {"channels": steady, "channels+": lucky}

    def once(model, batches, parts, trials, name):
        return torch.tensor([cost for kind in measured for cost in measured[kind]], dtype=torch.float64)

    monkeypatch.setattr(receivers, "output_costs", once)
    layer = SimpleNamespace(
        projection=SimpleNamespace(macs=1, calls=1, sections=(), full_ranks=(), factored_macs=lambda ranks: 0)
    )
    group = projections.Group([0], [layer], [[]], torch.linspace(1, 0, 50), tuple(measured))
    receivers._measure(None, None, [group])
    assert group.costs == {"channels": steady, "channels+": [1.0, 1.0, 0.5, 0.35]}
    assert all(group.best(share) == "channels" for share in (0.05, 0.15, 0.3, 0.6, 0.9))
    assert group.curve() == sorted(group.curve(), reverse=True)
