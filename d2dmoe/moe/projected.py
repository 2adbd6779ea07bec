"""Projections around attention in the skeleton of a model: found under its names, checked, and put in their places."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from warnings import warn

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..config.projections import HEAD, Projection, ProjectionState
from ..config.record import D2DMoEConfig
from ..config.validate import MEND, WHERE, refuse
from ..errors import UserError
from ..tensors import BASES, Shapes
from .check import LINEAR
from .head import DynamicHead
from .packing import sizes
from .projection import DynamicConv1D, DynamicLinear, DynamicProjection, projections

Localised = list[tuple[int, Projection]]  # number in the record, and the projection under the names of this class


def localise_projections(
    model: nn.Module, config: D2DMoEConfig, prefixes: Sequence[tuple[str, str]], shapes: Shapes
) -> Localised:
    """The projections that this model class has.

    A class with another head than that of a language model has no converted head. One that was made anew, as
    `resize_token_embeddings` does where head and embeddings are not tied, runs dense.

    Args:
        model: The skeleton.
        config: The record.
        prefixes: `(strip, add)` pairs that turn names of the class that was saved into names of this class.
        shapes: Of the tensors in the files, where there are some.

    Raises:
        UserError: If a projection of a part that the class has is not there, or is of another kind or size.
    """
    names = dict(model.named_modules())
    found: Localised = []
    for number, projection in enumerate(config.projections):
        ours = [a + projection.name.removeprefix(s) for s, a in prefixes if projection.name.startswith(s)]
        name = next((n for n in ours if n in names), None)
        if name is None:
            if projection.role == HEAD and model.get_output_embeddings() is None:
                continue
            if any(n.rpartition(".")[0] in names for n in ours if "." in n):
                refuse(f"projections[{number}].name", projection.name, "the path of a module of this model")
            continue
        module = names[name]
        if not isinstance(module, LINEAR):
            refuse(f"projections[{number}].name", projection.name,
                   f"the path of a linear map, and there is a {type(module).__name__}")  # fmt: skip
        inputs, outputs = sizes(module)
        if projection.role == HEAD:
            if shapes and not any(key.endswith(f"{projection.name}.{BASES[0]}") for key in shapes):
                gone = "the converted head of this checkpoint was replaced (by resize_token_embeddings?) and runs dense"
                warn(gone, stacklevel=2)
                continue
            projection = replace(projection, outputs=outputs)  # nothing that is stored depends on the vocabulary
        for field, size in (("inputs", inputs), ("outputs", outputs)):
            if getattr(projection, field) != size:
                refuse(f"projections[{number}].{field}", getattr(projection, field), f"{size}, by {name}")
        found.append((number, replace(projection, name=name)))
    return found


def make_projection(dense: nn.Module, projection: Projection, number: int) -> DynamicProjection:
    """The layer that takes a dense map's place and shares its parameters."""
    kind = DynamicHead if projection.role == HEAD else DynamicConv1D if isinstance(dense, Conv1D) else DynamicLinear
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    for name in ("nf", "nx") if isinstance(dense, Conv1D) else ("in_features", "out_features"):
        setattr(layer, name, getattr(dense, name))
    layer.weight = dense.weight
    layer.register_parameter("bias", dense.bias)
    layer.extend(projection, number)
    return layer.train(dense.training)


def mount_projections(model: nn.Module, found: Localised) -> None:
    """Put a layer with room for the added tensors in the place of each dense map."""
    for number, projection in found:
        model.set_submodule(projection.name, make_projection(model.get_submodule(projection.name), projection, number))


def check_projected(layers: Iterable[DynamicProjection], shapes: Shapes, prefix: str) -> None:
    """The added tensors in the files against the record.

    Raises:
        UserError: Naming the tensor and its shapes.
    """
    for layer in layers:
        for name in layer.ADDED:
            full, wanted = f"{layer.projection.name}.{name}", list(getattr(layer, name).shape)
            names = (full, f"{prefix}.{full}", full.removeprefix(f"{prefix}."))
            found = next((list(shapes[n]) for n in names if n in shapes), None)
            if found is not None and found != wanted:
                raise UserError(
                    f"{WHERE} of config.json gives {full} the shape {wanted} (inputs, outputs and rank), and the "
                    f"checkpoint has it in {found}; {MEND}"
                )


@torch.no_grad()
def trim_projections(model: nn.Module, config: D2DMoEConfig) -> None:
    """Keep no more of a basis than the budgets use."""
    for number, layer in enumerate(projections(model)):
        states = [budget.projection_states[number] for budget in config.budgets]
        rank = max((rank for state in states if state.method != "heads" for rank in state.ranks), default=0)
        layer.gate_state, layer.projection.rank = ProjectionState(), rank
        layer.low_rank_in = nn.Parameter(layer.low_rank_in[:, :rank].clone(), requires_grad=False)
        layer.low_rank_out = nn.Parameter(layer.low_rank_out[:rank].clone(), requires_grad=False)
        layer.trim_heads(states)
        layer.trim_refits(states)
