"""Networks of two layers in the places of projections around attention (Szatkowski et al. 2024, sec. 3.4).

The first layer keeps the name of the projection, in another shape: a program that takes the checkpoint for the dense
model fails on the sizes, where a missing tensor would silently be random.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from ..config.record import Block
from ..config.validate import refuse
from .check import LINEAR
from .packing import sizes


class ProjectionNetwork(nn.Linear):
    """`down(relu(W x + b))`, ``(…, inputs)`` to ``(…, outputs)``; itself the first layer, ``(width, inputs)``."""

    def __init__(self, inputs: int, width: int, outputs: int, *, device=None, dtype=None):
        super().__init__(inputs, width, device=device, dtype=dtype)
        self.down = nn.Linear(width, outputs, device=device, dtype=dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``(…, inputs)`` to ``(…, outputs)``."""
        return self.down(torch.relu(super().forward(input)))


def put_network(model: nn.Module, block: Block) -> ProjectionNetwork:
    """Put an empty network in the place of the dense projection that a block names; returns it."""
    dense = model.get_submodule(block.name)
    like = {"device": dense.weight.device, "dtype": dense.weight.dtype}
    network = ProjectionNetwork(block.d_model, block.width, sizes(dense)[1], **like).train(dense.training)
    model.set_submodule(block.name, network)
    return network


def put_networks(model: nn.Module, blocks: Sequence[Block], prefixes: Sequence[tuple[str, str]]) -> None:
    """Put empty networks into the skeleton of a dense model, where the record of a checkpoint has some.

    Args:
        model: The skeleton.
        blocks: Of the record; those that the model's class does not have are left out.
        prefixes: `(strip, add)` pairs that turn names of the class that was saved into names of this class.

    Raises:
        UserError: If there is no linear map of this size in such a place.
    """
    names = dict(model.named_modules())
    for number, block in enumerate(blocks):
        ours = [add + block.name.removeprefix(strip) for strip, add in prefixes if block.name.startswith(strip)]
        name = next((n for n in ours if n in names), None)
        if not block.role or name is None:
            continue
        dense = names[name]
        if not isinstance(dense, LINEAR):
            refuse(f"blocks[{number}].name", block.name, f"the path of a linear map, not of a {type(dense).__name__}")
        if sizes(dense)[0] != block.d_model:
            refuse(f"blocks[{number}].d_model", block.d_model, f"{sizes(dense)[0]}, the inputs of {name}")
        put_network(model, replace(block, name=name))
