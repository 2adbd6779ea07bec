"""The layer that takes a feed-forward block's place: packed experts, router, gate and stand-ins. No I/O."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..config.record import Block
from ..kernels import (
    TENSORS,
    Backend,
    activation_name,
    down_product,
    fused_backend,
    hidden_activations,
    rounded,
    rounded_hidden,
    rounded_rows,
    way_taken,
)
from ..kernels.gates import straight_through
from .dense_names import stand_for_dense
from .gate import Gate, Gated, GateState
from .padding import without_padding
from .prepared import Prepared, as_computed, settings
from .router import Router, expert_norms


class DynamicFFN(Gated, nn.Module):
    """A feed-forward block as experts.

    Where the experts do not divide the width, the last one is filled up with zero neurons, which no file contains.

    Parameters are packed so that one expert is one contiguous piece: `up_weight` and `gate_weight`
    ``(experts, d_model, size)``, `down_weight` ``(experts, size, d_out)``, biases ``(experts, size)`` and ``(d_out,)``.
    Stand-ins of the stored budgets: `constants` ``(budgets, experts, d_out)``, a low-rank change of the down projection
    `delta_in` ``(budgets, experts, size, rank)`` and `delta_out` ``(budgets, rank, d_out)``, and a low-rank linear term
    `linear_in` ``(budgets, d_model, rank)`` and `linear_out` ``(budgets, rank, d_out)``. The buffer `order`
    ``(width,)`` holds the place that each neuron had in the original model.

    Attributes:
        block: What it was made from.
        number: Its place among the blocks of the checkpoint's config.
        gate: The gate's settings, the model's own and those of threads or tasks (`gate_state` is the one in force).
        prepared: What is derived from the parameters.
        observer: Called as `observer(layer, x, hidden, scores, run)` at every forward pass, for statistics and fits;
            `hidden` is `None` if it has an attribute `needs_hidden` that is false.
        activation: The kernels' name of `act`, or `None` for a function that they do not have.
        merged: Does it hold one budget only (`merge`)?
        soft_gate: Do gradients reach the router through the gate (`trainable`)?
        keep_dense: Does it keep the dense layout beside the packed one (`keep_dense`)?
        expert_dtype: In what the experts' weights are computed, of `kernels.EXPERT_DTYPES` (`set_expert_dtype`).
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
        ordered: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.block, self.act, self.number, self.activation = block, act, 0, activation_name(act)
        self.dropout = nn.Dropout(dropout)
        size, up_bias, gate_bias, down_bias = block.size, *biases

        def parameter(name: str, *shape: int, wanted: bool = True) -> None:
            tensor = nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if wanted else None
            self.register_parameter(name, tensor)  # `None` as well: `versions_of` looks for all of them

        glu = block.kind == "glu"
        parameter("up_weight", block.experts, block.d_model, size)
        parameter("up_bias", block.experts, size, wanted=up_bias)
        parameter("gate_weight", block.experts, block.d_model, size, wanted=glu)
        parameter("gate_bias", block.experts, size, wanted=glu and gate_bias)
        parameter("down_weight", block.experts, size, d_out)
        parameter("down_bias", d_out, wanted=down_bias)
        delta_rank, linear_rank = min(delta_rank, d_out), min(linear_rank, d_out)
        delta, linear = budgets > 0 and delta_rank > 0, budgets > 0 and linear_rank > 0
        parameter("constants", budgets, block.experts, d_out, wanted=budgets > 0)
        parameter("delta_in", budgets, block.experts, size, delta_rank, wanted=delta)
        parameter("delta_out", budgets, delta_rank, d_out, wanted=delta)
        parameter("linear_in", budgets, block.d_model, linear_rank, wanted=linear)
        parameter("linear_out", budgets, linear_rank, d_out, wanted=linear)
        self.delta_rank, self.linear_rank = delta_rank, linear_rank
        self.router = Router(block.d_model, router_width, block.experts, device=device, dtype=dtype)
        self.gate, self.prepared = Gate(), Prepared()
        self.register_buffer("order", torch.empty(block.width, dtype=torch.int32, device=device) if ordered else None)
        stand_for_dense(self, block)
        self.merged = self.keep_dense = self.soft_gate = False
        self.expert_dtype: str | None = None
        self.observer: Callable | None = None

    @property
    def backend(self) -> Backend:
        """What computes only the experts that run, for tensors like this layer's own."""
        return fused_backend(self.up_weight, self.activation, self.gate_state.name)

    def _apply(self, *args, **kwargs) -> DynamicFFN:
        """Moves and casts: what was derived from the tensors goes with them."""
        self.prepared.invalidate()
        return super()._apply(*args, **kwargs)

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        """The block's output for hidden states ``(…, d_model)``, given as the first argument whatever its name."""
        inputs = args[0] if args else next(iter(kwargs.values()))
        state = self.gate.in_force(self)
        if isinstance(state, tuple):
            y = self.by_rows(inputs, state)
        else:
            x = inputs.reshape(-1, inputs.shape[-1])
            y = self._fused(x, state) if self._skips(x, state) else self._readable(x, state)
            y = y.reshape(*inputs.shape[:-1], y.shape[-1])
        return self.dropout(y) if self.training else y

    def _skips(self, x: torch.Tensor, state: GateState) -> bool:
        """May a backend run this that computes only what is asked for and has no gradients?"""
        observed = self.observer is not None and getattr(self.observer, "needs_hidden", True)
        if observed or state.oracle or torch.is_autocast_enabled(x.device.type):
            return False
        if torch.is_grad_enabled() and (x.requires_grad or self._wants_gradients()):
            return False
        compiling = torch.compiler.is_compiling()
        if compiling and torch.onnx.is_in_onnx_export():  # ONNX has no such operator
            return False
        watched = not compiling and torch._C._functorch.peek_interpreter_stack() is not None
        if watched or torch.jit.is_tracing():  # vmap and jit.trace have to see every step
            return False
        if self.expert_dtype == "int8-dynamic" and (compiling or torch._C._len_torch_dispatch_stack()):
            return False  # the operator rounds no tokens
        own = self._parameters  # looked up directly: `nn.Module` finds attributes slowly, and this is a hot path
        up, down = own.get("up_weight"), own.get("down_weight")
        if up is None or down is None:
            up, down = self.up_weight, self.down_weight
        if not x.dtype == up.dtype == down.dtype:
            return False
        return fused_backend(x, self.activation, state.name) is not None

    def _wants_gradients(self) -> bool:
        """Does a parameter, or a tensor that an adapter has put in the place of one?"""
        if any(p.requires_grad for p in self.parameters()):
            return True
        return any(getattr(self, name).requires_grad for name in ("up_weight", "gate_weight", "down_weight")
                   if getattr(self, name) is not None)  # fmt: skip

    def stand_in_of(self, state: GateState) -> int | None:
        """The stored stand-ins of a gate setting; none where everything runs."""
        return state.stand_in if state.tau > 0 and self.constants is not None else None

    def activations(self, x: torch.Tensor) -> torch.Tensor:
        """Activations ``(experts, tokens, size)`` of all experts for ``(tokens, d_model)``, weights as stored."""
        hidden = hidden_activations(x, self.up_weight, self.up_bias, self.gate_weight, self.gate_bias, self.act)
        return without_padding(hidden.to(_wider(hidden, self.down_weight)), block=self.block)

    def _readable(self, x: torch.Tensor, state: GateState) -> torch.Tensor:
        """All experts computed, some masked; `(tokens, d_model)` to `(tokens, d_out)`."""
        stand_in = self.stand_in_of(state)
        up, gate, down = self._weights(state)
        dynamic = self.expert_dtype == "int8-dynamic"
        hidden = hidden_activations(
            rounded_rows(x, rotate=True) if dynamic else x, up, self.up_bias, gate, self.gate_bias, self.act
        )  # (experts, tokens, size)
        hidden = without_padding(hidden.to(_wider(hidden, down)), block=self.block)
        scores = run = None
        soft = (state.soft or self.soft_gate) and torch.is_grad_enabled()
        if state.tau > 0:
            # An estimate of the gate's gradient is good enough for routers, and leads astray what comes before them.
            seen = x.detach() if soft else x
            scores = self._true_scores(hidden, down, state.oracle) if state.oracle else self.scores(seen)
            run = state.select(scores)
            if soft:
                run = straight_through(scores, run)
        if self.observer is not None:
            self.observer(self, x, hidden, scores, run)
        if dynamic:
            hidden, down = rounded_hidden(hidden, down)
        if stand_in is None:
            return down_product(hidden, down, self.down_bias, run, None)
        y = down_product(hidden, down, self.down_bias, run, state.faded(self.constants[stand_in]))
        if self.delta_in is not None and self.expert_dtype is None:  # the refitted down projection, in two thin steps
            thin = (hidden * run.T[..., None]).transpose(0, 1).flatten(1) @ self.delta_in[stand_in].flatten(0, 1)
            y = y + thin @ state.faded(self.delta_out[stand_in])
        if self.linear_in is not None:
            linear_in, linear_out = self.linear_in[stand_in], state.faded(self.linear_out[stand_in])
            if dynamic:
                first = rounded(linear_in[None], "up_weight", rotate=True)  # as an expert's
                hidden, whole = rounded_hidden(rounded_rows(x, rotate=True) @ first, linear_out[None])
                y = y + (hidden @ whole)[0]
            else:
                y = y + x @ linear_in @ linear_out
        return y

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """The router's scores ``(tokens, experts)`` of tokens ``(tokens, d_model)``, as the gate gets them."""
        return self.router(x, rounds=True) if self.expert_dtype == "int8-dynamic" else self.router(x)

    def _weights(self, state: GateState) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Up, gate and down projections of the readable way; in int8 with the refitted down projection folded in.

        Where tokens are rounded as well, the down projection is rounded later, with the hidden values.
        """
        stand_in, down = self.stand_in_of(state), self.down_weight
        if self.expert_dtype is None:
            return self.up_weight, self.gate_weight, down
        if stand_in is not None and self.delta_in is not None:
            down = down + self.delta_in[stand_in] @ state.faded(self.delta_out[stand_in])
        dynamic = self.expert_dtype == "int8-dynamic"
        gate = None if self.gate_weight is None else rounded(self.gate_weight, "gate_weight", dynamic)
        if not dynamic:
            down = rounded(down, "down_weight")
        return rounded(self.up_weight, "up_weight", dynamic), gate, down

    def _fused(self, x: torch.Tensor, state: GateState) -> torch.Tensor:
        """The same by a backend, straight through it where nobody watches the dispatcher."""
        run = None
        if self.observer is not None:
            scores = self.scores(x) if state.tau > 0 else None
            run = None if scores is None else state.select(scores)
            self.observer(self, x, None, scores, run)
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or type(x) is not torch.Tensor:
            tensors = as_computed(self, self.prepared.tensors(self, state, None))
            return torch.ops.d2dmoe.dynamic_ffn(
                x, run, *(tensors[n] for n in TENSORS), self.activation, *settings(state)
            )
        return self.prepared.run(self, state, x, run)

    def way(self, tokens: int) -> str | None:
        """The execution path chosen for this token count, `sparse` or `dense`; `None` before it has been met."""
        return way_taken(self.prepared.place(self, self.gate_state), tokens)

    def dense_bytes(self) -> int:
        """Memory of the dense layout, if it is kept."""
        weights = (self.up_weight, self.gate_weight, self.down_weight, self.up_bias, self.gate_bias)
        width, slots = self.block.width, self.block.slots
        return sum(t.numel() // slots * width * t.element_size() for t in weights if t is not None)

    def int8_bytes(self) -> int:
        """Memory of the weights in int8, with their scales."""
        weights = [t for t in (self.up_weight, self.gate_weight, self.down_weight) if t is not None]
        return sum(len(t) * -(-t.shape[1] // 4) * 4 * t.shape[2] + 4 * self.block.slots for t in weights)

    def _true_scores(self, hidden: torch.Tensor, down_weight: torch.Tensor, target: str) -> torch.Tensor:
        norms = expert_norms(hidden, down_weight)
        return norms.sqrt() if target == "root" else norms

    def stand_ins(self) -> dict[str, nn.Parameter]:
        """The stored stand-ins by name."""
        names = ("constants", "delta_in", "delta_out", "linear_in", "linear_out")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        b = self.block
        return f"{b.kind}, {b.activation}, {b.d_model}->{b.width}, experts={b.experts} of {b.size}"


def _wider(hidden: torch.Tensor, down: torch.Tensor) -> torch.dtype:
    """In what the down projection is computed: T5 keeps it in fp32."""
    return torch.promote_types(hidden.dtype, down.dtype)


def layers(model: nn.Module) -> list[DynamicFFN]:
    """The converted layers of a model, in the order of the blocks in its config, in which the model runs them."""
    return sorted((m for m in model.modules() if isinstance(m, DynamicFFN)), key=lambda layer: layer.number)
