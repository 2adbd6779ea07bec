"""Budgets, thresholds and stand-ins of a tiny converted GPT-2 against naive counts, and the semantics of `set_gate`."""

from __future__ import annotations

import copy
import time
import warnings

import pytest
import torch
from conftest import randomise_routers, randomise_vectors
from torch.testing import assert_close
from zoo import tiny

from d2dmoe import set_gate
from d2dmoe.config import Block, Budget, ConvertConfig, D2DMoEConfig, Target, UserError, targets
from d2dmoe.data import Batches
from d2dmoe.discovery import discover
from d2dmoe.kernels.gates import select
from d2dmoe.measure.bench import speedup
from d2dmoe.measure.evaluate import evaluate
from d2dmoe.measure.observe import observing
from d2dmoe.moe.gating import stored_config
from d2dmoe.moe.layer import DynamicFFN, layers
from d2dmoe.moe.loader import attach
from d2dmoe.stages.budgets import goals as goals_module
from d2dmoe.stages.budgets.calibrate import calibrate
from d2dmoe.stages.budgets.curve import threshold_curve
from d2dmoe.stages.budgets.fit import measure_active
from d2dmoe.stages.budgets.goals import relative_loss
from d2dmoe.stages.budgets.search import SEARCH_STEPS, SEARCH_TOLERANCE, bisect
from d2dmoe.stages.standins import fit_means

EXPERTS = 16
HUGE = 1e6  # a stand-in that leaks shows at once


def converted(budgets: int = 2, model=None, **settings) -> tuple[torch.nn.Module, D2DMoEConfig]:
    """A model, by default the zoo's GPT-2, in fp64, 16 experts a layer, with random routers and no calibration."""
    model = (model or tiny("gpt2")).double()
    randomise_vectors(model)
    blocks = discover(model).blocks
    for block in blocks:
        block.experts = EXPERTS
    config = D2DMoEConfig(blocks=blocks, router_width=8, **{"gate": "max", "stand_in": "mean", **settings})
    attach(model, config, [torch.randperm(block.width) for block in blocks], budgets=budgets)
    randomise_routers(model)
    for layer in layers(model):
        if layer.constants is not None:
            layer.constants.data.normal_().mul_(HUGE)
    return model, config


def points(*actives: float) -> list[Target]:
    return targets(ConvertConfig(active=list(actives)))


def documents(count: int = 24, seed: int = 0) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 17, (count,), generator=generator).tolist()
    return Batches([{"input_ids": torch.randint(5, 99, (n,), generator=generator)} for n in lengths], 5)


def padded(batches: Batches, extra: int) -> list[dict[str, torch.Tensor]]:
    """The same batches with `extra` further columns of padding, of a token that is not the usual one."""
    return [
        {
            "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, extra), value=77),
            "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, extra), value=0),
        }
        for batch in batches
    ]


def layer_inputs(model: torch.nn.Module, batches) -> list[torch.Tensor]:
    """What each converted layer receives for the tokens that are not padding, as the model is set."""
    rows: list[list[torch.Tensor]] = [[] for _ in layers(model)]
    mask = None
    handles = [
        layer.register_forward_pre_hook(lambda m, args, i=i: rows[i].append(args[0][mask].detach().clone()))
        for i, layer in enumerate(layers(model))
    ]
    for batch in batches:
        mask = batch["attention_mask"].bool()
        with torch.no_grad():
            model(**batch)
    for handle in handles:
        handle.remove()
    return [torch.cat(parts) for parts in rows]


def sets(layer: DynamicFFN, x: torch.Tensor, gate: str, tau: float) -> torch.Tensor:
    """Which experts run, from the formulas of the router and the gates."""
    if tau == 0:
        return torch.ones(len(x), EXPERTS, dtype=torch.bool)
    r = (torch.relu(x @ layer.router.hidden.T) @ layer.router.score.T).abs().detach()
    if gate == "topk":
        chosen = torch.zeros_like(r, dtype=torch.bool)
        return chosen.scatter(1, r.topk(round((1 - tau) * EXPERTS), dim=1).indices, True)
    if gate == "share":
        return (r >= tau * r.norm(dim=1, keepdim=True)) & (r > 0)
    if gate == "topp":  # the share of the sum that better experts hold leaves room for this one
        better = (r[:, None, :] > r[:, :, None]).double() @ r[:, :, None]
        return (better[..., 0] <= (1 - tau) * r.sum(1, keepdim=True)) & (r > 0)
    return (r >= tau * r.max(1, keepdim=True).values) & (r > 0)


def fractions(model: torch.nn.Module, batches, gate: str = "max") -> list[float]:
    """Active fraction of each layer, counted naively on the inputs that it gets as the model is set."""
    inputs = layer_inputs(model, batches)
    return [
        sets(layer, x, gate, layer.gate_state.tau).double().mean().item()
        for layer, x in zip(layers(model), inputs, strict=True)
    ]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def output(model: torch.nn.Module, seed: int = 5) -> torch.Tensor:
    ids = torch.randint(5, 99, (2, 11), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.fixture(scope="module")
def shared() -> tuple[torch.nn.Module, D2DMoEConfig]:
    torch.manual_seed(0)
    model, config = converted()
    calibrate(model, documents(), config, points(0.25, 0.5), thresholds="per-layer")
    return model, config


@pytest.fixture
def calibrated(shared) -> tuple[torch.nn.Module, D2DMoEConfig]:
    """Calibrated per layer for 0.25 and 0.5, everything on; a copy for each test."""
    model = copy.deepcopy(shared[0])
    set_gate(model, tau=0)
    return model, stored_config(model)


# Thresholds


@pytest.mark.parametrize("thresholds", ["global", "per-layer"])
@pytest.mark.parametrize("stand_in", ["mean", "zero"])
@pytest.mark.parametrize("bounds", [(0, 0), (3, 0), (1, 9)], ids=str)
def test_budgets_are_met_on_the_calibration_tokens(thresholds, stand_in, bounds):
    model, config = converted(stand_in=stand_in, min_experts=bounds[0], max_experts=bounds[1])
    batches = documents()
    calibrate(model, batches, config, points(0.5, 0.25), thresholds=thresholds)
    assert [b.active for b in config.budgets] == [0.25, 0.5]
    assert config.default_active == 0.5
    for budget in config.budgets:
        with set_gate(model, active=budget.active):
            measured = measure_active(model, batches)
            if bounds == (0, 0):
                assert measured == pytest.approx(mean(fractions(model, batches)), rel=1e-9)
        assert measured == pytest.approx(budget.active, rel=0.02)
        assert budget.measured == pytest.approx(measured, rel=0.01)
        assert (len(set(budget.taus)) == 1) == (thresholds == "global")
    fitted = [layer.constants.clone() for layer in layers(model)] if stand_in == "mean" else []
    if fitted:
        fit_means(model, batches, config, range(len(config.budgets)))
    for layer, constants in zip(layers(model), fitted, strict=bool(fitted)):
        assert torch.equal(layer.constants, constants)  # the stand-ins belong to the thresholds that are stored
    assert bounds[0] < 3 or config.budgets[0].taus != config.equal_thresholds(0.25)
    assert config.budgets[0].measured < config.budgets[1].measured
    for first, second in zip(*(b.taus for b in config.budgets), strict=True):
        assert first > second


@pytest.mark.parametrize("gate", ["share", "topp"])
@pytest.mark.parametrize("thresholds", ["global", "per-layer"])
def test_budgets_are_met_by_the_other_gates(gate, thresholds):
    model, config = converted(gate=gate)
    batches = documents()
    calibrate(model, batches, config, points(0.25, 0.5), thresholds=thresholds)
    for budget in config.budgets:
        set_gate(model, active=budget.active)
        assert measure_active(model, batches) == pytest.approx(budget.active, rel=0.02)
        assert mean(fractions(model, batches, gate)) == pytest.approx(budget.active, rel=0.02)


@pytest.mark.parametrize("thresholds", ["global", "per-layer"])
def test_curve_holds_the_quantiles_of_the_dense_inputs(thresholds):
    model, _ = converted()
    batches = documents()
    curve = threshold_curve(model, batches, D2DMoEConfig(gate="max"), thresholds)
    inputs = layer_inputs(model, batches)
    for active, taus in curve:
        expected = max(active, 1 / EXPERTS)  # the best expert always runs
        shares = [
            sets(layer, x, "max", tau).double().mean().item()
            for layer, x, tau in zip(layers(model), inputs, taus, strict=True)
        ]
        if thresholds == "global":
            assert len(set(taus)) == 1
            shares = [mean(shares)]
        assert_close(shares, [expected] * len(shares), rtol=0, atol=2e-3)
    assert [point for point, _ in curve] == sorted(point for point, _ in curve)
    for i in range(2):
        column = [taus[i] for _, taus in curve]
        assert column == sorted(column, reverse=True)


@pytest.mark.parametrize("thresholds", ["global", "per-layer"])
def test_more_active_runs_more(thresholds):
    model, config = converted()
    batches = documents()
    calibrate(model, batches, config, points(0.25, 0.5), thresholds=thresholds)
    measured = []
    for active in (0.02, 0.1, 0.25, 0.35, 0.5, 0.65, 0.8, 0.97, 1.0):
        with warnings.catch_warnings(action="ignore"), set_gate(model, active=active):
            measured.append(measure_active(model, batches))
            assert active < 0.1 or measured[-1] == pytest.approx(active, rel=0.1)
    assert measured == sorted(measured)
    assert measured[-1] == 1.0


@pytest.mark.parametrize("active", [0.25, 0.5, 0.3, 0.7, 1 / 16, 15 / 16])
def test_topk_is_exact(active):
    model, config = converted(budgets=1, gate="topk")
    batches = documents(8)
    calibrate(model, batches, config, points(active), thresholds="per-layer")
    k = round(active * EXPERTS)
    set_gate(model, active=active)
    assert measure_active(model, batches) == k / EXPERTS
    assert config.budgets[0].measured == k / EXPERTS
    assert fractions(model, batches, "topk") == [k / EXPERTS] * 2


def test_calibrating_again_changes_nothing():
    model, config = converted()
    batches = documents()
    calibrate(model, batches, config, points(0.25, 0.5), thresholds="per-layer")
    before, constants = copy.deepcopy(config), [layer.constants.clone() for layer in layers(model)]
    calibrate(model, batches, config, points(0.25, 0.5), thresholds="per-layer")
    assert config == before
    for layer, old in zip(layers(model), constants, strict=True):
        assert torch.equal(layer.constants, old)


@pytest.mark.parametrize(("actives", "stored", "default"), [([1.0], [], 1.0), ([0.9, 0.2, 0.9, 1.0], [0.2, 0.9], 0.2)])
def test_what_is_stored(actives, stored, default):
    model, config = converted(budgets=len(stored))
    before = output(model)
    calibrate(model, documents(8), config, points(*actives), thresholds="global")
    assert [b.active for b in config.budgets] == stored
    assert config.default_active == default
    assert torch.equal(output(model), before)  # calibration leaves the setting as it was


@pytest.mark.parametrize("power", [0.5, 1, 2, 3])
@pytest.mark.parametrize("target", [0.1, 0.25, 0.5, 0.9])
def test_bisect_finds_the_argument(power, target):
    asked = []

    def measure(point: float) -> float:
        asked.append(point)
        return point**power

    point, value = bisect(measure, target, low=0.001, high=1.0, start=target)
    assert value == point**power
    assert value == pytest.approx(target, rel=SEARCH_TOLERANCE)
    assert len(asked) <= SEARCH_STEPS


def test_bisect_returns_the_best_of_what_it_tried():
    point, value = bisect(lambda p: 0.2 if p < 0.6 else 0.34, 0.3, low=0.0, high=1.0, start=0.3)
    assert value == 0.34
    assert point >= 0.6


# Stand-ins


def naive_constants(model: torch.nn.Module, batches, gate: str, taus: list[float]) -> list[torch.Tensor]:
    """Mean output of every expert over the tokens that skip it, from explicit outputs; 0 where none skips it."""
    with set_gate(model, tau=0):
        inputs = layer_inputs(model, batches)
    result = []
    for layer, x, tau in zip(layers(model), inputs, taus, strict=True):
        run = sets(layer, x, gate, tau)
        rows = torch.zeros(EXPERTS, 32, dtype=torch.float64)
        for e in range(EXPERTS):
            outputs = [
                layer.act(token @ layer.up_weight[e] + layer.up_bias[e]) @ layer.down_weight[e]
                for token, mask in zip(x, run[:, e].tolist(), strict=True)
                if not mask
            ]
            if outputs:
                rows[e] = torch.stack(outputs).mean(0).detach()
        result.append(rows)
    return result


@pytest.mark.parametrize("gate", ["max", "topk"])
def test_constants_are_means_over_the_tokens_that_skip(gate):
    model, config = converted(budgets=3, gate=gate)
    batches = documents()
    tiny_tau = 1e-4  # hardly anything is skipped: some experts have no token to average over
    taus = [[0.75, 0.5], [0.25, 0.75], [tiny_tau, tiny_tau]]
    config.budgets.replace([Budget(0.1 * i, row) for i, row in enumerate(taus, 1)])
    fit_means(model, batches, config, range(len(config.budgets)))
    never = 0
    for number, row in enumerate(taus):
        expected = naive_constants(model, batches, gate, row)
        never += sum(int((rows == 0).all(1).sum()) for rows in expected)
        for i, (layer, rows) in enumerate(zip(layers(model), expected, strict=True)):
            assert_close(
                layer.constants[number].detach(), rows, msg=lambda m, n=number, i=i: f"budget {n} layer {i}: {m}"
            )
    assert never > 0


def test_calibrate_fits_the_constants_for_the_thresholds_it_stores(calibrated):
    model, config = calibrated
    for number, budget in enumerate(config.budgets):
        for layer, rows in zip(layers(model), naive_constants(model, documents(), "max", budget.taus), strict=True):
            assert_close(layer.constants[number].detach(), rows)


def test_constants_bring_the_output_nearer_to_the_experts_they_replace():
    """The mean is the best constant: with it, the error of a layer's output over the tokens that skip is smaller."""
    model, config = converted()
    batches = documents()
    calibrate(model, batches, config, points(0.25, 0.5), thresholds="per-layer")
    with set_gate(model, tau=0):
        x = layer_inputs(model, batches)[0]
    layer = layers(model)[0]
    with torch.no_grad():
        dense = layer(x)
        set_gate(model, active=0.25)
        with_means = (layer(x) - dense).square().mean()
        layer.constants.data.zero_()
        assert with_means < 0.9 * (layer(x) - dense).square().mean()


def test_zero_has_no_constants():
    model, config = converted(stand_in="zero")
    calibrate(model, documents(8), config, points(0.5), thresholds="global")
    assert [layer.constants for layer in layers(model)] == [None, None]


@pytest.mark.parametrize("gate", ["max", "topk"])
@pytest.mark.parametrize("thresholds", ["global", "per-layer"])
def test_padding_has_no_influence(gate, thresholds):
    (model, config), (other, other_config) = converted(gate=gate), converted(gate=gate)
    other.load_state_dict(model.state_dict())
    batches = documents()
    calibrate(model, batches, config, points(0.25, 0.5), thresholds=thresholds)
    calibrate(other, padded(batches, 9), other_config, points(0.25, 0.5), thresholds=thresholds)
    for ours, theirs in zip(config.budgets, other_config.budgets, strict=True):
        assert_close(ours.taus, theirs.taus)
        assert_close(ours.measured, theirs.measured)
    assert_close(config.curve[5][1], other_config.curve[5][1])
    for layer, twin in zip(layers(model), layers(other), strict=True):
        assert_close(layer.constants, twin.constants)


# set_gate


def test_stored_budget_takes_its_own_thresholds_and_stand_ins(calibrated):
    model, config = calibrated
    with warnings.catch_warnings(action="error"):
        for number, budget in enumerate(config.budgets):
            set_gate(model, active=budget.active)
            assert [layer.gate_state.tau for layer in layers(model)] == budget.taus
            assert [layer.gate_state.stand_in for layer in layers(model)] == [number] * 2
            assert [layer.gate_state.name for layer in layers(model)] == ["max"] * 2


@pytest.mark.parametrize(("active", "nearest"), [(0.3, 0), (0.1, 0), (0.45, 1), (0.9, 1)])
def test_other_fraction_interpolates_and_warns_once(calibrated, active, nearest):
    model, config = calibrated
    with warnings.catch_warnings(record=True, action="always") as caught:
        set_gate(model, active=active)
    (warning,) = caught
    assert f"active={active:g}" in str(warning.message)
    assert f"active={config.budgets[nearest].active:g}" in str(warning.message)
    assert warning.filename == __file__  # it points at the caller
    assert [layer.gate_state.stand_in for layer in layers(model)] == [nearest] * 2
    assert measure_active(model, documents()) == pytest.approx(active, rel=0.1)


def test_interpolation_is_linear():
    """Up to everything, at threshold 0; below the curve there is nothing to go by."""
    blocks = [Block(name, "ffn", "relu", 8, 16, "up", None, "down") for name in "ab"]
    config = D2DMoEConfig(blocks, "max", curve=[[0.2, [0.9, 0.5]], [0.4, [0.7, 0.1]], [0.8, [0.3, 0.0]]])
    expected = {0.2: [0.9, 0.5], 0.3: [0.8, 0.3], 0.4: [0.7, 0.1], 0.5: [0.6, 0.075], 0.8: [0.3, 0.0], 0.9: [0.15, 0.0]}
    for active, taus in expected.items():
        assert_close(config.equal_thresholds(active), taus)
    with pytest.raises(UserError, match=r"active=0\.1: the max gate is calibrated from 0\.2 on"):
        config.equal_thresholds(0.1)


@pytest.mark.parametrize("active", [0.001, 0.015, 0.3, 0.985, 0.999])
def test_topk_is_exact_at_every_fraction(active):
    config = D2DMoEConfig([Block("a", "ffn", "relu", 8, 1000, "up", None, "down", experts=1000)], "topk")
    (tau,) = config.equal_thresholds(active)
    run = select(torch.rand(3, 1000) + 0.1, "topk", tau)
    assert run.sum(1).tolist() == [round(active * 1000)] * 3


def test_tau_takes_the_nearest_stand_ins_and_warns_once(calibrated):
    model, config = calibrated
    low, high = config.budgets
    tau = high.taus[0] + 0.1 * (low.taus[0] - high.taus[0])
    with pytest.warns(UserWarning, match=f"tau={tau:g}") as caught:
        set_gate(model, tau=tau)
    assert len(caught) == 1
    for i, layer in enumerate(layers(model)):
        assert layer.gate_state.tau == tau
        distances = [abs(b.taus[i] - tau) for b in config.budgets]
        assert layer.gate_state.stand_in == distances.index(min(distances))


def test_nothing_to_warn_about_without_stand_ins():
    model, config = converted(stand_in="zero")
    calibrate(model, documents(8), config, points(0.5), thresholds="global")
    with warnings.catch_warnings(action="error"):
        set_gate(model, active=0.3)
        set_gate(model, tau=0.4)


@pytest.mark.parametrize("setting", [{"tau": 0}, {"tau": 0.0}, {"active": 1}, {"active": 1.0}], ids=str)
def test_everything_on_is_the_dense_model(setting):
    torch.manual_seed(0)
    model, config = converted()
    calibrate(model, documents(8), config, points(0.25, 0.5), thresholds="global")
    for layer in layers(model):
        layer.constants.data.normal_().mul_(HUGE)
        layer.router.score.data[:3] = 0  # experts that no gate above 0 runs
    dense = tiny("gpt2").double()
    randomise_vectors(dense)
    set_gate(model, active=0.25)
    assert (output(model) - output(dense)).abs().max() > 0.1
    set_gate(model, **setting)
    assert_close(output(model), output(dense))
    everything_on = output(model)
    set_gate(model, tau=0)
    assert torch.equal(output(model), everything_on)
    assert measure_active(model, documents(8)) == 1.0


def test_context_manager_restores(calibrated):
    model, _ = calibrated
    set_gate(model, active=0.5)
    before = output(model)
    with set_gate(model, active=0.25):
        inner = output(model)
        with set_gate(model, active=0.5):
            assert torch.equal(output(model), before)
        assert torch.equal(output(model), inner)
        with pytest.raises(ZeroDivisionError), set_gate(model, tau=0):
            raise ZeroDivisionError
        assert torch.equal(output(model), inner)
    assert torch.equal(output(model), before)
    assert not torch.equal(inner, before)


def test_without_with_it_stays(calibrated):
    model, config = calibrated
    set_gate(model, active=0.25)
    assert measure_active(model, documents()) == pytest.approx(0.25, rel=0.02)
    assert [layer.gate_state.tau for layer in layers(model)] == config.budgets[0].taus


@pytest.mark.parametrize("which", [[1], [-1], ["transformer.h.1.mlp"]], ids=str)
def test_single_layer(calibrated, which):
    model, _ = calibrated
    batches = documents()
    set_gate(model, active=0.5)
    half = fractions(model, batches)
    with set_gate(model, active=1, layers=which):
        assert_close(fractions(model, batches), [half[0], 1.0])
    set_gate(model, active=0.25, layers=which)
    first, second = fractions(model, batches)
    assert first == half[0]
    assert second < 0.7 * half[1]


def test_copies_are_not_touched(calibrated):
    model, _ = calibrated
    twin = copy.deepcopy(model)
    before = output(twin)
    set_gate(model, active=0.25)
    assert torch.equal(output(twin), before)
    set_gate(twin, active=0.5)
    assert measure_active(model, documents()) == pytest.approx(0.25, rel=0.02)
    assert measure_active(twin, documents()) == pytest.approx(0.5, rel=0.02)


def test_oracle_runs_the_experts_with_the_largest_outputs():
    model, config = converted(budgets=1, gate="topk")
    calibrate(model, documents(8), config, points(0.25), thresholds="global")
    x = torch.randn(6, 32, dtype=torch.float64)
    layer = layers(model)[0]
    outputs = [layer.act(x @ layer.up_weight[e] + layer.up_bias[e]) @ layer.down_weight[e] for e in range(EXPERTS)]
    best = torch.stack(outputs).norm(dim=-1).T.topk(4, dim=1).indices
    seen = []
    layer.observer = lambda _, x, hidden, scores, run: seen.append(run)
    with set_gate(model, active=0.25, oracle=True):
        layer(x)
    assert torch.equal(seen[0], torch.zeros(6, EXPERTS, dtype=torch.bool).scatter(1, best, True))
    assert not any(other.gate_state.oracle for other in layers(model))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "active=…, tau=… or budget=…"),
        ({"active": 0.5, "tau": 0.1}, "active=…, tau=… or budget=…"),
        ({"active": 0}, "active=0"),
        ({"active": -0.25}, "active=-0.25"),
        ({"active": 1.5}, "active=1.5"),
        ({"active": float("nan")}, "active=nan"),
        ({"tau": -0.1}, "tau=-0.1"),
        ({"tau": 1.01}, "tau=1.01"),
        ({"tau": float("inf")}, "tau=inf"),
        ({"tau": float("nan")}, "tau=nan"),
        ({"active": 0.5, "layers": [2]}, "layer 2"),
        ({"active": 0.5, "layers": [-3]}, "layer -3"),
        ({"active": 0.5, "layers": ["h.7.mlp"]}, "layer 'h.7.mlp'"),
    ],
    ids=str,
)
def test_bad_values_are_refused_and_change_nothing(calibrated, arguments, message):
    model, _ = calibrated
    set_gate(model, active=0.5)
    before = [layer.gate_state for layer in layers(model)]
    with pytest.raises(UserError, match=message):
        set_gate(model, **arguments)
    assert [layer.gate_state for layer in layers(model)] == before


def test_what_is_missing_is_named():
    with pytest.raises(UserError, match="not converted"):
        set_gate(tiny("gpt2"), active=0.5)
    model, _ = converted()
    with pytest.raises(UserError, match="no calibration"):
        set_gate(model, active=0.5)
    set_gate(model, active=1)


# Objectives


def encoder(budgets: int) -> tuple[torch.nn.Module, D2DMoEConfig]:
    """A bare BERT whose blocks matter to its embeddings, so that skipping costs something."""
    model, config = converted(budgets, tiny("bert").bert, gate="share", stand_in="constants")
    for layer in layers(model):
        layer.down_weight.data.mul_(100)
        layer.up_weight.data.mul_(10)
        for value in layer.stand_ins().values():
            value.data.zero_()
    return model, config


def asked(**goals) -> list[Target]:
    return targets(ConvertConfig(**goals))


@pytest.mark.parametrize("gate", ["share", "max", "absolute"])
@pytest.mark.parametrize("share", [0.8, 0.9])
def test_flops_are_hit_on_unseen_tokens(gate, share):
    model, config = converted(gate=gate, budgets=1)
    calibrate(model, documents(200), config, asked(flops=[share]))
    row = evaluate(model, documents(100, seed=8), [{"active": config.budgets[0].active}])[0]
    assert row["flops_fraction_model"] == pytest.approx(share, rel=0.02)
    assert config.budgets[0].objective == f"flops={share:g}"


def test_flops_out_of_reach_are_refused():
    model, config = converted(gate="topk", budgets=1)
    with pytest.raises(UserError, match=r"--flops 0.05: this model reaches 0\.\d+ to"):
        calibrate(model, documents(), config, asked(flops=[0.05]))


def loss_of(model, number: int, seed: int = 8) -> float:
    return relative_loss(model, documents(200, seed=seed), number)


def test_max_loss_is_hit_on_unseen_tokens_and_monotone():
    model, config = encoder(3)
    goals = [0.005, 0.012, 0.025]
    calibrate(model, documents(200), config, asked(max_loss=goals), unseen=documents(200, seed=2))
    assert [b.objective for b in config.budgets] == [f"max-loss={g:g}" for g in reversed(goals)]
    reached = [loss_of(model, n) for n in range(3)]
    for budget, loss, goal in zip(config.budgets, reached, reversed(goals), strict=True):
        assert 1 + loss == pytest.approx(1 + goal, rel=0.02)
        assert budget.achieved < 1.5 * goal
    assert reached == sorted(reached, reverse=True)
    assert [b.active for b in config.budgets] == sorted(b.active for b in config.budgets)


def test_goals_of_different_kinds_are_stored_together():
    model, config = encoder(3)
    calibrate(model, documents(100), config, asked(active=[0.5], flops=[0.9], max_loss=[0.01]))
    assert sorted(b.objective for b in config.budgets) == ["", "flops=0.9", "max-loss=0.01"]
    actives = [b.active for b in config.budgets]
    assert actives == sorted(actives)
    for budget in config.budgets:
        with set_gate(model, active=budget.active):
            assert measure_active(model, documents(100)) == pytest.approx(budget.active, rel=0.1)


def test_the_same_active_fraction_twice_is_stored_once():
    assert asked(active=[0.5, 0.5, 1.0]) == [Target("active", 0.5)]
    assert [t.value for t in asked()] == [0.25, 0.5, 0.75]
    assert asked(flops=[0.7]) == [Target("flops", 0.7)]


def test_shared_experts_always_run_and_count():
    model, config = converted(gate="share", shared_experts=3)
    calibrate(model, documents(100), config, points(0.25, 0.5))
    for active in (0.25, 0.5):
        set_gate(model, active=active)
        assert measure_active(model, documents(100)) == pytest.approx(active, rel=0.02)
        runs = []
        with (
            observing(model, lambda index, layer, x, hidden, scores, run, runs=runs: runs.append(run)),
            torch.no_grad(),
        ):
            model(**documents(5)[0])
        for run in runs:
            assert run[:, :3].all()
            assert not run[:, 3:].all()


def by_active(model: torch.nn.Module, batches: Batches, fixed: float = 0.2):
    """A clock that knows only how much runs: a forward pass takes `fixed` of the dense one's time and the experts."""

    def clock(timed: torch.nn.Module, dense: torch.nn.Module, shown: Batches) -> float:
        assert (timed, dense, shown) == (model, "the dense model", batches)
        return 1 / (fixed + (1 - fixed) * measure_active(model, batches))

    return clock


@pytest.mark.parametrize("gate", ["share", "topk"])
def test_speedup_is_hit_by_the_clock_and_monotone(gate, monkeypatch):
    model, config = converted(budgets=3, gate=gate, stand_in="constants")
    batches = documents(60)
    monkeypatch.setattr(goals_module, "speedup", by_active(model, batches))
    calibrate(model, batches, config, asked(active=[0.9], speedup=[1.3, 2.0]), dense=lambda: "the dense model")
    faster, fast, budget = config.budgets
    assert [b.objective for b in config.budgets] == ["speedup=2", "speedup=1.3", ""]
    assert faster.active < fast.active < budget.active
    for stored, wanted in ((faster, 2.0), (fast, 1.3)):
        assert stored.achieved == pytest.approx(wanted, rel=0.06)  # experts come in sixteenths
        with set_gate(model, active=stored.active):
            assert by_active(model, batches)(model, "the dense model", batches) == pytest.approx(wanted, rel=0.06)


def test_a_speedup_out_of_reach_says_what_is_possible(monkeypatch):
    model, config = converted(budgets=1, gate="topk", stand_in="zero")
    batches = documents()
    monkeypatch.setattr(goals_module, "speedup", by_active(model, batches, fixed=0.7))
    with pytest.raises(UserError, match=r"--speedup 3: at 0\.0\d active .* 1\.4\d? times as fast"):
        calibrate(model, batches, config, asked(speedup=[3.0]), dense=lambda: "the dense model")


def test_speedup_is_really_timed():
    model, dense = converted(budgets=1)[0].float(), tiny("gpt2")
    slept = []
    dense.register_forward_hook(lambda *_: slept.append(time.sleep(0.02)))
    assert speedup(model, dense, documents(4), seconds=0.05) > 1
    model.register_forward_hook(lambda *_: time.sleep(0.06))
    assert speedup(model, dense, documents(4), seconds=0.05) < 1
    assert len(slept) > 10
