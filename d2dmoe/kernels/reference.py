"""The definition of the operator in plain PyTorch: any device, any dtype, differentiable, and not fast."""

from __future__ import annotations

from collections.abc import Callable

import torch


def hidden_activations(
    x: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    gate_weight: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
    act: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """`act(x W1 + b1)`, or `act(x Wg + bg) * (x W1 + b1)` for a GLU, of every expert.

    Args:
        x: Tokens ``(tokens, d_model)``.
        up_weight, gate_weight: ``(experts, d_model, size)``; no `gate_weight` for a plain FFN.
        up_bias, gate_bias: ``(experts, size)`` or `None`.
        act: The activation.

    Returns:
        ``(experts, tokens, size)``.
    """
    up = torch.matmul(x, up_weight)
    if up_bias is not None:
        up = up + up_bias[:, None]
    if gate_weight is None:
        return act(up)
    gate = torch.matmul(x, gate_weight)
    if gate_bias is not None:
        gate = gate + gate_bias[:, None]
    return act(gate) * up


def down_product(
    hidden: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    run: torch.Tensor | None,
    constants: torch.Tensor | None,
) -> torch.Tensor:
    """`y = b2 + sum over run experts of E_e(x) + sum over skipped experts of c_e` (Szatkowski et al. 2024, sec. 3.1).

    Args:
        hidden: From `hidden_activations`, ``(experts, tokens, size)``.
        down_weight: ``(experts, size, d_out)``.
        down_bias: ``(d_out,)`` or `None`.
        run: Which experts run, boolean (or 0 and 1 with a gradient) ``(tokens, experts)``; `None` runs all of them.
        constants: Stand-ins `c_e` ``(experts, d_out)`` or `None` for zero.

    Returns:
        ``(tokens, d_out)``.
    """
    if run is not None:
        hidden = hidden * run.T[..., None]
    experts, tokens, size = hidden.shape
    y = hidden.transpose(0, 1).reshape(tokens, experts * size) @ down_weight.reshape(experts * size, -1)
    if run is not None and constants is not None:
        y = y + (1 - run.to(constants.dtype)) @ constants
    return y if down_bias is None else y + down_bias
