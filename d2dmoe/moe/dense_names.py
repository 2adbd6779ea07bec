"""Placeholders under the names of the dense modules that a layer has replaced.

A program that adapts modules by name, such as peft, passes over names that it does not find as long as it finds others.
It refuses a placeholder, which has no weights, and quotes its text.
"""

from __future__ import annotations

from torch import nn

from ..config.record import Block


class Packed(nn.Module):
    """Stands where a dense linear map was, and holds nothing."""

    def __init__(self, path: str, tensors: list[str]):
        super().__init__()
        self.path, self.tensors = path, tensors

    def __repr__(self) -> str:
        return (
            f"{self.path}, whose weights are packed into experts (name target_parameters=[{', '.join(self.tensors)}] "
            f"instead, with target_modules=[] in a GPT-2, or adapt the dense model and convert the adapter with d2dmoe "
            f"export --adapter)"
        )


def stand_for_dense(layer: nn.Module, block: Block) -> None:
    """Put placeholders below a layer for those parts of its block that were below it.

    A part that was the layer's own place or elsewhere needs none: there is the layer, or an identity, which peft
    refuses as well.
    """
    for path, roles in ((block.up, ["up", "gate"] if block.fused else ["up"]), (block.gate, ["gate"]),
                        (block.down, ["down"])):  # fmt: skip
        inside = (path or "").removeprefix(block.name + ".")
        if path and inside != path:
            tensors = [f"'{block.name}.{role}_weight'" for role in roles]
            _put(layer, inside.split("."), Packed(path, tensors))


def _put(parent: nn.Module, names: list[str], packed: Packed) -> None:
    """Add it at this path, unless something of the layer's own has the name."""
    first, *rest = names
    if rest:
        if not hasattr(parent, first):
            parent.add_module(first, nn.Module())
        if isinstance(getattr(parent, first), nn.Module):
            _put(getattr(parent, first), rest, packed)
    elif not hasattr(parent, first):
        parent.add_module(first, packed)
