"""The learning rate that short trainings choose."""

from __future__ import annotations

import json
import math

import pytest

from d2dmoe.errors import UserError
from d2dmoe.stages.rates import FILE, FROM, STEPS, chosen_rate, descend


def valley(best: float):
    """A loss that grows on both sides of a rate, infinite far above it."""
    return lambda rate: abs(math.log(rate / best)) / 3 if rate < 1000 * best else math.inf


@pytest.mark.parametrize(
    ("best", "tried", "chosen"),
    [
        (1.0, [1, 4], 1), (4.0, [1, 4, 16], 4), (100.0, [1, 4, 16], 16), (0.3, [1, 4], 1), (1e-3, [1, 0.25], 0.25),
        (1e-4, [1, 0.25, 0.0625], 0.0625),
    ],
)  # fmt: skip
def test_higher_rates_are_tried_as_long_as_they_help_and_lower_ones_in_need(best, tried, chosen):
    assert list(descend(valley(best), 1.0)) == tried
    assert chosen_rate(lambda _, rate: valley(best)(rate), 1.0, FROM, None, False) == chosen


def test_nothing_is_tried_for_a_short_training():
    assert chosen_rate(lambda *_: 1 / 0, 3e-3, FROM - 1, None, False) == 3e-3


@pytest.mark.parametrize(("limit", "chosen"), [(2, 1.0), (0.1, 0.0625)])
@pytest.mark.parametrize("nan", [False, True])
def test_a_rate_at_which_training_fails_is_not_chosen(limit, chosen, nan):
    def tried(steps: int, rate: float) -> float:
        assert steps == STEPS
        if rate > limit and not nan:
            raise UserError("the loss became nan")
        return 1.0 if rate < limit else math.nan

    assert chosen_rate(tried, 1.0, FROM, None, False) == chosen


def test_a_choice_is_kept_and_taken_again_only_on_resume(tmp_path):
    state = tmp_path / "heal-state"
    assert chosen_rate(lambda _, rate: valley(4.0)(rate), 1.0, FROM, state, False) == 4.0
    kept = json.loads((tmp_path / FILE).read_text())
    assert kept["chosen"] == 4.0
    assert kept["tried"]["16"] > kept["tried"]["4"] == 0
    assert chosen_rate(lambda *_: 1 / 0, 1.0, FROM, state, True) == 4.0
    assert chosen_rate(lambda _, rate: valley(1e-3)(rate), 1.0, FROM, state, False) == 0.25
