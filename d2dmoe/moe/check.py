"""Checks before the weights are read: the record against the modules of the model and the tensors of the files."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..config.record import Block, D2DMoEConfig
from ..config.validate import MEND, WHERE, check_distinct, refuse
from ..errors import UserError
from ..tensors import ADDED, Shapes, is_stripped
from .layer import DynamicFFN
from .packing import layout_of

STRIPPED = (
    "the routers and stand-ins of this checkpoint are gone: a program without d2dmoe saved it; open it as the dense "
    "model by deleting quantization_config from its config.json, or convert it again with `d2dmoe convert --model …`"
)
STRIPPED_NETWORKS = (
    "the routers and stand-ins of this checkpoint are gone, and with them the networks in the places of projections: a "
    "program without d2dmoe saved it; convert the dense model again with `d2dmoe convert --model …`"
)
LINEAR = (nn.Linear, Conv1D)


def check_config(config: D2DMoEConfig) -> None:
    """References between blocks, which only a whole model needs.

    Raises:
        UserError: Naming the block's field and its value.
    """
    for field in ("up", "down"):
        check_distinct(config.blocks, field)
    for number, block in enumerate(config.blocks):
        _check_paths(block, f"blocks[{number}]")


def _check_paths(block: Block, where: str) -> None:
    parts = [path for path in (block.up, block.gate) if path]
    if not any(f"{path}.".startswith(f"{block.name}.") for path in parts):
        refuse(f"{where}.name", block.name, f"the path of {' or '.join(parts)} or of a module above it")
    inside = block.down.startswith(f"{block.name}.")  # one module holds the block, or it is spread over several
    through = set() if inside else {block.down, block.activation_module}
    if {*block.passed_through} != through:
        wanted = "empty" if inside else f"activation_module and down, {block.activation_module} and {block.down}"
        refuse(f"{where}.passed_through", block.passed_through, wanted)


def refuse_part(number: int, block: Block, missing: str) -> NoReturn:
    """A part of the block's modules is not in the model, so the block's record is wrong.

    Raises:
        UserError: Naming the block, the field and its value.
    """
    raise UserError(
        f"{WHERE}.blocks[{number}]: the block {block.name} has its {missing} at {getattr(block, missing)!r}, and the "
        f"model has no such module; {MEND}"
    )


def check_block(model: nn.Module, number: int, block: Block) -> None:
    """Kinds and sizes of a block's dense modules.

    Raises:
        UserError: Naming the field and its value.
    """
    where = f"blocks[{number}]"
    for role, path in (("up", block.up), ("gate", block.gate), ("down", block.down)):
        module = path and model.get_submodule(path)
        if path and not isinstance(module, LINEAR):
            refuse(f"{where}.{role}", path, f"the path of a linear map, and there is a {type(module).__name__}")
        if path:
            _check_sizes(module, role, block, where)
    layouts = [layout_of(model.get_submodule(block.up), "up"), layout_of(model.get_submodule(block.down), "down")]
    if block.layouts != layouts:
        refuse(f"{where}.layouts", block.layouts, f"{layouts} for this model")
    if block.activation_module is None and block.activation not in _known_activations():
        refuse(f"{where}.activation", block.activation, "a name in transformers.activations.ACT2FN")


def _check_sizes(module: nn.Module, role: str, block: Block, where: str) -> None:
    inputs, outputs = module.weight.shape if isinstance(module, Conv1D) else reversed(module.weight.shape)
    width = block.width * (2 if block.fused else 1)
    if role == "down":
        if inputs != block.width:
            refuse(f"{where}.width", block.width, f"{inputs}, the inputs of {block.down}")
    elif outputs != width:
        refuse(f"{where}.width", block.width, f"{outputs // (2 if block.fused else 1)}, by the outputs of {block.up}")
    elif inputs != block.d_model:
        refuse(f"{where}.d_model", block.d_model, f"{inputs}, the inputs of {getattr(block, role)}")


def _known_activations() -> Any:
    from transformers.activations import ACT2FN

    return ACT2FN


def check_tensors(layers: Iterable[DynamicFFN], shapes: Shapes, prefix: str) -> None:
    """The tensors that a conversion adds, against the layers that the record describes.

    Args:
        layers: Without weights.
        shapes: Of all tensors in the files.
        prefix: `base_model_prefix` of the class: names in the files may have it or not.

    Raises:
        UserError: Naming the tensor, its shape and the fields that give another one.
    """
    layers = list(layers)
    if is_stripped(shapes):
        raise UserError(STRIPPED_NETWORKS if any(layer.block.role for layer in layers) else STRIPPED)
    for layer in layers:
        tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
        for name, fields in FIELDS.items():
            full = f"{layer.block.name}.{name}"
            names = (full, f"{prefix}.{full}", full.removeprefix(f"{prefix}."))
            found = next((list(shapes[n]) for n in names if n in shapes), None)
            wanted = list(tensors[name].shape) if name in tensors else None
            if found is not None and found != wanted and (wanted or name != "order"):
                room = f"gives {full} the shape {wanted}" if wanted else f"has no place for {full}"
                raise UserError(
                    f"{WHERE} of config.json {room} ({fields}), and the checkpoint has it in {found}; {MEND}"
                )


FIELDS = dict(zip(ADDED, (
    "router_width and d_model", "experts and router_width", "budgets and experts",
    "budgets, experts and delta_rank", "budgets and delta_rank", "budgets, d_model and linear_rank",
    "budgets and linear_rank", "width",
), strict=True))  # fmt: skip


def check_permutation(name: str, order: torch.Tensor, width: int) -> None:
    """Raises `UserError` unless `order` holds every number below `width` once."""
    if order.shape != (width,) or not torch.equal(order.sort().values.long().cpu(), torch.arange(width)):
        raise UserError(
            f"{name}.order holds no permutation of {width} neurons: the checkpoint is damaged; copy it again"
        )
