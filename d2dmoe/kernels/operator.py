"""The operator `d2dmoe::dynamic_ffn`: definition, fake implementation, gradients and FLOP formula."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from .backends import fused_backend
from .gates import select
from .reference import down_product, hidden_activations

functional = torch.nn.functional
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda z: functional.gelu(z, approximate="tanh"),
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "silu": functional.silu,
}
# Wide enough for clipped variants, and dense about zero for a ReLU with a small threshold.
PROBE = [i / 8 for i in range(-96, 97)] + [-60.0, -20.0, 20.0, 60.0] + [s / 2**i for i in range(4, 18) for s in (1, -1)]


@torch.no_grad()
def activation_name(act: Callable[[torch.Tensor], torch.Tensor]) -> str | None:
    """Which of `ACTIVATIONS` a function computes, by its values; `None` for another."""
    z = torch.tensor(PROBE, dtype=torch.float64, device="cpu")
    try:
        values = act(z.clone())
    except (RuntimeError, TypeError, ValueError):  # parameters on another device or in another dtype
        return None
    if not isinstance(values, torch.Tensor) or values.shape != z.shape or values.device != z.device:
        return None
    error = {name: float((values - f(z)).abs().max()) for name, f in ACTIVATIONS.items()}
    best = min(error, key=lambda name: error[name])
    return best if error[best] < 1e-5 else None


def reference(
    x: torch.Tensor,
    run: torch.Tensor | None,
    router_hidden: torch.Tensor | None,
    router_score: torch.Tensor | None,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    gate_weight: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    constants: torch.Tensor | None,
    linear_in: torch.Tensor | None,
    linear_out: torch.Tensor | None,
    activation: str,
    gate: str,
    tau: float,
    min_experts: int,
    max_experts: int,
    shared: int,
) -> torch.Tensor:
    """What the operator computes, in the steps of DESIGN.md section 2: router, gate, experts, stand-ins.

    Args:
        x: Tokens ``(tokens, d_model)``.
        run: Which experts run ``(tokens, experts)``; `None` leaves it to router and gate, or runs all at `tau` 0.
        router_hidden, router_score: The router's weights ``(width, d_model)`` and ``(experts, width)``.
        up_weight, gate_weight: ``(experts, d_model, size)``; no `gate_weight` for a plain FFN.
        up_bias, gate_bias: ``(experts, size)`` or `None`.
        down_weight: ``(experts, size, d_out)``.
        down_bias: ``(d_out,)`` or `None`.
        constants: Of skipped experts ``(experts, d_out)``, or `None` for zero.
        linear_in, linear_out: Low-rank linear term ``(d_model, rank)``, ``(rank, d_out)``; off where everything runs.
        activation: A key of `ACTIVATIONS`.
        gate, tau, min_experts, max_experts, shared: See `gates.select`.

    Returns:
        ``(tokens, d_out)``.
    """
    if run is None and tau > 0:
        scores = (torch.relu(x @ router_hidden.T) @ router_score.T).abs()
        run = select(scores, gate, tau, min_experts, max_experts, shared)
    hidden = hidden_activations(x, up_weight, up_bias, gate_weight, gate_bias, ACTIVATIONS[activation])
    y = down_product(hidden, down_weight, down_bias, run, constants)
    return y if linear_in is None or run is None else y + x @ linear_in @ linear_out


ARGUMENTS = tuple(inspect.signature(reference).parameters)
TENSORS = ARGUMENTS[2:13]  # the layer's
dynamic_ffn = torch.library.custom_op("d2dmoe::dynamic_ffn", reference, mutates_args=())


@dynamic_ffn.register_kernel("cpu")
def _on_cpu(*arguments: Any) -> torch.Tensor:
    named = dict(zip(ARGUMENTS, arguments, strict=True))
    x, run, gate = named["x"], named["run"], named["gate"]
    backend = fused_backend(x, named["activation"], gate)
    if backend is None:
        return reference(*arguments)
    tensors = {name: named[name] for name in TENSORS}
    bounds = (named["min_experts"], named["max_experts"], named["shared"])
    return backend.prepare(tensors, named["activation"], gate, named["tau"], *bounds)(x, run)


@dynamic_ffn.register_fake
def _fake(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    down_weight = arguments[ARGUMENTS.index("down_weight") - 1]
    return x.new_empty((x.shape[0], down_weight.shape[-1]))


def _remember(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    named = dict(zip(ARGUMENTS, inputs, strict=True))
    ctx.save_for_backward(*(named[name] for name in ("x", "run", *TENSORS)))
    ctx.settings = inputs[13:]


def _backward(ctx: Any, grad: torch.Tensor) -> tuple:
    """Through the reference, computed again."""
    with torch.enable_grad():
        inputs = [t if t is None or not t.is_floating_point() else t.detach() for t in ctx.saved_tensors]
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[:13]) if needed]
        for i in wanted:
            inputs[i].requires_grad_()
        y = reference(*inputs, *ctx.settings)
    found = torch.autograd.grad(y, [inputs[i] for i in wanted], grad, allow_unused=True)
    grads: list[torch.Tensor | None] = [None] * len(ARGUMENTS)
    for i, g in zip(wanted, found, strict=True):
        grads[i] = g
    return tuple(grads)


dynamic_ffn.register_autograd(_backward, setup_context=_remember)


@register_flop_formula(torch.ops.d2dmoe.dynamic_ffn, get_raw=True)
def dynamic_ffn_flops(*arguments: Any, out_val: Any = None, **_: Any) -> int:
    """Products that are carried out: router, executed experts, linear term. As `FlopCounterMode` counts, without sums.

    Where tensors have no values (fake ones), everything counts as run.
    """
    named = dict(zip(ARGUMENTS, arguments, strict=True))
    x, run, tau, router = named["x"], named["run"], named["tau"], named["router_hidden"]
    experts, d, size = named["up_weight"].shape
    tokens, pairs, total = x.shape[0], x.shape[0] * experts, 0
    if run is None and tau > 0:
        total += 2 * tokens * (router.numel() + named["router_score"].numel())
    real = not isinstance(x, torch._subclasses.FakeTensor) and x.device.type != "meta"
    if real and (run is not None or tau > 0):
        if run is None:
            scores = (torch.relu(x @ router.T) @ named["router_score"].T).abs()
            run = select(scores, *(named[name] for name in ARGUMENTS[14:]))
        pairs = int(run.sum())
    if named["linear_in"] is not None and (run is not None or tau > 0):
        total += 2 * tokens * (named["linear_in"].numel() + named["linear_out"].numel())
    products = (2 if named["gate_weight"] is not None else 1) * d + named["down_weight"].shape[-1]
    return total + 2 * pairs * size * products
