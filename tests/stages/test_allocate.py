"""Sharing experts out among layers: against brute force, and on a model where one layer matters more."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from test_calibrate import converted, documents, points

from d2dmoe import set_gate
from d2dmoe.moe.gating import gate_state
from d2dmoe.moe.layer import layers
from d2dmoe.stages.budgets.allocate import (
    SPREAD,
    _interpolate,
    allocate,
    give_out,
    layer_costs,
    savings,
    share_out,
)
from d2dmoe.stages.budgets.calibrate import calibrate
from d2dmoe.stages.budgets.fit import measure_active
from d2dmoe.stages.heal import divergence

ACTIVES = [0.25, 0.5, 0.75]


def test_the_best_of_all_shares_is_found():
    costs = np.array([[0.8, 0.1, 0.02], [0.2, 0.1, 0.05], [3.0, 1.0, 0.2]])
    found = share_out(0.5, ACTIVES, costs, [8, 8, 8], [64, 64, 64])

    def total(counts) -> float:
        return sum(_interpolate(ACTIVES, row, n / 8) for row, n in zip(costs, counts, strict=True))

    allowed = [c for c in itertools.product(range(1, 9), repeat=3) if sum(c) == 12]
    assert sum(found) == pytest.approx(1.5)
    assert total([round(8 * share) for share in found]) == pytest.approx(min(map(total, allowed)))
    assert found[2] > found[0] > found[1]


def test_a_flat_part_of_a_curve_does_not_hide_what_comes_after():
    """The first layer's next experts save nothing, the four after them nearly everything that there is to save."""
    stuck, other = [9.0, 2.0, 2.0, 2.0, 2.0, 0.1, 0.05, 0.02, 0.0], [1.0, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.01, 0.0]
    found = give_out(0.5, [stuck, other], [8, 8], [1, 1])
    best = min(range(1, 8), key=lambda n: stuck[n] + other[8 - n])
    assert [8 * share for share in found] == [best, 8 - best]
    assert best == 5


def test_savings_are_those_of_the_convex_hull():
    generator = np.random.default_rng(1)
    for _ in range(20):
        curve = np.sort(generator.random(12))[::-1]
        saved = savings(curve.tolist())
        hull = curve[0] - np.concatenate([[0], saved.cumsum()])
        assert (np.diff(saved) <= 1e-12).all()
        assert (hull <= curve + 1e-12).all()
        assert hull[-1] == pytest.approx(curve[-1])
        touching = np.isclose(hull, curve)
        for n in np.flatnonzero(~touching):  # elsewhere it is straight
            assert saved[n - 1] == pytest.approx(saved[n])


@pytest.mark.parametrize("active", [0.125, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("shared", [0, 2])
def test_the_average_is_the_budget_and_no_layer_starves(active, shared):
    generator = np.random.default_rng(0)
    experts, weights = [16, 32, 32, 16], [512, 512, 1024, 1024]
    costs = np.sort(generator.random((4, 3)), axis=1)[:, ::-1] * generator.random((4, 1)) * 100
    found = share_out(active, ACTIVES, costs, experts, weights, shared)
    average = sum(a * w for a, w in zip(found, weights, strict=True)) / sum(weights)
    assert average == pytest.approx(active, abs=64 / sum(weights)) or shared
    for share, count in zip(found, experts, strict=True):
        assert share * count == pytest.approx(round(share * count))
        assert share * count >= max(1, shared) - 1e-9
        assert share >= active / SPREAD - 1 / count


def test_interpolation_meets_the_measured_costs_and_falls():
    row = np.array([0.9, 0.2, 0.03])
    assert [_interpolate(ACTIVES, row, a) for a in ACTIVES] == pytest.approx(list(row))
    values = [_interpolate(ACTIVES, row, a) for a in np.linspace(0.02, 1, 50)]
    assert values == sorted(values, reverse=True)
    assert values[-1] == 0.0
    single = [_interpolate([0.5], np.array([0.2]), a) for a in np.linspace(0.02, 1, 50)]
    assert single == sorted(single, reverse=True)


def test_layer_costs_are_the_divergence_with_one_layer_gated():
    model, config = converted(gate="topk")
    batches = documents(5)
    calibrate(model, batches, config, points(0.25, 0.5))
    costs = layer_costs(model, batches, config)
    assert all(layer.gate_state.tau == 0 for layer in layers(model))
    batch = batches[0]
    with torch.no_grad():
        dense = model(**batch)
        for index, layer in enumerate(layers(model)):
            layer.gate_state = gate_state(config, config.budgets[1].taus[index], 1)
            expected = float(divergence(model(**batch), dense, batch["attention_mask"]))
            layer.gate_state = gate_state(config, 0.0)
            assert costs[index, 1] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("gate", ["topk", "share"])
def test_the_layer_whose_output_matters_gets_more(gate):
    model, config = converted(gate=gate)
    with torch.no_grad():
        layers(model)[1].down_weight.mul_(8)
        layers(model)[0].down_weight.mul_(0.1)
    batches = documents()
    calibrate(model, batches, config, points(0.25, 0.5), allocation="sensitivity")
    for budget in config.budgets:
        with set_gate(model, active=budget.active):
            assert measure_active(model, batches) == pytest.approx(budget.active, rel=0.03)
        shares = allocate(model, batches, config)
        assert all(row[1] > row[0] for row in map(shares, (0.25, 0.4, 0.5)))
    if gate == "topk":  # thresholds of the other gates depend on how a layer's scores are spread
        assert config.budgets[0].taus[1] < config.budgets[0].taus[0]


def test_budgets_that_start_alike_are_one_point():
    model, config = converted(gate="topk")
    batches = documents()
    calibrate(model, batches, config, points(0.25, 0.5))
    config.budgets[1].active, config.budgets[1].taus = 0.25, config.budgets[0].taus
    shares = allocate(model, batches, config)
    for active in (0.1, 0.25, 0.6):
        assert sum(shares(active)) / len(config.blocks) == pytest.approx(active, abs=0.05)
