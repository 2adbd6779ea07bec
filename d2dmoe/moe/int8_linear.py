"""Linear maps that are no experts, with weights in int8. Parameters and names stay as the model has them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import UserError
from ..kernels import EXPERT_DTYPES
from .int8_plans import Plans
from .layer import layers
from .packing import is_plain, matrix_of, sizes
from .projection import DynamicProjection

LEAST = 2**14  # weights of a map below which rounding saves nothing that could be measured


class Int8Map(nn.Module):
    """What `Int8Linear` and `Int8Conv1D` have in common, see `int8_plans.Plans`.

    Attributes:
        linear_dtype: `int8` or `int8-dynamic`.
        plans: Of the library.
        dense_class: The class that the map had before.
    """

    linear_dtype: str
    plans: Plans
    dense_class: type[nn.Module]

    def matrix(self) -> torch.Tensor:
        """The weights as ``(outputs, inputs)``."""
        return matrix_of(self)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``(…, inputs)`` to ``(…, outputs)``."""
        return self.plans.linear(self, input, self.matrix(), self.bias, self.linear_dtype)


class Int8Linear(Int8Map, nn.Linear):
    """A `torch.nn.Linear` in int8, see `Int8Map`."""


class Int8Conv1D(Int8Map, Conv1D):
    """GPT-2's `Conv1D` in int8, see `Int8Map`."""


def set_linear_dtype(model: nn.Module, dtype: str | None) -> int:
    """Compute the linear maps of a model that are no experts with weights in int8, or again as they are.

    These are the projections around attention, the head, and in a model that is not converted the feed-forward blocks
    as well. Of what `--attention` or `--head` has converted the factors are rounded; the candidates of a head are not,
    and under gradients neither are factors. Maps of fewer than 16,384 weights stay as they are. Parameters and
    checkpoints stay as they are; on a CPU the native library holds a rounded copy and reads a quarter of the bytes of
    fp32. Everywhere else (GPU, autocast, gradients, compiled code) PyTorch rounds the weights at every call, which is
    good for checks, and slow. Gradients pass the rounding as if it were not there.

    Args:
        model: Any model, changed in place. Its copies keep the setting, its checkpoints do not.
        dtype: `"int8"` (weights; for few tokens), `"int8-dynamic"` (tokens as well; for all), or `None` for the
            parameters' own.

    Returns:
        The bytes that the native library's copies take beside the parameters, once every map has run; at most, where
        some are at low rank.

    Raises:
        UserError: If the dtype is another one.
    """
    if dtype not in EXPERT_DTYPES:
        raise UserError(f'linear dtype {dtype!r}: give "int8", "int8-dynamic", or None for that of the parameters')
    found = [m for m in model.modules() if isinstance(m, Int8Map | DynamicProjection)]
    if dtype is not None:
        within = {id(inner) for layer in layers(model) for inner in layer.modules()}
        found += [m for m in model.modules() if id(m) not in within and _takes(m)]
    for module in found:
        _set(module, dtype)
    return sum(n * k + 4 * n for k, n in map(sizes, found)) if dtype else 0


def dtypes_of(model: nn.Module) -> dict[str, str]:
    """`expert_dtype` and `linear_dtype` of a model, where they are not the parameters' own."""
    experts = next((layer.expert_dtype for layer in layers(model) if layer.expert_dtype), None)
    given = (m.linear_dtype for m in model.modules() if isinstance(m, Int8Map | DynamicProjection))
    maps = next((dtype for dtype in given if dtype), None)
    return {name: dtype for name, dtype in (("expert_dtype", experts), ("linear_dtype", maps)) if dtype}


def _takes(module: nn.Module) -> bool:
    """A linear map and nothing more, whose call nobody has taken over."""
    kinds = isinstance(module, nn.Linear | Conv1D) and not isinstance(module, Int8Map | DynamicProjection)
    return kinds and "forward" not in vars(module) and module.weight.numel() >= LEAST and is_plain(module)


def _set(module: Any, dtype: str | None) -> None:
    if isinstance(module, DynamicProjection):
        module.linear_dtype, module.plans = dtype, Plans()
        return
    if dtype is None:
        module.__class__ = module.dense_class
        for name in ("dense_class", "linear_dtype", "plans"):
            delattr(module, name)
        return
    if not isinstance(module, Int8Map):
        module.dense_class = type(module)
        module.__class__ = Int8Conv1D if isinstance(module, Conv1D) else Int8Linear
    module.linear_dtype, module.plans = dtype, Plans()
