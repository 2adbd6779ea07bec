"""What a converted model keeps in memory: less than it could, for one budget only, or more, for speed."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import nn

from ..errors import UserError
from ..kernels import EXPERT_DTYPES
from .gating import converted_model, stored_config
from .int8_linear import set_linear_dtype
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


def set_expert_dtype(model: nn.Module, dtype: str | None) -> int:
    """Compute the experts of a converted model with weights in int8, or again in the dtype of the parameters.

    Every neuron of an expert has one scale for its weights in each matrix; the down projection is rounded with the
    budget's change folded in. Biases and constants stay as they are, and with `int8` routers and the linear term, so
    that the same experts run up to what rounding in the layers before has changed. So do parameters and checkpoints:
    the weights are rounded when a layer first runs, and again after a change. The native library then reads a quarter
    of the bytes of fp32. Everywhere else (GPU, autocast, gradients, compiled code) PyTorch computes with the rounded
    weights. Gradients pass the rounding as if it were not there, so a fine-tuning trains the parameters for int8.

    `int8-dynamic` rounds what the experts multiply as well: every token, rotated with the weights that it meets
    (`kernels.quads.rotated`), and every token's hidden values in an expert times the scales of the down projection, on
    scales of their own; so do the router's first product and the linear term. Processors with AVX-512 VNNI then
    compute many tokens faster. It never takes the dense layout of `keep_dense`.

    Args:
        model: Converted model, changed in place. Its copies keep the setting, its checkpoints do not.
        dtype: `"int8"`, `"int8-dynamic"`, or `None` for the parameters' own.

    Returns:
        The bytes that the native library's copy takes beside the parameters, for one budget; each further budget in
        use with a refitted down projection adds its own.

    Raises:
        UserError: If the model is not converted, or the dtype is another one.
    """
    converted = converted_model(model)
    if dtype not in EXPERT_DTYPES:
        raise UserError(f'expert dtype {dtype!r}: give "int8", "int8-dynamic", or None for that of the parameters')
    for layer in layers(converted):
        layer.expert_dtype = dtype
        layer.prepared.invalidate()
    return sum(layer.int8_bytes() for layer in layers(converted)) if dtype else 0


def twin_in(model: nn.Module, expert_dtype: str | None, linear_dtype: str | None = None) -> nn.Module:
    """A copy that shares the parameters and computes experts and linear maps in these dtypes, to compare with."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    for layer in layers(twin):
        layer.expert_dtype = expert_dtype
    set_linear_dtype(twin, linear_dtype)
    return twin


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
