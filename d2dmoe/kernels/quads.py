"""Expert weights in int8: the rounding, which defines what every backend computes, and the layout of the library.

A neuron has one scale for its weights in each matrix: the largest of them becomes 127. In the up and gate projections
it multiplies the neuron's sum, in the down projection its hidden value, so neither costs anything beside the products.
A scale for each output of an expert's down projection would need sums of its own for every expert and as many scales
as outputs, an eighth of the weights' bytes for experts of 32.

Where tokens are rounded as well, they are first rotated, and so are the weights that they are multiplied by: a token
has one scale, and a single input that is much larger than the others would leave them few of its steps.
"""

from __future__ import annotations

import torch

EXPERT_DTYPES = (None, "int8", "int8-dynamic")  # None: that of the parameters; the last one rounds tokens as well
MOST = 127
INPUTS = {"up_weight": 1, "gate_weight": 1, "down_weight": 2}  # dimension that a neuron's weights of a matrix run along
BLOCKS = (64, 16)  # inputs that are rotated together: first the large blocks, of what is left the small ones
SLACK = 64  # bytes that the library may read beyond the last quad


def scales(weight: torch.Tensor, dim: int) -> torch.Tensor:
    """Of the weights along `dim`, in fp32 and of size 1 there; NaN where one of them is not finite."""
    largest = weight.detach().abs().amax(dim, keepdim=True).float()
    return torch.where(largest.isfinite(), largest / MOST, torch.nan)


def integers(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`weight / scale` as whole numbers in fp32, from -127 to 127; 0 where the scale is 0 or NaN."""
    exact = weight.detach().float() / torch.where(scale > 0, scale, torch.inf)
    return exact.nan_to_num(0.0).round().clamp(-MOST, MOST)


def rotated(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """`BLOCKS` of values along `dim` times an orthogonal matrix, in fp32; what fills no block stays as it is.

    So ``x W`` is ``rotated(x) rotated(W, inputs)``. The matrix changes the signs of some values, and the others follow
    from Hadamard (as in QuaRot, Ashkboos et al. 2024): a large value spreads evenly over its block. The signs are those
    of a bent function (Rothaus 1976), whose transform is flat, so a constant spreads evenly as well; routers of models
    with layer norms have one in their weights.
    """
    parts = x.to(torch.promote_types(x.dtype, torch.float32)).movedim(dim, -1)
    found = []
    for block in BLOCKS:
        whole = parts.shape[-1] // block * block
        part, parts = parts[..., :whole], parts[..., whole:]
        places = torch.arange(block, device=x.device)
        pairs = places & places >> 1  # of neighbouring bits
        signs = (1 - 2 * ((pairs ^ pairs >> 2 ^ pairs >> 4) & 1)) * block**-0.5
        part = part.unflatten(-1, (-1, block)) * signs.to(part.dtype)
        part, step = part.flatten(-2), 1
        while step < block:  # sums and differences of pairs that are ever farther apart
            first, second = part.unflatten(-1, (-1, 2, step)).unbind(-2)
            part = torch.stack([first + second, first - second], -2).flatten(-3)
            step *= 2
        found.append(part)
    return torch.cat([*found, parts], -1).movedim(-1, dim)


def rounded(weight: torch.Tensor, name: str, rotate: bool = False) -> torch.Tensor:
    """The weights that int8 stands for, in the dtype of `weight`; gradients pass through as if it had not been rounded.

    Args:
        weight: Packed ``(experts, inputs, outputs)``.
        name: Which matrix it is, a key of `INPUTS`.
        rotate: Along the inputs, see `rotated`.

    Returns:
        The same shape, of `rotated(weight)` if asked for. A neuron with a weight that is not finite has NaN everywhere.
    """
    return _on_scales(weight, INPUTS[name], rotate)


def rounded_rows(x: torch.Tensor, rotate: bool = False) -> torch.Tensor:
    """Every row of `x` ``(…, n)``, or of `rotated(x)`, on a scale of its own; NaN where a value is not finite.

    Gradients pass through.
    """
    return _on_scales(x, -1, rotate)


def _on_scales(x: torch.Tensor, dim: int, rotate: bool) -> torch.Tensor:
    turned = rotated(x, dim) if rotate else x
    scale = scales(turned, dim)
    found = (integers(turned, scale) * scale).to(x.dtype)
    if torch.is_grad_enabled() and x.requires_grad:  # the straight-through estimate of Bengio et al. 2013
        return found + (turned - turned.detach()).to(x.dtype)
    return found


def rounded_hidden(hidden: torch.Tensor, down_weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two factors of the down product where tokens are rounded as well.

    The hidden values ``(experts, tokens, size)`` take the scales of the down projection on and are then rounded, a
    scale for each token of an expert. What is left of ``(experts, size, d_out)`` are integers.
    """
    scale = scales(down_weight, INPUTS["down_weight"])
    whole = integers(down_weight, scale).to(down_weight.dtype)
    if torch.is_grad_enabled() and down_weight.requires_grad:
        whole = whole + (down_weight - down_weight.detach()) / torch.where(scale > 0, scale, 1.0).to(whole.dtype)
    return rounded_rows(hidden.float() * scale.transpose(1, 2)).to(hidden.dtype), whole


def in_quads(weight: torch.Tensor, name: str, rotate: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """As the library reads `rounded`: bytes ``(experts, ceil(inputs / 4), outputs, 4)``, 128 + integer, and scales.

    Four rows at a time are interleaved; zeros fill up the last four. The scales are ``(experts, size)`` in fp32.
    """
    weight = rotated(weight.detach(), INPUTS[name]) if rotate else weight
    scale = scales(weight, INPUTS[name])
    numbers = (integers(weight, scale) + 128).to(torch.uint8)
    experts, inputs, outputs = weight.shape
    memory = torch.full((experts * -(-inputs // 4) * 4 * outputs + SLACK,), 128, dtype=torch.uint8)
    quads = memory[:-SLACK].view(experts, -1, outputs, 4)
    for row in range(4):
        part = numbers[:, row::4]
        quads[:, : part.shape[1], :, row] = part
    return quads, scale.squeeze(INPUTS[name]).contiguous()
