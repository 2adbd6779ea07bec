"""What a converted model keeps in memory: less than it could, for one budget only, or more, for speed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import nn

from ..errors import UserError
from .gating import stored_config
from .layer import DynamicFFN, layers
from .projection import projections


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Keep only the budget in force: its change of the down projection is folded in, the others' stand-ins are dropped.

    Outputs stay what they are. The model no longer holds the dense one, so its gate cannot be set again and it cannot
    be saved; both say so. In memory it is then the dense model, its routers and one budget's constants and linear term.

    Args:
        model: Converted model with its gate set, changed in place.

    Returns:
        The same model.

    Raises:
        UserError: If the model is not converted, or was merged before.
    """
    stored_config(model)
    if any(layer.merged for layer in layers(model)):
        raise UserError("this model is merged already")
    for layer in layers(model):
        _merge(layer)
    for layer in projections(model):
        layer.merge()
    model.save_pretrained = _refuse_to_save
    return model


@torch.no_grad()
def keep_dense(model: nn.Module, keep: bool = True) -> int:
    """Keep the dense layout of the feed-forward weights beside the packed one, for where it is the faster one.

    A converted layer takes the fastest way that it has. With everything on, or nearly, and many tokens, that can be the
    dense product of the processor's own library, above all in bf16; this is its price.

    Args:
        model: Converted model, changed in place.
        keep: `False` gives the memory back.

    Returns:
        The bytes that this costs.

    Raises:
        UserError: If the model is not converted, or was merged.
    """
    stored_config(model)
    if any(layer.merged for layer in layers(model)):
        raise UserError("this model was merged at one budget and no longer holds the dense weights")
    for layer in layers(model):
        layer.keep_dense = keep
        layer.prepared.invalidate()
    return sum(layer.dense_bytes() for layer in layers(model)) if keep else 0


def _merge(layer: DynamicFFN) -> None:
    state = layer.gate_state
    kept = state.stand_in if state.tau > 0 else None
    if kept is not None and layer.delta_in is not None:
        layer.down_weight.data += layer.delta_in[kept] @ (layer.delta_out[kept] * state.fade)
    layer.delta_in = layer.delta_out = None
    for name, value in layer.stand_ins().items():
        setattr(
            layer, name, None if kept is None else nn.Parameter(value[kept : kept + 1].clone(), value.requires_grad)
        )
    layer.gate_state = replace(state, stand_in=None if kept is None else 0)
    layer.merged, layer.keep_dense = True, False
    layer.prepared.invalidate()


def _refuse_to_save(*_: Any, **__: Any) -> NoReturn:
    raise UserError("this model was merged at one budget and no longer holds the dense weights: save it before merging")
