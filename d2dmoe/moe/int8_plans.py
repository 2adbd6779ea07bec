"""Products with weights in int8, by the native library where it can, by PyTorch elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ..config.projections import ProjectionState
from ..kernels import LinearPlan, StaleWeights, identity, projects, rounded_rows
from .heads import or_none, run_narrow
from .prepared import offloaded

Projected = Any  # a `DynamicProjection`, which imports this
KEPT = 32  # maps whose plans are kept: a projection has some for each budget


class Plans:
    """The library's plans of a module's maps, each made again after a change of its weights. Copies make their own."""

    def __init__(self) -> None:
        self._known: dict[tuple, LinearPlan] = {}
        self._single: dict[tuple[str, ProjectionState], tuple[tuple, LinearPlan]] = {}  # with versions of all tensors

    def __reduce__(self) -> tuple:
        return Plans, ()

    def linear(
        self, module: nn.Module, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: str
    ) -> torch.Tensor:
        """``y = x round(weight) + bias``; with `int8-dynamic` both are rotated, and ``round(x)``.

        Every output has one scale for its weights, and every token one where tokens are rounded: the largest value
        becomes 127. Biases are not rounded. Gradients pass the rounding as if it were not there.

        Args:
            module: Whose map this is.
            x: ``(…, inputs)``.
            weight: ``(outputs, inputs)``.
            bias: ``(outputs,)``, or `None`.
            dtype: `int8` or `int8-dynamic`.
        """
        y = None
        if _can(module, weight, x):
            key = (dtype, identity(weight), None if bias is None else identity(bias))
            y = self._by_library(x, key, lambda: LinearPlan(weight, bias, rounds=dtype == "int8-dynamic"))
        return _by_torch(x, weight, bias, dtype) if y is None else y

    def single(self, layer: Projected, x: torch.Tensor, state: ProjectionState, dtype: str) -> torch.Tensor:
        """The same for what is one product: factors multiplied out before they are rounded, or heads of less width.

        Args:
            layer: A `DynamicProjection`.
            x: ``(…, inputs)``.
            state: With the ranks of the sections, or the widths of heads.
            dtype: `int8` or `int8-dynamic`.
        """
        own, held = layer._parameters, layer._buffers  # `nn.Module` finds attributes slowly, and this is a hot path
        weight = held.get("merged_first", own.get("weight"))
        if own.keys() == layer.OWN and _can(layer, weight, x):
            tensors = (*own.values(), *held.values()) if held else own.values()
            # `kernels.identity`, inline
            versions = tuple([(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors if t is not None])
            for _ in range(2):
                known = self._single.get((dtype, state))
                if known is None or known[0] != versions:
                    known = self._add(layer, state, dtype, versions)
                try:
                    return known[1](x)
                except StaleWeights:
                    self._single = {}
        factors, product = layer.factors(state), partial(_by_torch, dtype=dtype)
        return run_narrow(x, factors, product) if state.method == "heads" else product(x, *_multiplied_out(*factors))

    def _add(self, layer: Projected, state: ProjectionState, dtype: str, versions: tuple) -> tuple[tuple, LinearPlan]:
        factors, places, width = layer.factors(state), {}, layer.projection.inputs
        if state.method == "heads":
            weight, (kept, *there), (bias,) = factors
            places = {"spread": or_none(kept, there[0])} if there else {"gather": kept, "width": width}
        else:
            weight, bias = _multiplied_out(*factors)
        sources = [t for t in layer.factor_sources() if t.numel()]
        plan = LinearPlan(weight, bias, rounds=dtype == "int8-dynamic", sources=sources, **places)
        others = [(key, known) for key, known in self._single.items() if key != (dtype, state)][-KEPT + 1 :]
        self._single = {**dict(others), (dtype, state): (versions, plan)}
        return versions, plan

    def _by_library(self, x: torch.Tensor, key: tuple, make: Callable[[], LinearPlan]) -> torch.Tensor | None:
        """By the plan of this key: dtype, and identities of weight and bias."""
        for _ in range(2):
            plan = self._known.get(key)
            if plan is None:
                plan, others = make(), list(self._known.items())[-KEPT + 1 :]
                self._known = {**{k: v for k, v in others if k[1][0] != key[1][0]}, key: plan}
            try:
                return plan(x)
            except StaleWeights:
                self._known = {}
        return None  # somebody writes to the weights meanwhile


@torch.no_grad()
def _multiplied_out(
    first: torch.Tensor, second: list[torch.Tensor], constants: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights ``(outputs, inputs)`` and constants ``(outputs,)`` of factors."""
    parts = zip(first.split([s.shape[1] for s in second]), second, strict=True)
    return torch.cat([(s.float() @ f.float()).to(s.dtype) for f, s in parts]), torch.cat(constants)


def _by_torch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: str) -> torch.Tensor:
    dynamic = dtype == "int8-dynamic"
    return nn.functional.linear(rounded_rows(x, rotate=True) if dynamic else x, rounded_rows(weight, dynamic), bias)


def _can(layer: nn.Module, weight: torch.Tensor, x: torch.Tensor) -> bool:
    """May the library do this? It has no gradients, and nobody can watch its steps."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None or torch._C._len_torch_dispatch_stack():
        return False
    plain = type(x) is torch.Tensor and type(weight) in (torch.Tensor, nn.Parameter)
    if not plain or "weight" not in layer._parameters:  # a parametrised weight is another tensor at every call
        return False
    if not (x.is_cpu and weight.is_cpu and x.numel() and weight.numel()):
        return False
    if x.dtype != weight.dtype or not projects(x.dtype) or torch.is_autocast_enabled("cpu") or offloaded(layer):
        return False
    return not (torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in layer.parameters())))
