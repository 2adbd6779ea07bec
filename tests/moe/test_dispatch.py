"""Two ways of computing the same, skipping and dense products with zeros, chosen once by a clock."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import randomise_routers, randomise_vectors
from torch.testing import assert_close
from zoo import tiny

from d2dmoe import UserError, dispatching, keep_dense, merge, set_gate
from d2dmoe.config import Budget, D2DMoEConfig
from d2dmoe.data import Batches
from d2dmoe.discovery import discover, dummy_inputs
from d2dmoe.kernels import bucket, dispatch, fastest, forget_ways, native, use_backend
from d2dmoe.measure.evaluate import evaluate
from d2dmoe.moe.layer import layers
from d2dmoe.moe.loader import attach

needs_native = pytest.mark.skipif(not native.LIVE, reason="the CPU kernels were not built")


class Clock:
    """Time that passes only in the ways themselves."""

    def __init__(self, **costs: float):
        self.now, self.calls = 0.0, []
        self.ways = {name: self._way(name, cost) for name, cost in costs.items()}

    def _way(self, name: str, cost: float):
        def way(x):
            self.calls.append(name)
            self.now += cost

        return way

    def fastest(self) -> str:
        return fastest(self.ways, torch.empty(0), clock=lambda: self.now)


@pytest.mark.parametrize(
    ("costs", "chosen"),
    [
        ({"sparse": 1.0, "packed": 2.0}, "sparse"),
        ({"sparse": 2.0, "packed": 1.0}, "packed"),
        ({"sparse": 1.01, "packed": 1.0}, "sparse"),  # not clearly slower
        ({"sparse": 1.3, "packed": 1.2, "dense": 1.0}, "dense"),
        ({"sparse": 1.0, "dense": 1.0}, "sparse"),
    ],
)
def test_the_fastest_by_median_and_the_first_in_doubt(costs, chosen):
    assert Clock(**costs).fastest() == chosen


def test_a_clear_case_is_settled_in_one_round():
    clock = Clock(sparse=1.0, packed=3.0)
    clock.fastest()
    assert clock.calls.count("packed") == 2  # once to warm up
    close = Clock(sparse=1.0, packed=1.2)
    close.fastest()
    assert close.calls.count("packed") == 6


def test_buckets_are_powers_of_two():
    assert [bucket(n) for n in (0, 1, 2, 3, 4, 5, 512, 513)] == [0, 0, 1, 2, 2, 3, 9, 10]


@pytest.fixture(autouse=True)
def _nothing_measured_yet():
    forget_ways()
    yield
    forget_ways()


def converted(name: str = "gpt2", experts_each: int = 8) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A model with a stored budget at a quarter, and the dense one."""
    dense = tiny(name).eval()
    randomise_vectors(dense)
    model = copy.deepcopy(dense)
    blocks = discover(model).blocks
    for block in blocks:
        block.experts = experts_each
    taus = [0.75] * len(blocks)
    config = D2DMoEConfig(blocks, "topk", "mean", router_width=8, budgets=[Budget(0.25, taus)], curve=[[0.25, taus]])
    attach(model, config, [torch.arange(block.width) for block in blocks], budgets=1)
    randomise_routers(model)
    for layer in layers(model):
        torch.nn.init.normal_(layer.constants)
    return model, dense


def forced(monkeypatch, name: str) -> list[tuple[tuple[str, ...], int]]:
    """Every measurement says `name`; returns what was measured: names and tokens."""
    asked: list[tuple[tuple[str, ...], int]] = []

    def choose(ways, x):
        asked.append((tuple(ways), len(x)))
        return name

    monkeypatch.setattr(dispatch, "fastest", choose)
    return asked


@needs_native
@pytest.mark.parametrize("active", [0.25, 1])
@pytest.mark.parametrize(("name", "experts_each"), [("gpt2", 8), ("gpt2", 7), ("llama", 8)])
@torch.no_grad()
def test_every_way_computes_the_same(name, experts_each, active, monkeypatch):
    model, dense = converted(name, experts_each)
    inputs = dummy_inputs(dense)
    tokens = inputs["input_ids"].numel()
    whole = dense(**inputs).logits
    set_gate(model, active=active)
    with use_backend("reference"):
        expected = model(**inputs).logits
    assert (float((expected - whole).abs().max()) > 1e-2) == (active < 1)
    keep_dense(model)
    for way in ("sparse", "dense"):
        forget_ways()
        asked = forced(monkeypatch, way)
        with dispatching("auto"):
            y = model(**inputs).logits
            again = model(**inputs).logits
        assert asked == [(("sparse", "dense"), tokens)]  # layers alike share the decision
        assert torch.equal(y, again)
        assert_close(y, expected, rtol=1e-4, atol=1e-4)
        assert {layer.way(tokens) for layer in layers(model)} == {way}


@needs_native
@torch.no_grad()
def test_measured_again_for_other_numbers_of_tokens_and_settings_only(monkeypatch):
    model, dense = converted()
    keep_dense(model)
    asked = forced(monkeypatch, "dense")
    ids = torch.randint(5, 99, (1, 16))
    set_gate(model, active=0.25)
    with dispatching("auto"):
        for tokens, measured in ((9, 1), (16, 1), (8, 2), (9, 2), (1, 3)):
            model(input_ids=ids[:, :tokens])
            assert len(asked) == measured
        set_gate(model, active=1)
        assert_close(model(input_ids=ids).logits, dense(input_ids=ids).logits)
        assert len(asked) == 4
        layers(model)[0].up_weight.mul_(2)
        y = model(input_ids=ids).logits
        dense.transformer.h[0].mlp.c_fc.weight.mul_(2)
        assert_close(y, dense(input_ids=ids).logits)  # the dense layout follows the weights
        layers(model)[0].up_weight.data.mul_(0.5)
        dense.transformer.h[0].mlp.c_fc.weight.mul_(0.5)
        assert_close(model(input_ids=ids).logits, dense(input_ids=ids).logits)
        assert len(asked) == 4


@needs_native
@torch.no_grad()
def test_without_the_dense_layout_there_is_nothing_to_choose_from(monkeypatch):
    model, _ = converted()
    asked = forced(monkeypatch, "dense")
    batches = Batches([{"input_ids": torch.randint(5, 99, (12,))} for _ in range(8)], 4)
    with dispatching("auto"):
        automatic = evaluate(model, batches, [{"active": 0.25}])[0]
    with dispatching("sparse"):
        assert evaluate(model, batches, [{"active": 0.25}])[0]["metric"] == automatic["metric"]
    assert not asked
    assert automatic["metric"]["value"] != automatic["dense"]["value"]


@torch.no_grad()
def test_the_dense_layout_costs_what_is_said():
    model, dense = converted()
    weights = sum(
        p.numel() * p.element_size() for n, p in dense.named_parameters() if ".mlp." in n and "c_proj.bias" not in n
    )
    assert keep_dense(model) == weights
    assert keep_dense(model, False) == 0
    assert not any(layer.keep_dense for layer in layers(model))
    with pytest.raises(UserError, match="not converted"):
        keep_dense(dense)
    with pytest.raises(UserError, match="no longer holds the dense weights"):
        keep_dense(merge(model))


@needs_native
@torch.no_grad()
def test_a_merged_model_has_nothing_to_choose_from(monkeypatch):
    model, _ = converted()
    set_gate(model, active=0.25)
    inputs = dummy_inputs(model)
    before = model(**inputs).logits
    asked = forced(monkeypatch, "dense")
    with dispatching("auto"):
        assert torch.equal(merge(model)(**inputs).logits, before)
    assert not asked


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="auto, sparse"), dispatching("fast"):
        pass
