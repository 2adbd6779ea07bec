"""Routers without training, and what routers are told, each against an independent computation."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_calibrate import EXPERTS, converted, documents, layer_inputs
from torch.testing import assert_close

from d2dmoe.config import ConvertConfig
from d2dmoe.moe.layer import layers
from d2dmoe.moe.router import expert_norms
from d2dmoe.stages.routers.fit import both_signs, fit_routers, select_features
from d2dmoe.stages.routers.targets import RouterTarget
from d2dmoe.stages.routers.training import binary_cross_entropy


def everything(model, batches):
    """`(x, hidden)` of every layer over all tokens."""
    out = []
    for layer, x in zip(layers(model), layer_inputs(model, batches), strict=True):
        hidden = torch.stack([layer.act(x @ u + b) for u, b in zip(layer.up_weight, layer.up_bias, strict=True)])
        out.append((x, hidden.detach()))
    return out


def test_closed_form_beats_the_mean_and_random_routers():
    model, _ = converted()
    batches, unseen = documents(400), documents(60, seed=4)
    before = [layer.router(x).detach() for layer, (x, _) in zip(layers(model), everything(model, unseen), strict=True)]
    fit_routers(model, batches, ConvertConfig(router_target="norm"))
    for layer, (x, hidden), random in zip(layers(model), everything(model, unseen), before, strict=True):
        target = expert_norms(hidden, layer.down_weight)
        error = (layer.router(x) - target).square().mean()
        assert error < 0.7 * (target - target.mean(0)).square().mean()
        assert error < (random - target).square().mean()


def test_moments_of_both_signs_are_those_of_the_features():
    x, targets = torch.randn(200, 6, dtype=torch.float64), torch.rand(200, 3, dtype=torch.float64)
    x[:, 0] = x[:, 0].abs() + 1  # on one side of 0
    basis = torch.randn(9, 6, dtype=torch.float64)
    basis[4] = torch.eye(6)[0]
    positive, negative = torch.relu(x @ basis.T), torch.relu(-x @ basis.T)
    features = torch.cat([positive, negative], dim=1)
    gram, cross = both_signs(basis, x.T @ x, x.T @ targets, positive.T @ positive, positive.T @ targets, x.T @ positive)
    assert_close(gram, features.T @ features, rtol=0, atol=1e-10)
    assert_close(cross, features.T @ targets, rtol=0, atol=1e-10)
    assert not gram[9 + 4].any()
    assert not gram[:, 9 + 4].any()
    assert not cross[9 + 4].any()


def test_selection_is_orthogonal_matching():
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(200, 7, generator=generator, dtype=torch.float64)
    features[:, 6] = features[:, 0] + 1e-7 * features[:, 1]
    targets = features[:, [1, 4]] @ torch.tensor([[2.0, 0.0], [0.1, 1.0]], dtype=torch.float64)
    chosen = select_features(features.T @ features, features.T @ targets, 2).tolist()
    assert sorted(chosen) == [1, 4]

    def error(subset) -> float:
        part = features[:, list(subset)]
        return float((targets - part @ torch.linalg.lstsq(part, targets).solution).square().sum())

    first = min(range(7), key=lambda j: error([j]))
    assert chosen[0] == first
    assert len(set(select_features(features.T @ features, features.T @ targets, 7).tolist())) <= 7
    assert error(chosen) <= min(error(pair) for pair in itertools.combinations(range(7), 2)) + 1e-9


@pytest.mark.parametrize("kind", ["norm", "centred", "nonlinear", "activation"])
def test_targets_are_their_formulas(kind):
    model, _ = converted()
    batches = documents(100)
    target = RouterTarget(model, batches, kind)
    for index, (layer, (x, hidden)) in enumerate(zip(layers(model), everything(model, batches), strict=True)):
        if kind == "activation":
            sums = torch.stack([h.clamp_min(0).sum(-1) for h in hidden], dim=1)
            expected = sums / sums.max(1, keepdim=True).values
        else:
            if kind == "centred":
                hidden = hidden - hidden.mean(1, keepdim=True)
            elif kind == "nonlinear":
                ones = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
                flat = hidden.transpose(0, 1).flatten(1)
                flat = flat - ones @ torch.linalg.lstsq(ones, flat).solution
                hidden = flat.unflatten(1, (EXPERTS, -1)).transpose(0, 1)
            expected = (hidden @ layer.down_weight).norm(dim=-1).T
        found = target(index, layer, x, everything(model, batches)[index][1])
        assert found.shape == (len(x), EXPERTS)
        assert_close(found, expected, rtol=0.05 if kind in ("nonlinear", "centred") else 1e-6, atol=2e-3)


def test_binary_cross_entropy_is_its_formula_and_has_its_minimum_at_the_target():
    scores = torch.rand(5, 4, dtype=torch.float64) * 3
    targets = torch.rand(5, 4, dtype=torch.float64)
    expected = torch.nn.functional.binary_cross_entropy(1 - torch.exp(-scores), targets)
    assert_close(binary_cross_entropy(scores, targets), expected)
    best = -torch.log1p(-targets)
    assert binary_cross_entropy(best, targets) <= expected
    ends = torch.tensor([[0.0, 200.0]])
    assert binary_cross_entropy(ends, torch.tensor([[1.0, 0.0]])).isfinite()
