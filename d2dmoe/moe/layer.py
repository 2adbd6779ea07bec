"""The layer that takes a feed-forward block's place: packed experts, router, gate and stand-ins. No I/O."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ..config.record import Block
from ..kernels import (
    TENSORS,
    Plan,
    Tiles,
    activation_name,
    automatic,
    bucket,
    chosen,
    down_product,
    fastest,
    hidden_activations,
    identity,
)
from ..kernels.gates import select, straight_through
from .packing import unpack
from .router import Router, expert_norms


@dataclass
class GateState:
    """The gate in force in one layer.

    Attributes:
        name: A key of `gates.GATES`.
        tau: Threshold; 0 runs every expert.
        stand_in: Row of the stored stand-ins to use, or `None` for zero.
        min_experts, max_experts: Bounds per token (`max_experts` 0: none).
        shared: The first so many experts always run.
        soft: Let gradients reach the router through the gate (`gates.straight_through`), for training.
        oracle: Select by the true values of this router target, `norm` or `root`, instead of the router's scores (for
            analysis only).
    """

    name: str = "topk"
    tau: float = 0.0
    stand_in: int | None = None
    min_experts: int = 0
    max_experts: int = 0
    shared: int = 0
    soft: bool = False
    oracle: str = ""

    def select(self, scores: torch.Tensor) -> torch.Tensor:
        """Which experts run, boolean ``(tokens, experts)``, for scores of that shape; see `gates.select`."""
        return select(scores, self.name, self.tau, self.min_experts, self.max_experts, self.shared)


class DynamicFFN(nn.Module):
    """A feed-forward block as experts.

    Where the experts do not divide the width, the last one is filled up with zero neurons, which no file contains.

    Parameters are packed so that one expert is one contiguous piece: `up_weight` and `gate_weight`
    ``(experts, d_model, size)``, `down_weight` ``(experts, size, d_out)``, biases ``(experts, size)`` and ``(d_out,)``.
    Stand-ins of the stored budgets: `constants` ``(budgets, experts, d_out)``, a low-rank change of the down projection
    `delta_in` ``(budgets, experts, size, rank)`` and `delta_out` ``(budgets, rank, d_out)``, and a low-rank linear term
    `linear_in` ``(budgets, d_model, rank)`` and `linear_out` ``(budgets, rank, d_out)``.

    Attributes:
        block: What it was made from.
        number: Its place among the blocks of the checkpoint's config.
        gate_state: The gate in force; the layer is exactly dense while `gate_state.tau` is 0.
        observer: Called as `observer(layer, x, hidden, scores, run)` at every forward pass, for statistics and fits;
            `hidden` is `None` if it has an attribute `needs_hidden` that is false.
        activation: The kernels' name of `act`, or `None` for a function that they do not have.
        merged: Does it hold one budget only (`merge`)?
        keep_dense: Does it keep the dense layout beside the packed one (`keep_dense`)?
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
        self.block, self.act, self.number, self.activation = block, act, 0, activation_name(act)
        self.dropout = nn.Dropout(dropout)
        size, up_bias, gate_bias, down_bias = block.size, *biases

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
        self._plan: tuple[tuple, Plan] | None = None
        self._everything: tuple[tuple, Plan] | None = None
        self._dense: tuple[tuple, Callable[[torch.Tensor], torch.Tensor]] | None = None
        self.router = Router(block.d_model, router_width, block.experts, device=device, dtype=dtype)
        self.gate_state = GateState()
        self.merged = self.keep_dense = False
        self._ways: dict[tuple, str] = {}
        self._tiles: Tiles = {}
        self.observer: Callable | None = None

    def __getstate__(self) -> dict:
        """Copies make their own."""
        return {**self.__dict__, "_plan": None, "_folded": None, "_everything": None, "_dense": None, "_tiles": {}}

    def forget(self) -> None:
        """Drop what was made from the parameters to be at hand."""
        self._plan = self._folded = self._everything = self._dense = None
        self._ways, self._tiles = {}, {}

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        """The block's output for hidden states ``(…, d_model)``, given as the first argument whatever its name."""
        inputs = args[0] if args else next(iter(kwargs.values()))
        x = inputs.reshape(-1, inputs.shape[-1])
        y = self._by_kernel(x) if self._skips(x) else self._by_reference(x)
        y = y.reshape(*inputs.shape[:-1], y.shape[-1])
        return self.dropout(y) if self.training else y

    def _skips(self, x: torch.Tensor) -> bool:
        """May a kernel run this, which computes only what is asked for and has no gradients?"""
        observed = self.observer is not None and getattr(self.observer, "needs_hidden", True)
        if observed or self.gate_state.oracle or torch.is_autocast_enabled(x.device.type):
            return False
        if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters())):
            return False
        watched = not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None
        if watched or torch.jit.is_tracing():  # vmap and jit.trace have to see every step
            return False
        if not x.dtype == self.up_weight.dtype == self.down_weight.dtype:
            return False
        return chosen(x, self.activation, self.gate_state.name) != "reference"

    def _stand_in(self) -> int | None:
        """The stored stand-ins in force; none where everything runs."""
        stand_in = self.gate_state.stand_in if self.gate_state.tau > 0 else None
        if stand_in is None and self._folded is not None:
            self._folded = None
        return stand_in

    def _by_reference(self, x: torch.Tensor) -> torch.Tensor:
        """All experts computed, some masked; `(tokens, d_model)` to `(tokens, d_out)`."""
        state, stand_in = self.gate_state, self._stand_in()
        hidden = hidden_activations(x, self.up_weight, self.up_bias, self.gate_weight, self.gate_bias, self.act).to(
            self.down_weight.dtype
        )  # (experts, tokens, size); T5 keeps its down projection in fp32
        scores = run = constants = None
        down_weight = self.down_weight
        if state.tau > 0:
            scores = self._true_scores(hidden) if state.oracle else self.router(x)
            run = straight_through(scores, state.select(scores)) if state.soft else state.select(scores)
            if self.constants is not None and stand_in is not None:
                constants, down_weight = self.constants[stand_in], self._refitted_down(stand_in)
        if self.observer is not None:
            self.observer(self, x, hidden, scores, run)
        y = down_product(hidden, down_weight, self.down_bias, run, constants)
        if self.linear_in is not None and stand_in is not None:
            y = y + x @ self.linear_in[stand_in] @ self.linear_out[stand_in]
        return y

    def _by_kernel(self, x: torch.Tensor) -> torch.Tensor:
        """The same by the operator, straight through the library where nobody watches the dispatcher."""
        state, stand_in, run = self.gate_state, self._stand_in(), None
        if self.observer is not None:
            scores = self.router(x) if state.tau > 0 else None
            run = None if scores is None else state.select(scores)
            self.observer(self, x, None, scores, run)
        settings = (state.name, state.tau, state.min_experts, state.max_experts, state.shared)
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or type(x) is not torch.Tensor:
            tensors = self._kernel_tensors(stand_in)
            return torch.ops.d2dmoe.dynamic_ffn(x, run, *(tensors[n] for n in TENSORS), self.activation, *settings)
        own, router = self._parameters, self.router._parameters
        versions = tuple(identity(t) for t in (*own.values(), *router.values()) if t is not None)
        key = (stand_in, settings, *versions)
        if self._plan is None or self._plan[0] != key:
            tensors = self._kernel_tensors(stand_in)
            self._keep_tiles_of(tensors)
            self._plan = (key, Plan(tensors, self.activation, *settings, tiles=self._tiles))
        if self.observer is not None or self.merged or not automatic() or not (state.tau > 0 or self.keep_dense):
            return self._plan[1](x, run)
        return self._by_fastest(x, versions)

    def _keep_tiles_of(self, tensors: dict[str, torch.Tensor | None]) -> None:
        """Let go of tiles of weights that are no longer used."""
        used = {identity(t) for t in (*tensors.values(), self.down_weight) if t is not None}
        self._tiles = {key: tiled for key, tiled in self._tiles.items() if key in used}

    def _place(self, tokens: int) -> tuple:
        """What a decision about the fastest way holds for."""
        s = self.gate_state
        setting = (s.name, s.tau, s.stand_in, s.min_experts, s.max_experts, s.shared)
        return (*setting, bucket(tokens), torch.get_num_threads(), self.up_weight.dtype)

    def way(self, tokens: int) -> str | None:
        """How so many tokens are computed since their like was first met, as the gate is set; `None` before that."""
        return self._ways.get(self._place(tokens))

    def _by_fastest(self, x: torch.Tensor, versions: tuple) -> torch.Tensor:
        """The way in which these tokens take the least time; running everything is one of them."""
        place = self._place(len(x))
        way = self._ways.get(place)
        if way is None:
            way = self._ways[place] = fastest(self._ways_to_compute(versions), x)
        if way == "sparse":
            return self._plan[1](x)
        return self._ways_to_compute(versions)[way](x)

    def _ways_to_compute(self, versions: tuple) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
        """`sparse`, as the gate says; `packed`, everything by the same kernels; `dense`, if its layout is kept."""
        ways: dict[str, Callable] = {"sparse": self._plan[1]}
        if self.gate_state.tau > 0:
            if self._everything is None or self._everything[0] != versions:
                tensors = self._kernel_tensors(None)
                plan = Plan(tensors, self.activation, self.gate_state.name, 0.0, tiles=self._tiles)
                self._everything = (versions, plan)
            ways["packed"] = self._everything[1]
        if self.keep_dense:
            if self._dense is None or self._dense[0] != versions:
                self._dense = (versions, self._dense_layout())
            ways["dense"] = self._dense[1]
        return ways

    def _dense_layout(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The dense block with weights as torch's products want them, ``(width, d_model)`` and ``(d_out, width)``."""
        linear, act, width = torch.nn.functional.linear, self.act, self.block.width

        def dense(name: str, layout: str) -> torch.Tensor | None:
            packed = getattr(self, name)
            return None if packed is None else unpack(packed.detach(), layout, width)

        up, up_bias = dense("up_weight", "up_linear"), dense("up_bias", "bias")
        gate, gate_bias = dense("gate_weight", "up_linear"), dense("gate_bias", "bias")
        down, down_bias = dense("down_weight", "down_linear"), self.down_bias

        def forward(x: torch.Tensor) -> torch.Tensor:
            hidden = linear(x, up, up_bias)
            hidden = act(hidden) if gate is None else act(linear(x, gate, gate_bias)) * hidden
            return linear(hidden, down, down_bias)

        return forward

    def dense_bytes(self) -> int:
        """Memory of the dense layout, if it is kept."""
        weights = (self.up_weight, self.gate_weight, self.down_weight, self.up_bias, self.gate_bias)
        width, slots = self.block.width, self.block.slots
        return sum(t.numel() // slots * width * t.element_size() for t in weights if t is not None)

    def _kernel_tensors(self, stand_in: int | None) -> dict[str, torch.Tensor | None]:
        """The operator's tensors at a budget."""
        tensors: dict[str, torch.Tensor | None] = {
            "router_hidden": self.router.hidden, "router_score": self.router.score, "up_weight": self.up_weight,
            "up_bias": self.up_bias, "gate_weight": self.gate_weight, "gate_bias": self.gate_bias,
            "down_weight": self.down_weight, "down_bias": self.down_bias, "constants": None, "linear_in": None,
            "linear_out": None,
        }  # fmt: skip
        if stand_in is not None and self.constants is not None:
            tensors["constants"] = self.constants[stand_in]
            tensors["down_weight"] = self._refitted_down(stand_in)
            if self.linear_in is not None:
                tensors["linear_in"], tensors["linear_out"] = self.linear_in[stand_in], self.linear_out[stand_in]
        return {name: None if t is None else t.detach() for name, t in tensors.items()}

    def _true_scores(self, hidden: torch.Tensor) -> torch.Tensor:
        norms = expert_norms(hidden, self.down_weight)
        return norms.sqrt() if self.gate_state.oracle == "root" else norms

    def _refitted_down(self, number: int) -> torch.Tensor:
        """The down projection of a budget; folded once and kept while no gradients are wanted."""
        if self.delta_in is None:
            return self.down_weight
        if torch.is_grad_enabled():
            return self.down_weight + self.delta_in[number] @ self.delta_out[number]
        sources = (self.down_weight, self.delta_in, self.delta_out)
        if torch.compiler.is_compiling():  # cannot ask for versions: takes what an earlier call has folded
            ready = self._folded is not None and self._folded[0][0] == number
            return self._folded[1] if ready else self.down_weight + self.delta_in[number] @ self.delta_out[number]
        key = (number, *(identity(t) for t in sources))
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
        return f"{b.kind}, {b.activation}, {b.d_model}->{b.width}, experts={b.experts} of {b.size}"


def layers(model: nn.Module) -> list[DynamicFFN]:
    """The converted layers of a model, in the order of the blocks in its config, in which the model runs them."""
    return sorted((m for m in model.modules() if isinstance(m, DynamicFFN)), key=lambda layer: layer.number)
