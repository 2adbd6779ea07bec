"""Dense tensors of a block to the kernels' layout and back, and how the dense ones are found."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..config.record import Block, can_split


def pack(weight: torch.Tensor, experts: int, layout: str) -> torch.Tensor:
    """Dense tensor to kernel layout. `layout` is one of `LAYOUTS`; the neurons must already be in expert order.

    With a width that the experts do not divide, zero neurons are added at the end of the last expert.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}")
    if layout in NEURONS_LAST:
        weight = weight.T
    padding = -len(weight) % experts if can_split(len(weight), experts) else -1
    if padding < 0:
        raise ValueError(f"{experts} experts do not fit {len(weight)} neurons")
    if padding:
        weight = torch.cat([weight, weight.new_zeros(padding, *weight.shape[1:])])
    by_expert = weight.reshape(experts, -1, *weight.shape[1:])  # (E, s) or (E, s, d)
    return (by_expert.transpose(1, 2) if layout.startswith("up") else by_expert).contiguous()


def unpack(packed: torch.Tensor, layout: str, width: int) -> torch.Tensor:
    """Inverse of `pack` for a block of this width, bit for bit."""
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}")
    by_neuron = (packed.transpose(1, 2) if layout.startswith("up") else packed).flatten(0, 1)[:width]
    return (by_neuron.T if layout in NEURONS_LAST else by_neuron).contiguous()


LAYOUTS = ("bias", "up_linear", "up_conv1d", "down_linear", "down_conv1d")
NEURONS_LAST = ("up_conv1d", "down_linear")  # (d, width); neurons come first in the others


def layout_of(linear: nn.Module, role: str) -> str:
    """`up_linear`, `down_conv1d` and so on, for a `Linear` or `Conv1D` in the role `up` or `down`."""
    return f"{role}_{'conv1d' if isinstance(linear, Conv1D) else 'linear'}"


def is_plain(module: nn.Module) -> bool:
    """Is this a linear map and nothing more? A subclass of `Linear` proves it by what it computes."""
    if type(module) in (nn.Linear, Conv1D):
        return True
    own = {"weight"} if getattr(module, "bias", None) is None else {"weight", "bias"}
    if not isinstance(module, nn.Linear) or {*module.state_dict()} != own or module._forward_hooks:
        return False
    generator = torch.Generator().manual_seed(0)
    given = {name: torch.randn(value.shape, generator=generator) for name, value in module.named_parameters()}
    x = torch.randn(3, module.in_features, generator=generator)
    try:
        y = torch.func.functional_call(module, given, (x,))
    except Exception:  # it takes something else
        return False
    return isinstance(y, torch.Tensor) and torch.allclose(y, nn.functional.linear(x, **given), atol=1e-4)


def sizes(linear: nn.Module) -> tuple[int, int]:
    """Input and output width of a `Linear` or `Conv1D`."""
    return (linear.nx, linear.nf) if isinstance(linear, Conv1D) else (linear.in_features, linear.out_features)


def matrix_of(linear: nn.Module) -> torch.Tensor:
    """Weights of a `Linear` or `Conv1D` as ``(outputs, inputs)``, sharing memory with it."""
    return linear.weight.T if isinstance(linear, Conv1D) else linear.weight


class Neurons:
    """The dense tensors of one block, as seen by splitting, permuting and packing."""

    def __init__(self, model: nn.Module, block: Block):
        self.block = block
        self.up, self.down = model.get_submodule(block.up), model.get_submodule(block.down)
        self.gate = model.get_submodule(block.gate) if block.gate and not block.fused else None

    def halves(self, tensor: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(up, gate)` parts of a tensor of the `up` projection; `gate` is `None` unless it is fused."""
        if not self.block.fused:
            return tensor, None
        first, second = tensor.chunk(2, dim=dim)
        return (second, first) if self.block.fused == "gate_up" else (first, second)

    def dense(self) -> dict[str, tuple[torch.Tensor, str] | None]:
        """Dense tensor and layout behind each packed parameter; `None` where there is none."""
        neuron_dim = 1 if isinstance(self.up, Conv1D) else 0
        up, gate = self.halves(self.up.weight, neuron_dim)
        up_bias, gate_bias = (None, None) if self.up.bias is None else self.halves(self.up.bias, 0)
        if self.gate is not None:
            gate, gate_bias = self.gate.weight, self.gate.bias
        up_layout = layout_of(self.up, "up")
        tensors = {
            "up_weight": (up, up_layout),
            "up_bias": (up_bias, "bias"),
            "gate_weight": (gate, up_layout if self.gate is None else layout_of(self.gate, "up")),
            "gate_bias": (gate_bias, "bias"),
            "down_weight": (self.down.weight, layout_of(self.down, "down")),
        }
        return {name: pair if pair[0] is not None else None for name, pair in tensors.items()}

    def rows(self) -> torch.Tensor:
        """What the `weights` split clusters: rows of the gate projection of a GLU, of the up projection otherwise."""
        weight, layout = self.dense()["gate_weight" if self.block.kind == "glu" else "up_weight"]
        return weight if layout == "up_linear" else weight.T


def dense_tensors(block: Block) -> Iterator[tuple[str, list[str], str, tuple[str, ...]]]:
    """`(dense name, packed names, layout, halves)` of all tensors a block may have; no layout: it is only renamed."""
    up_layout, down_layout = block.layouts
    if block.fused:
        halves = ("gate", "up") if block.fused == "gate_up" else ("up", "gate")
        yield f"{block.up}.weight", [f"{block.name}.{h}_weight" for h in halves], up_layout, halves
        yield f"{block.up}.bias", [f"{block.name}.{h}_bias" for h in halves], "bias", halves
    else:
        for role, path in (("up", block.up), ("gate", block.gate)):
            if path:
                yield f"{path}.weight", [f"{block.name}.{role}_weight"], up_layout, ()
                yield f"{path}.bias", [f"{block.name}.{role}_bias"], "bias", ()
    yield f"{block.down}.weight", [f"{block.name}.down_weight"], down_layout, ()
    yield f"{block.down}.bias", [f"{block.name}.down_bias"], "", ()
