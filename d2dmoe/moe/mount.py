"""Make the layer of a block, fill it with the block's weights, and put it into the model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..config.record import Block, D2DMoEConfig, router_width
from .layer import DynamicFFN
from .packing import NEURONS_LAST, Neurons, pack


def make_layer(model: nn.Module, number: int, block: Block, config: D2DMoEConfig, *, budgets: int) -> DynamicFFN:
    """An empty `DynamicFFN` for block `number`, on the device and in the dtype of the block's weights."""
    neurons = Neurons(model, block)
    weight = neurons.up.weight
    tensors = neurons.dense()
    down = neurons.down
    layer = DynamicFFN(
        block,
        d_out=down.nf if isinstance(down, Conv1D) else down.out_features,
        biases=(tensors["up_bias"] is not None, tensors["gate_bias"] is not None, down.bias is not None),
        act=activation_of(model, block),
        router_width=router_width(config.router_width, block),
        budgets=budgets if config.stand_in != "zero" else 0,
        delta_rank=config.delta_rank,
        linear_rank=config.linear_rank,
        dropout=_dropout_of(model, block),
        ordered=config.neuron_order,
        device=weight.device,
        dtype=weight.dtype,
    )
    layer.number = number
    return layer


def activation_of(model: nn.Module, block: Block) -> Callable[[torch.Tensor], torch.Tensor]:
    """The model's own activation object where it has one, else the library's function of that name."""
    from transformers.activations import ACT2FN

    return model.get_submodule(block.activation_module) if block.activation_module else ACT2FN[block.activation]


def _dropout_of(model: nn.Module, block: Block) -> float:
    """Dropout inside a module that is replaced as a whole; it must go on working when the model is trained."""
    if block.passed_through:
        return 0.0
    return max((m.p for m in model.get_submodule(block.name).modules() if isinstance(m, nn.Dropout)), default=0.0)


@torch.no_grad()
def fill(layer: DynamicFFN, model: nn.Module, order: torch.Tensor) -> None:
    """Pack the dense weights of the layer's block into it, neurons taken in `order` ``(width,)``."""
    neurons = Neurons(model, layer.block)
    for name, pair in neurons.dense().items():
        if pair is not None:
            dense, layout = pair
            dim = 1 if layout in NEURONS_LAST else 0
            ordered = dense.index_select(dim, order.to(dense.device))
            getattr(layer, name).copy_(pack(ordered, layer.block.experts, layout))
    if layer.down_bias is not None:
        layer.down_bias.copy_(neurons.down.bias)
    if layer.order is not None:
        layer.order.copy_(order)


def mount(model: nn.Module, layer: DynamicFFN) -> None:
    """Put the layer where its block says, and identities where the block was spread over several modules."""
    layer.train(model.training)
    _replace(model, layer.block.name, layer)
    for name in layer.block.passed_through:
        _replace(model, name, nn.Identity())


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
