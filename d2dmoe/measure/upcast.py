"""Compute in fp32 with weights that stay in half precision in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

PRODUCTS = {
    "linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "einsum", "conv1d", "conv2d",
    "layer_norm", "group_norm",
}  # fmt: skip
HALVES = (torch.bfloat16, torch.float16)


class Upcasting(TorchFunctionMode):
    """Inside, products take their factors in fp32: a copy of one weight in half precision at a time.

    What an embedding gives is fp32 too, so that everything a model computes is, up to modules that round by themselves.
    Sums and elementwise products of mixed dtypes are fp32 in PyTorch anyway.
    """

    active = 0  # how many of these are in force

    def __enter__(self) -> Upcasting:
        Upcasting.active += 1
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        Upcasting.active -= 1
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in PRODUCTS:
            args, kwargs = _upcast(args), {key: _upcast(value) for key, value in kwargs.items()}
        output = func(*args, **kwargs)
        return _upcast(output) if name == "embedding" else output


def _upcast(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.float() if value.dtype in HALVES else value
    return type(value)(map(_upcast, value)) if type(value) in (tuple, list) else value


def upcast_vectors(model: nn.Module) -> None:
    """Biases and the weights of norms to fp32: they take next to no memory, and every dtype check passes them."""
    for parameter in model.parameters():
        if parameter.dim() < 2 and parameter.dtype in HALVES:
            parameter.data = parameter.data.float()
