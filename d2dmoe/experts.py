"""The layer that takes a feed-forward block's place: packed experts, router, gate and stand-ins. No I/O."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .config import Block, D2DMoEConfig, router_width
from .kernels import dynamic_ffn, hidden_activations
from .routing import Router, expert_norms, select


@dataclass
class GateState:
    """The gate in force in one layer.

    Attributes:
        name: A key of `routing.GATES`.
        tau: Threshold; 0 runs every expert.
        stand_in: Row of the stored stand-ins to use, or `None` for zero.
        min_experts, max_experts: Bounds per token (`max_experts` 0: none).
        oracle: Select by true expert norms instead of the router's scores (for analysis only).
    """

    name: str = "topk"
    tau: float = 0.0
    stand_in: int | None = None
    min_experts: int = 0
    max_experts: int = 0
    oracle: bool = False


class DynamicFFN(nn.Module):
    """A feed-forward block as experts.

    Parameters are packed so that one expert is one contiguous piece: `up_weight` and `gate_weight`
    ``(experts, d_model, size)``, `down_weight` ``(experts, size, d_out)``, biases ``(experts, size)`` and ``(d_out,)``.
    Stand-ins of the stored budgets: `constants` ``(budgets, experts, d_out)``, a low-rank change of the down projection
    `delta_in` ``(budgets, experts, size, rank)`` and `delta_out` ``(budgets, rank, d_out)``, and a low-rank linear term
    `linear_in` ``(budgets, d_model, rank)`` and `linear_out` ``(budgets, rank, d_out)``.

    Attributes:
        block: What it was made from.
        gate_state: The gate in force; the layer is exactly dense while `gate_state.tau` is 0.
        observer: Called as `observer(layer, x, hidden, scores, run)` at every forward pass, for statistics and fits.
    """

    def __init__(
        self,
        block: Block,
        *,
        d_out: int,
        biases: tuple[bool, bool, bool],
        act: Callable[[torch.Tensor], torch.Tensor],
        router_width: int,
        budgets: int = 0,
        delta_rank: int = 0,
        linear_rank: int = 0,
        dropout: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.block, self.act = block, act
        self.dropout = nn.Dropout(dropout)
        size, up_bias, gate_bias, down_bias = block.width // block.experts, *biases

        def parameter(*shape: int, wanted: bool = True) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if wanted else None

        glu = block.kind == "glu"
        self.up_weight = parameter(block.experts, block.d_model, size)
        self.up_bias = parameter(block.experts, size, wanted=up_bias)
        self.gate_weight = parameter(block.experts, block.d_model, size, wanted=glu)
        self.gate_bias = parameter(block.experts, size, wanted=glu and gate_bias)
        self.down_weight = parameter(block.experts, size, d_out)
        self.down_bias = parameter(d_out, wanted=down_bias)
        self.delta_rank, self.linear_rank = min(delta_rank, d_out), min(linear_rank, d_out)
        delta, linear = budgets > 0 and delta_rank > 0, budgets > 0 and linear_rank > 0
        self.constants = parameter(budgets, block.experts, d_out, wanted=budgets > 0)
        self.delta_in = parameter(budgets, block.experts, size, self.delta_rank, wanted=delta)
        self.delta_out = parameter(budgets, self.delta_rank, d_out, wanted=delta)
        self.linear_in = parameter(budgets, block.d_model, self.linear_rank, wanted=linear)
        self.linear_out = parameter(budgets, self.linear_rank, d_out, wanted=linear)
        self._folded: tuple[tuple, torch.Tensor] | None = None
        self.router = Router(block.d_model, router_width, block.experts, device=device, dtype=dtype)
        self.gate_state = GateState()
        self.observer: Callable | None = None

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        """The block's output for hidden states ``(…, d_model)``, given as the first argument whatever its name."""
        inputs = args[0] if args else next(iter(kwargs.values()))
        x = inputs.reshape(-1, inputs.shape[-1])
        state = self.gate_state
        hidden = hidden_activations(
            x, self.up_weight, self.up_bias, self.gate_weight, self.gate_bias, self.act
        )  # (experts, tokens, size)
        scores = run = constants = None
        down_weight, stand_in = self.down_weight, state.stand_in if state.tau > 0 else None
        if stand_in is None:
            self._folded = None
        if state.tau > 0:
            scores = expert_norms(hidden, self.down_weight) if state.oracle else self.router(x)
            run = select(scores, state.name, state.tau, state.min_experts, state.max_experts)
            if self.constants is not None and stand_in is not None:
                constants, down_weight = self.constants[stand_in], self._refitted_down(stand_in)
        if self.observer is not None:
            self.observer(self, x, hidden, scores, run)
        y = dynamic_ffn(hidden, down_weight, self.down_bias, run, constants)
        if self.linear_in is not None and stand_in is not None:
            y = y + x @ self.linear_in[stand_in] @ self.linear_out[stand_in]
        return self.dropout(y.reshape(*inputs.shape[:-1], y.shape[-1]))

    def _refitted_down(self, number: int) -> torch.Tensor:
        """The down projection of a budget; folded once and kept while no gradients are wanted."""
        if self.delta_in is None:
            return self.down_weight
        if torch.is_grad_enabled():
            return self.down_weight + self.delta_in[number] @ self.delta_out[number]
        sources = (self.down_weight, self.delta_in, self.delta_out)
        key = (number, *((t.data_ptr(), t._version) for t in sources))
        if self._folded is None or self._folded[0] != key:
            self._folded = (key, self.down_weight + self.delta_in[number] @ self.delta_out[number])
        return self._folded[1]

    def stand_ins(self) -> dict[str, nn.Parameter]:
        """The stored stand-ins by name."""
        names = ("constants", "delta_in", "delta_out", "linear_in", "linear_out")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        b = self.block
        return f"{b.kind}, {b.activation}, {b.d_model}->{b.width}, experts={b.experts} of {b.width // b.experts}"


def pack(weight: torch.Tensor, experts: int, layout: str) -> torch.Tensor:
    """Dense tensor to kernel layout. `layout` is one of `LAYOUTS`; the neurons must already be in expert order."""
    if layout == "bias":
        return weight.reshape(experts, -1).contiguous()
    if layout == "up_linear":  # (width, d) -> (E, d, s)
        return weight.reshape(experts, -1, weight.shape[1]).transpose(1, 2).contiguous()
    if layout == "up_conv1d":  # (d, width) -> (E, d, s)
        return weight.reshape(weight.shape[0], experts, -1).transpose(0, 1).contiguous()
    if layout == "down_linear":  # (d_out, width) -> (E, s, d_out)
        return weight.T.reshape(experts, -1, weight.shape[0]).contiguous()
    if layout == "down_conv1d":  # (width, d_out) -> (E, s, d_out)
        return weight.reshape(experts, -1, weight.shape[1]).contiguous()
    raise ValueError(f"unknown layout {layout!r}")


def unpack(packed: torch.Tensor, layout: str) -> torch.Tensor:
    """Inverse of `pack`, bit for bit."""
    if layout == "bias":
        return packed.reshape(-1).contiguous()
    if layout == "up_linear":
        return packed.transpose(1, 2).reshape(-1, packed.shape[1]).contiguous()
    if layout == "up_conv1d":
        return packed.transpose(0, 1).reshape(packed.shape[1], -1).contiguous()
    if layout == "down_linear":
        return packed.reshape(-1, packed.shape[2]).T.contiguous()
    if layout == "down_conv1d":
        return packed.reshape(-1, packed.shape[2]).contiguous()
    raise ValueError(f"unknown layout {layout!r}")


LAYOUTS = ("bias", "up_linear", "up_conv1d", "down_linear", "down_conv1d")


def layout_of(linear: nn.Module, role: str) -> str:
    """`up_linear`, `down_conv1d` and so on, for a `Linear` or `Conv1D` in the role `up` or `down`."""
    return f"{role}_{'conv1d' if isinstance(linear, Conv1D) else 'linear'}"


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


def make_layer(model: nn.Module, block: Block, config: D2DMoEConfig, *, budgets: int) -> DynamicFFN:
    """An empty `DynamicFFN` for a block, on the device and in the dtype of the block's weights."""
    neurons = Neurons(model, block)
    weight = neurons.up.weight
    tensors = neurons.dense()
    down = neurons.down
    return DynamicFFN(
        block,
        d_out=down.nf if isinstance(down, Conv1D) else down.out_features,
        biases=(tensors["up_bias"] is not None, tensors["gate_bias"] is not None, down.bias is not None),
        act=activation_of(model, block),
        router_width=router_width(config.router_width, block),
        budgets=budgets if config.stand_in != "zero" else 0,
        delta_rank=config.delta_rank,
        linear_rank=config.linear_rank,
        dropout=_dropout_of(model, block),
        device=weight.device,
        dtype=weight.dtype,
    )


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
            dim = 1 if layout in ("up_conv1d", "down_linear") else 0
            ordered = dense.index_select(dim, order.to(dense.device))
            getattr(layer, name).copy_(pack(ordered, layer.block.experts, layout))
    if layer.down_bias is not None:
        layer.down_bias.copy_(neurons.down.bias)


def mount(model: nn.Module, layer: DynamicFFN) -> None:
    """Put the layer where its block says, and identities where the block was spread over several modules."""
    layer.train(model.training)
    _replace(model, layer.block.name, layer)
    for name in layer.block.passed_through:
        _replace(model, name, nn.Identity())


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def layers(model: nn.Module) -> list[DynamicFFN]:
    """The converted layers of a model, in the order of its config."""
    return [m for m in model.modules() if isinstance(m, DynamicFFN)]
