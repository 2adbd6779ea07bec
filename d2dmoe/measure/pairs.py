"""One layer with random weights, dense and as experts, to time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..config.record import Block
from ..errors import UserError
from ..moe.layer import DynamicFFN
from ..moe.packing import pack


def parse_layer(text: str) -> dict[str, Any]:
    """`d=768,f=3072,experts=96[,glu][,act=relu]` to keyword arguments of `make_pair`.

    Raises:
        UserError: If it is not of that form, or the experts do not divide the width.
    """
    given: dict[str, Any] = {"glu": False}
    try:
        for part in filter(None, text.split(",")):
            key, _, value = part.partition("=")
            given[key.strip()] = value.strip() if key == "act" else int(value) if value else True
        d, f, experts = (given[key] for key in ("d", "f", "experts"))
    except (KeyError, ValueError):
        raise UserError(f"--layer {text}: give d=…,f=…,experts=…[,glu], as in d=768,f=3072,experts=96") from None
    if min(d, f, experts) < 1 or f % experts:
        raise UserError(f"--layer {text}: {experts} experts do not divide the width {f}")
    unknown = set(given) - {"d", "f", "experts", "glu", "act"}
    if unknown:
        raise UserError(f"--layer {text}: unknown {', '.join(sorted(unknown))}; known are d, f, experts, glu, act")
    return {"d": d, "width": f, "experts": experts, "glu": given["glu"], "act": given.get("act")}


class DenseFFN(nn.Module):
    """The block as a dense model runs it."""

    def __init__(self, d: int, width: int, glu: bool, act: Callable):
        super().__init__()
        self.up, self.down = nn.Linear(d, width, bias=not glu), nn.Linear(width, d, bias=not glu)
        self.gate = nn.Linear(d, width, bias=False) if glu else None
        self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(tokens, d)`` to ``(tokens, d)``."""
        hidden = self.act(self.up(x)) if self.gate is None else self.act(self.gate(x)) * self.up(x)
        return self.down(hidden)


def make_pair(
    d: int, width: int, experts: int, glu: bool, act: str | None, dtype: torch.dtype
) -> tuple[DenseFFN, DynamicFFN]:
    """A dense block with random weights and the same as experts with a random router of width 128."""
    from transformers.activations import ACT2FN

    torch.manual_seed(0)
    function = ACT2FN[act or ("silu" if glu else "gelu")]
    dense = DenseFFN(d, width, glu, function).to(dtype).eval()
    block = Block(
        name="layer", kind="glu" if glu else "ffn", activation=act or "", d_model=d, width=width, up="up",
        gate="gate" if glu else None, down="down", experts=experts,
    )  # fmt: skip
    biases = (not glu, False, not glu)
    layer = DynamicFFN(block, d_out=d, biases=biases, act=function, router_width=128, dtype=dtype).eval()
    layer.router.reset(0)
    with torch.no_grad():
        layer.up_weight.copy_(pack(dense.up.weight, experts, "up_linear"))
        layer.down_weight.copy_(pack(dense.down.weight, experts, "down_linear"))
        if glu:
            layer.gate_weight.copy_(pack(dense.gate.weight, experts, "up_linear"))
        else:
            layer.up_bias.copy_(pack(dense.up.bias, experts, "bias"))
            layer.down_bias.copy_(dense.down.bias)
    return dense, layer
