"""Schedules of the regulariser's weight: a multiple of α, from 0 to 1, by the share of training that is done."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[float], float]  # share of the optimiser steps done, in [0, 1) -> multiple of alpha

SCHEDULES: dict[str, Schedule] = {}
# ProSparse multiplies the weight from stage to stage; these are the multiples of α at the stages' ends.
STAGES = (0.05, 0.2, 0.5, 1.0)


def schedule(name: str) -> Callable[[Schedule], Schedule]:
    """Register a function under a name that `--alpha-schedule` takes."""

    def register(function: Schedule) -> Schedule:
        SCHEDULES[name] = function
        return function

    return register


@schedule("constant")
def constant(done: float) -> float:
    """α from the first step on."""
    return 1.0


@schedule("linear")
def linear(done: float) -> float:
    """Rises in a straight line and reaches α at the end."""
    return done


@schedule("linear_warmup")
def linear_warmup(done: float) -> float:
    """Rises in a straight line, reaches α at half of the training and stays there (Szatkowski et al. 2024)."""
    return min(1.0, 2 * done)


@schedule("sine")
def sine(done: float) -> float:
    """ProSparse's stages: constant in the first, then half a sine wave up to each next level.

    Source: Song et al. 2024, arXiv 2402.13516, eq. 5; the levels are `STAGES`, stages are of equal length.
    """
    place = min(done, 1 - 1e-9) * len(STAGES)
    stage = int(place)
    if stage == 0:
        return STAGES[0]
    low, high = STAGES[stage - 1], STAGES[stage]
    return low + (high - low) * (math.sin(math.pi * (place - stage - 0.5)) + 1) / 2
