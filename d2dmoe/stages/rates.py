"""A learning rate of a distillation: a few steps at each of some, and the best of these."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

from ..errors import UserError
from ..files import write_text
from ..training import first_process

FROM = 100  # steps of a training from which trials are worth their time
STEPS = 20  # of a trial, see LAB.md, "the learning rate of bases"
FACTOR = 4.0  # from one rate to the next
MOST = 2  # rates above the first one, or below
LOST = 2.0  # times the loss at the start: a rate that does so is too high
FILE = "heal-rate.json"  # beside the states of the training: what was chosen


def chosen_rate(
    tried: Callable[[int, float], float], usual: float, steps: int, state_dir: Path | None, resume: bool
) -> float:
    """The best rate for a training of so many steps, or the usual one for a short training.

    Args:
        tried: Steps and a rate to the loss that they lead to, in units of that at the start; everything is as before
            afterwards. Where the training fails it may raise `UserError`.
        usual: Tried first.
        steps: Of the training itself.
        state_dir: Folder of that training's states; the choice is kept beside it.
        resume: Take an earlier choice from there.
    """
    if steps < FROM:
        return usual
    kept = state_dir.parent / FILE if state_dir is not None else None
    if kept is not None and resume and kept.exists():
        return float(json.loads(kept.read_text())["chosen"])
    losses = descend(lambda rate: _loss(tried, rate), usual)
    chosen = min(losses, key=losses.__getitem__)
    if kept is not None and first_process():
        write_text(kept, json.dumps({"chosen": chosen, "tried": {f"{rate:g}": loss for rate, loss in losses.items()}}))
    return chosen


def _loss(tried: Callable[[int, float], float], rate: float) -> float:
    try:
        loss = tried(STEPS, rate)
    except UserError:  # the loss is not a number any more
        return math.inf
    return math.inf if math.isnan(loss) else loss


def descend(loss: Callable[[float], float], usual: float) -> dict[float, float]:
    """Losses by rate: of the usual one, and of higher ones as long as they are better.

    Lower ones are tried only where the usual one does great harm: a few steps are in favour of low rates, so that a
    high one that loses may still win in the end, and one that wins will.
    """
    found, rate = {usual: loss(usual)}, usual
    harmful = found[usual] > LOST
    for _ in range(MOST):
        following = rate / FACTOR if harmful else rate * FACTOR
        found[following] = loss(following)
        if found[following] <= LOST if harmful else found[following] >= found[rate]:
            break
        rate = following
    return found
