"""The record of budgets: look-ups, order, blocks, and thresholds between and beyond the stored points."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2dmoe.config import Block, Budget, Budgets, Curve, D2DMoEConfig, UserError

POINTS = [[0.01, [0.99, 0.5]], [0.2, [0.8, 0.4]], [0.5, [0.5, 0.1]], [0.9, [0.1, 0.05]]]


def record(gate: str = "max", curve: list | None = None, **settings) -> D2DMoEConfig:
    blocks = [Block(name, "ffn", "relu", 8, 40, "up", None, "down", experts=20) for name in "ab"]
    budgets = settings.pop("budgets", [Budget(0.3, [0.8, 0.2]), Budget(0.6, [0.5, 0.1])])
    return D2DMoEConfig(blocks, gate, curve=POINTS if curve is None else curve, budgets=budgets, **settings)


def test_find_by_active_fraction_and_by_threshold():
    budgets = Budgets([Budget(0.5, [0.1, 0.9]), Budget(0.25, [0.4, 0.6])])
    assert [budgets.find(a) for a in (0.25, 0.5, 0.5 + 1e-7, 0.3)] == [1, 0, 0, None]
    assert [budgets.nearest_tau(0, tau) for tau in (0.0, 0.24, 0.26)] == [0, 0, 1]
    assert [budgets.nearest_tau(1, tau) for tau in (0.0, 0.74, 0.76)] == [1, 1, 0]
    assert Budgets().find(0.5) is Budgets().nearest_tau(0, 0.5) is None


def test_sort_returns_the_former_numbers():
    budgets = Budgets([Budget(0.5, [], objective="first"), Budget(0.9, []), Budget(0.5, []), Budget(0.1, [])])
    assert budgets.sort() == [3, 0, 2, 1]
    assert budgets.actives == [0.1, 0.5, 0.5, 0.9]
    assert budgets[1].objective == "first"


def test_keep_blocks_drops_every_figure_of_a_block():
    config = record(budgets=[Budget(0.3, [0.8, 0.2], 0.31, ["linear", "zero"], [0.4, 1.0]), Budget(0.6, [0.5, 0.1])])
    config.keep_blocks([False, True])
    assert [block.name for block in config.blocks] == ["b"]
    assert config.budgets == Budgets([Budget(0.3, [0.2], 0.31, ["zero"], [1.0]), Budget(0.6, [0.1])])
    assert config.curve == Curve([[0.01, [0.5]], [0.2, [0.4]], [0.5, [0.1]], [0.9, [0.05]]])


def test_the_json_form_is_a_plain_list():
    config = record(default_active=0.3)
    values = config.to_dict()
    assert list(values) == [
        "blocks", "gate", "stand_in", "delta_rank", "linear_rank", "router_width", "router_target", "budgets",
        "default_active", "curve", "min_experts", "max_experts", "shared_experts", "neuron_order", "version",
    ]  # fmt: skip
    names = ["active", "taus", "measured", "stand_ins", "residuals", "objective", "achieved"]
    assert [list(budget) for budget in values["budgets"]] == [names] * 2
    assert values["budgets"][1]["taus"] == [0.5, 0.1]
    assert values["curve"] == POINTS
    again = D2DMoEConfig.from_dict(json.loads(json.dumps(values)))
    assert again == config
    assert again.to_dict() == values
    other = record(budgets=[], curve=[])
    other.take_calibration(json.loads(json.dumps(config.calibration())))
    assert other == config


def test_thresholds_between_budgets_follow_the_curve_of_each_block():
    """Block a has 0.2 at the first budget and 0.5 at the second; block b 0.4 and 0.5."""
    config = record()
    assert config.thresholds(0.3) == [0.8, 0.2]
    assert config.thresholds(0.6) == [0.5, 0.1]
    assert config.thresholds(0.45) == pytest.approx([0.65, 0.15])  # block a at 0.35, block b at 0.45
    # half of the way to everything: both blocks at 0.75, on the piece from 0.5 to 0.9
    assert config.thresholds(0.8) == pytest.approx([0.25, 0.06875])
    # half of the first budget: block a at 0.1, block b at 0.2
    assert config.thresholds(0.15) == pytest.approx([0.99 - 0.19 * 0.09 / 0.19, 0.4])


def test_without_a_curve_thresholds_themselves_are_interpolated():
    config = record(curve=[])
    assert config.thresholds(0.45) == pytest.approx([0.65, 0.15])
    assert config.thresholds(0.8) == pytest.approx([0.25, 0.05])
    with pytest.raises(UserError, match=r"active=0\.2: this checkpoint holds no calibration"):
        config.thresholds(0.2)


def test_a_threshold_off_the_curve_is_kept_at_its_budget():
    config = record(budgets=[Budget(0.3, [1.0, 0.6]), Budget(0.6, [0.5, 0.1])])
    assert config.thresholds(0.3 + 1e-9 + 1e-6) == pytest.approx([1.0, 0.6], abs=1e-4)
    assert config.thresholds(0.2) == pytest.approx([1.0, 0.6])


def test_the_gate_topk_shares_ranks_out():
    """Block a runs 2 of 20 experts at the first budget and 8 at the second, block b 10 and 16."""
    config = record("topk", [], budgets=[Budget(0.3, [0.9, 0.5]), Budget(0.6, [0.6, 0.2])])
    assert config.thresholds(0.4) == pytest.approx([0.8, 0.4])
    assert config.thresholds(0.8) == pytest.approx([0.3, 0.1])
    assert config.thresholds(0.15) == pytest.approx([0.95, 0.75])
    assert config.equal_thresholds(0.15) == pytest.approx([0.85, 0.85])
    shared = record("topk", [], budgets=[], shared_experts=4)
    assert shared.thresholds(0.6) == pytest.approx([0.5, 0.5])  # 8 of the 16 that are not always on
    assert shared.thresholds(0.1) == [1.0, 1.0]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.floats(0.02, 0.98), min_size=1, max_size=4, unique_by=lambda a: round(a, 2)),
    st.lists(st.floats(1e-6, 1.0), min_size=4, max_size=4),
    st.sampled_from(["max", "topk", "none"]),
)
def test_thresholds_are_exact_monotone_and_continuous(actives, taus, gate):
    actives, taus = sorted(actives), sorted(taus, reverse=True)
    budgets = [Budget(a, [t, t**2]) for a, t in zip(actives, taus, strict=False)]
    config = record("topk" if gate == "topk" else "max", [] if gate == "none" else None, budgets=budgets)
    lowest = actives[0] if gate == "none" else 0.01
    points = [lowest + i * (1 - 1e-9 - lowest) / 400 for i in range(401)]
    rows = [config.thresholds(a) for a in sorted({*points, *actives})]
    for block in range(2):
        column = [row[block] for row in rows]
        assert all(later <= before + 1e-12 for before, later in pairwise(column))
        assert column[-1] == pytest.approx(0, abs=1e-6)
        assert min(column) >= 0
    for budget in budgets:
        assert config.thresholds(budget.active) == budget.taus
        for step in (-2e-6, 2e-6):
            if lowest <= budget.active + step < 1:
                assert config.thresholds(budget.active + step) == pytest.approx(budget.taus, abs=1e-3)


def test_stand_ins_fade_out_until_the_next_ones_take_over():
    budgets = Budgets([Budget(0.5, []), Budget(0.2, [])])  # 0.3 is a third of the way
    assert [budgets.stand_ins(a) for a in (0.01, 0.2, 0.31, 0.4, 0.5)] == [(1, 1), (1, 1), (0, 1), (0, 1), (0, 1)]
    assert budgets.stand_ins(0.28) == (1, pytest.approx(0.81))
    assert budgets.stand_ins(0.75) == (0, 0.25)
    assert budgets.stand_ins(0.9) == (0, pytest.approx(0.04))
    assert budgets.stand_ins(1 - 1e-9) == (0, pytest.approx(0, abs=1e-8))
    assert Budgets().stand_ins(0.5) == (None, 1.0)
