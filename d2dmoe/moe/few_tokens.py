"""Projections around attention on few tokens: plans of the native library, kept while the tensors stay as they are."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch

from ..config.projections import ProjectionState
from ..kernels import ProjectionPlan, StaleWeights, Watch, bucket, choose_way, identity, projects, way_taken
from .heads import or_none, run_narrow
from .prepared import offloaded

KEPT = 8  # settings of a projection whose plans are kept
MOST = {  # tokens up to which the library is faster than torch's products; LAB.md, 2026-11-27
    (torch.float32, "low-rank"): 8, (torch.float32, "channels"): 16, (torch.float32, "heads"): 8,
    (torch.bfloat16, "low-rank"): 8, (torch.bfloat16, "channels"): 4, (torch.bfloat16, "heads"): 8,
}  # fmt: skip
TIMED = 256  # up to which it may be, without channels: torch's products are fast on some processors only
Layer = Any  # a `DynamicProjection`, which imports this
Versions = tuple[tuple[int, int], ...]


class Ways(NamedTuple):
    """What computes a projection at one setting, good for tensors of these versions."""

    versions: Versions
    plan: ProjectionPlan | None  # of the library
    factors: Any  # for torch's products, as of `DynamicProjection.factors`; `None` without any
    place: tuple  # what decides which is faster: projections alike share the decision

    def by_torch(self, layer: Layer, state: ProjectionState, x: torch.Tensor) -> torch.Tensor:
        """By thin products.

        Raises:
            StaleWeights: If what the factors were made from has changed.
        """
        if self.plan.watch.changed():
            raise StaleWeights
        if state.method == "heads":
            return run_narrow(x, self.factors, layer._by_weights)
        return layer._factored(x, self.factors, state.ranks)


class FewTokens:
    """The plans of one projection, by setting.

    A plan is good for the parameters it was made from (`kernels.identity`). Where it holds copies, the library compares
    samples of their sources at every call, which shows a write through `.data` (see `prepared.Prepared`).
    """

    def __init__(self) -> None:
        self.invalidate()

    def __reduce__(self) -> tuple:
        """Copies make their own."""
        return FewTokens, ()

    def invalidate(self) -> None:
        """Drop everything."""
        self._plans: dict[ProjectionState, Ways] = {}
        self._turned: tuple[tuple[int, int], Watch, torch.Tensor] | None = None  # weights as (inputs, outputs)

    def extra_bytes(self) -> int:
        """Memory of the weights that are kept a second time."""
        return 0 if self._turned is None else self._turned[2].nbytes

    def run(self, layer: Layer, state: ProjectionState, x: torch.Tensor) -> torch.Tensor | None:
        """``(…, outputs)`` of ``(…, inputs)``; `None` where torch has to do it, or is faster."""
        own = layer._parameters  # `nn.Module` finds attributes slowly, and this is a hot path
        weight = own.get("weight")
        if weight is None or own.keys() != layer.OWN or not _few(layer, state, weight, x):
            return None
        fitted = state.ranks or state.refit >= 0
        tensors = own.values() if fitted else (weight, own["bias"], own["channel_norms"])
        if layer.merged:
            tensors = (*tensors, *layer._buffers.values())
        # `kernels.identity`, inline
        versions = tuple([(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors if t is not None])
        for _ in range(2):
            known = self._plans.get(state)
            if known is None or known.versions != versions:
                if known is not None:
                    self.invalidate()
                known = self._add(layer, state, versions)
            if known.plan is None:
                return None
            try:
                return known.plan(x) if _faster(layer, state, known, x) else known.by_torch(layer, state, x)
            except StaleWeights:
                self.invalidate()
        return None  # somebody writes to the weights meanwhile

    @torch.no_grad()
    def _add(self, layer: Layer, state: ProjectionState, versions: Versions) -> Ways:
        method, p = "heads" if state.method == "heads" else "low-rank", layer.projection
        factors = layer.factors(state) if method == "heads" or any(state.ranks) or state.refit >= 0 else None
        place = (method, p.inputs, p.outputs, len(p.sections), bucket(sum(state.ranks)), layer.weight.dtype)
        ways = Ways(versions, self._plan(layer, state, factors), factors, place)
        others = [(s, known) for s, known in self._plans.items() if s != state][-KEPT + 1 :]
        self._plans = {**dict(others), state: ways}
        return ways

    def _plan(self, layer: Layer, state: ProjectionState, factors: Any) -> ProjectionPlan | None:
        tensors = [t for t in (*layer._parameters.values(), *layer._buffers.values()) if t is not None]
        if not all(t.is_cpu and t.dtype == layer.weight.dtype for t in tensors):
            return None
        if state.method == "heads":
            return self._narrow_plan(layer, factors)
        (first, second, constants), sources = factors or (None, [], []), layer.factor_sources() if factors else []
        if state.method == "low-rank":
            return ProjectionPlan(first, second, torch.cat(constants), sources=sources) if factors else None
        weight, base = layer.matrix().T.detach(), (*constants, None)[0] if factors else layer.bias
        if not any(state.ranks):
            first, second = None, []
        if not weight.is_contiguous():
            sources = [*sources, weight]
            weight = self._turn(layer.weight, weight)
        return ProjectionPlan(first, second, base, weight, layer.channel_norms, state.threshold, sources=sources)

    def _narrow_plan(self, layer: Layer, factors: Any) -> ProjectionPlan:
        (weight, (places, *there), (bias,)), sources = factors, layer.factor_sources()
        if not there:
            return ProjectionPlan(None, [weight], bias, gather=places, width=layer.projection.inputs, sources=sources)
        base = bias[places] * there[0]
        return ProjectionPlan(weight, [], base, spread=or_none(places, there[0]), sources=sources)

    def _turn(self, owner: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """A contiguous copy, which all settings share."""
        known = self._turned
        if known is None or known[0] != identity(owner) or known[1].changed():
            known = self._turned = identity(owner), Watch([weight]), weight.contiguous()
        return known[2]


def _faster(layer: Layer, state: ProjectionState, known: Ways, x: torch.Tensor) -> bool:
    """Is the library faster than torch's products for projections of this kind and so many tokens?"""
    inputs = layer.projection.inputs
    tokens = x.numel() // inputs
    if tokens <= MOST[x.dtype, state.method]:
        return True
    taken = way_taken(known.place, tokens)
    if taken is None:
        ways = {"library": known.plan, "torch": partial(known.by_torch, layer, state)}
        taken = choose_way(known.place, ways, x.reshape(-1, inputs))
    return taken == "library"


def _few(layer: Layer, state: ProjectionState, weight: torch.Tensor, x: torch.Tensor) -> bool:
    """May and should the library do this? It has no gradients, and nobody can watch its steps."""
    if torch._C._functorch.peek_interpreter_stack() is not None or torch._C._len_torch_dispatch_stack():
        return False
    if torch.jit.is_tracing() or type(x) is not torch.Tensor or type(weight) is not torch.nn.Parameter:
        return False
    inputs, most = layer.projection.inputs, MOST.get((x.dtype, state.method), 0)
    most = TIMED if most and state.method != "channels" else most
    if x.dtype != weight.dtype or x.shape[-1:] != (inputs,) or not 0 < x.numel() <= most * inputs or not x.is_cpu:
        return False
    if state.method == "channels" and state.threshold <= 0:  # everything runs: the dense product, bit for bit
        return False
    if layer.observer is not None or not projects(x.dtype) or torch.is_autocast_enabled("cpu") or offloaded(layer):
        return False
    return not (torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in layer.parameters())))
