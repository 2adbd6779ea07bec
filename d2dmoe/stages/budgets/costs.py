"""What changes of single layers cost the model's output, on the last of the calibration text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ...data.batches import Batches
from ...measure.observe import model_inputs, pieces
from ...measure.replay import Replay
from ...moe.gating import set_gate
from ...progress import progress
from ..heal import Reference

TOKENS = 2048
SAMPLES, MOST_TOKENS = 256, 8192  # where a whole sequence or image has one output


@dataclass
class Trial:
    """One change of a model that runs dense.

    Attributes:
        part: Number of the changed part in what `output_costs` is given.
        layers: Converted layers or projections.
        states: Their gate states in this trial.
    """

    part: int
    layers: Sequence[Any]
    states: Sequence[Any]


@torch.no_grad()
def output_costs(
    model: nn.Module, batches: Batches, parts: Sequence[nn.Module], trials: Sequence[Trial], name: str
) -> np.ndarray:
    """Distance from the dense model's output, see `Reference`, with one trial at a time and everything else dense.

    Args:
        model: Converted model.
        batches: Calibration batches, of which the last are used: `TOKENS` tokens, or, where a whole sequence has one
            output, `SAMPLES` sequences of at most `MOST_TOKENS` tokens.
        parts: One module of each part that changes.
        trials: The changes.
        name: Shown on the progress bar.

    Returns:
        Means over the outputs (positions without padding, or sequences), ``(len(trials),)``.
    """
    costs, outputs, replay = np.zeros(len(trials)), 0, Replay(model, parts)
    with set_gate(model, active=1):
        for batch in progress(list(pieces(_text(model, batches))), desc=name):
            mask = batch.get("attention_mask")
            mask = None if mask is None else mask.to(model.device)
            reference = Reference(replay.first(model_inputs(model, batch)), mask)
            outputs += reference.outputs
            for number, trial in enumerate(trials):
                dense = [layer.gate_state for layer in trial.layers]
                _set(trial.layers, trial.states)
                costs[number] += reference.outputs * reference.divergence(replay.again(trial.part))
                _set(trial.layers, dense)
    return costs / max(outputs, 1)


def _text(model: nn.Module, batches: Batches) -> Batches:
    """The last of the batches, as many as costs are measured on."""
    sample = next(pieces(batches, 1))
    logits = model(**model_inputs(model, sample)).get("logits")
    if logits is None or logits.dim() != 2:
        return batches.last(TOKENS)
    last = batches.last(MOST_TOKENS)
    return last.with_items(last.items[-SAMPLES:])


def _set(layers: Sequence[Any], states: Sequence[Any]) -> None:
    for layer, state in zip(layers, states, strict=True):
        layer.gate_state = state
