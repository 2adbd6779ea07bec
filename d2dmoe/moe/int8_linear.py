"""Linear maps that are no experts, with weights in int8. Parameters and names stay as the model has them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import UserError
from ..kernels import EXPERT_DTYPES, LinearPlan, StaleWeights, identity, projects, rounded_rows
from .layer import layers
from .packing import is_plain
from .prepared import offloaded

LEAST = 2**14  # weights of a map below which rounding saves nothing that could be measured


class _Plans:
    """The plan of one map, made again after a change of its weights; copies make their own."""

    def __init__(self) -> None:
        self.key: tuple = ()
        self.plan: LinearPlan | None = None

    def __reduce__(self) -> tuple:
        return _Plans, ()


class Int8Map(nn.Module):
    """What `Int8Linear` and `Int8Conv1D` have in common: ``y = x round(W) + b``, and with `int8-dynamic` ``round(x)``.

    Every output has one scale for its weights, and every token one where tokens are rounded: the largest value becomes
    127. Biases are not rounded.

    Attributes:
        linear_dtype: `int8` or `int8-dynamic`.
        dense_class: The class that the map had before.
    """

    linear_dtype: str
    dense_class: type[nn.Module]

    def matrix(self) -> torch.Tensor:
        """The weights as ``(outputs, inputs)``."""
        raise NotImplementedError

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``(…, inputs)`` to ``(…, outputs)``."""
        y = self._by_library(input)
        if y is not None:
            return y
        x = rounded_rows(input) if self.linear_dtype == "int8-dynamic" else input
        return nn.functional.linear(x, rounded_rows(self.matrix()), self.bias)

    def _by_library(self, x: torch.Tensor) -> torch.Tensor | None:
        own = self._parameters  # `nn.Module` finds attributes slowly, and this is a hot path
        weight, bias = own.get("weight"), own.get("bias")
        if not _can(self, weight, x):
            return None
        held: _Plans = self.__dict__["_plans"]
        key = (self.linear_dtype, identity(weight), None if bias is None else identity(bias))
        for _ in range(2):
            plan = held.plan
            if plan is None or held.key != key:
                plan = LinearPlan(self.matrix(), bias, rounds=self.linear_dtype == "int8-dynamic")
                held.plan, held.key = plan, key
            try:
                return plan(x)
            except StaleWeights:
                held.plan = None
        return None  # somebody writes to the weights meanwhile


class Int8Linear(Int8Map, nn.Linear):
    """A `torch.nn.Linear` in int8, see `Int8Map`."""

    def matrix(self) -> torch.Tensor:
        """The weights as ``(outputs, inputs)``."""
        return self.weight


class Int8Conv1D(Int8Map, Conv1D):
    """GPT-2's `Conv1D` in int8, see `Int8Map`."""

    def matrix(self) -> torch.Tensor:
        """The weights as ``(outputs, inputs)``."""
        return self.weight.T


def set_linear_dtype(model: nn.Module, dtype: str | None) -> int:
    """Compute the linear maps of a model that are no experts with weights in int8, or again as they are.

    These are the projections around attention, the head, and in a model that is not converted the feed-forward blocks
    as well. What `--attention` or `--head` has converted stays as it is, and so do maps of fewer than 16,384 weights.
    Parameters and checkpoints stay as they are; on a CPU the native library holds a rounded copy and reads a quarter of
    the bytes of fp32. Everywhere else (GPU, autocast, gradients, compiled code) PyTorch rounds the weights at every
    call, which is good for checks, and slow. Gradients pass the rounding as if it were not there.

    Args:
        model: Any model, changed in place. Its copies keep the setting, its checkpoints do not.
        dtype: `"int8"` (weights; for few tokens), `"int8-dynamic"` (tokens as well; for many), or `None` for the
            parameters' own.

    Returns:
        The bytes that the native library's copies take beside the parameters, once every map has run.

    Raises:
        UserError: If the dtype is another one.
    """
    if dtype not in EXPERT_DTYPES:
        raise UserError(f'linear dtype {dtype!r}: give "int8", "int8-dynamic", or None for that of the parameters')
    found = [m for m in model.modules() if isinstance(m, Int8Map)]
    if dtype is not None:
        within = {id(inner) for layer in layers(model) for inner in layer.modules()}
        found += [m for m in model.modules() if id(m) not in within and _takes(m)]
    for module in found:
        _set(module, dtype)
    return sum(m.weight.numel() + 4 * m.matrix().shape[0] for m in found) if dtype else 0


def dtypes_of(model: nn.Module) -> dict[str, str]:
    """`expert_dtype` and `linear_dtype` of a model, where they are not the parameters' own."""
    experts = next((layer.expert_dtype for layer in layers(model) if layer.expert_dtype), None)
    maps = next((m.linear_dtype for m in model.modules() if isinstance(m, Int8Map)), None)
    return {name: dtype for name, dtype in (("expert_dtype", experts), ("linear_dtype", maps)) if dtype}


def _takes(module: nn.Module) -> bool:
    """A linear map and nothing more, whose call nobody has taken over."""
    kinds = isinstance(module, nn.Linear | Conv1D) and not isinstance(module, Int8Map)
    return kinds and "forward" not in vars(module) and module.weight.numel() >= LEAST and is_plain(module)


def _set(module: Any, dtype: str | None) -> None:
    if dtype is None:
        module.__class__ = module.dense_class
        for name in ("dense_class", "linear_dtype", "_plans"):
            delattr(module, name)
        return
    if not isinstance(module, Int8Map):
        module.dense_class = type(module)
        module.__class__ = Int8Conv1D if isinstance(module, Conv1D) else Int8Linear
    module.linear_dtype, module._plans = dtype, _Plans()


def _can(layer: nn.Module, weight: torch.Tensor | None, x: torch.Tensor) -> bool:
    """May the library do this? It has no gradients, and nobody can watch its steps."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None or torch._C._len_torch_dispatch_stack():
        return False
    if type(x) is not torch.Tensor or type(weight) is not nn.Parameter or not x.is_cpu or not weight.is_cpu:
        return False
    if x.dtype != weight.dtype or not projects(x.dtype) or torch.is_autocast_enabled("cpu") or offloaded(layer):
        return False
    return not (torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in layer.parameters())))
