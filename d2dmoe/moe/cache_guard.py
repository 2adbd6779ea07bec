"""Narrow heads have another basis than the dense model's: what else writes there has to have the same one.

A key-value cache belongs to the heads that filled it, and an adapter around a projection adds to its outputs as they
are in the dense model. Neither is told that heads are narrow, so both are watched.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..config.projections import HEAD, ProjectionState
from ..errors import UserError
from .gate import Gates
from .projection import DynamicProjection, projections

MARK = "_d2dmoe_narrow"  # of a cache: which heads were narrow, or `None` where somebody has seen to it
CACHE = "past_key_values"


class Guard:
    """Refuses a cache in which other heads are narrow than are now, and an adapter around narrow ones.

    Budgets that narrow the same heads can take turns with a cache.

    Args:
        model: Whose modules the projections are.
        layers: The projections that can be narrow.
    """

    def __init__(self, model: nn.Module, layers: list[DynamicProjection]):
        self.layers = [layer for layer in layers if layer.projection.role != "o"]  # a cache holds these, or meets them
        self.places = [(layer, *_place(model, layer)) for layer in layers]
        self._known: dict[tuple[int, Gates], Any] = {}

    def before(self, _: nn.Module, args: tuple, given: dict[str, Any]) -> None:
        """Hook of a model.

        Raises:
            UserError: If the cache, or an adapter, does not fit.
        """
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return
        for layer, parent, name in self.places:
            outer = parent._modules.get(name)
            if outer is not layer and _adapts(outer) and any(map(any, self._of(layer))):
                raise UserError(
                    f"an adapter is around {layer.projection.name}, whose heads are narrow at this budget: it would "
                    f"act in another basis than in the dense model; leave attention out of its target_modules, run at "
                    f"a budget without narrow heads (active=1), merge it, or convert with --attention low-rank"
                )
        cache = _cache_in((given.get(CACHE), *args))
        if cache is None or cache.get_seq_length() == 0:
            return
        mark = getattr(cache, MARK) if hasattr(cache, MARK) else tuple(map(_dense, self.layers))
        if mark is not None and mark != self._now():
            raise UserError(
                "this key-value cache was filled at another budget, at which other attention heads are narrow, or by "
                "another model: keys and queries would not be in one basis; start with an empty cache, or convert with "
                "--attention low-rank"
            )

    def after(self, _: nn.Module, args: tuple, given: dict[str, Any], output: Any) -> None:
        """Hook of a model: mark its cache."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return
        found = output if isinstance(output, tuple) else (getattr(output, CACHE, None),)
        cache = _cache_in((*found, given.get(CACHE), *args))
        if cache is not None:
            setattr(cache, MARK, self._now())

    def _now(self) -> tuple:
        """Which heads are narrow, layer by layer, at the budgets of the rows."""
        return tuple(map(self._of, self.layers))

    def _of(self, layer: DynamicProjection) -> tuple[tuple[bool, ...], ...]:
        state = layer.gate.in_force(layer)
        key = (layer.number, state)
        if key not in self._known:
            own = state if isinstance(state, tuple) else (state,)
            self._known[key] = tuple(dict.fromkeys(_narrow(layer, s) for s in own))
        return self._known[key]


def _narrow(layer: DynamicProjection, state: ProjectionState) -> tuple[bool, ...]:
    widths = layer.projection.head_widths
    kept = state.ranks if state.method == "heads" else widths
    return tuple(width < full for width, full in zip(kept, widths, strict=True))


def _dense(layer: DynamicProjection) -> tuple[tuple[bool, ...], ...]:
    return ((False,) * len(layer.projection.head_widths),)


def _place(model: nn.Module, layer: DynamicProjection) -> tuple[nn.Module, str]:
    path, _, name = layer.projection.name.rpartition(".")
    return model.get_submodule(path), name


def _adapts(outer: nn.Module | None) -> bool:
    """Whether this adds something to a layer within it, as peft's adapters do while they are on."""
    if not hasattr(outer, "base_layer") or getattr(outer, "disable_adapters", False) or getattr(outer, "merged", False):
        return False
    return bool(getattr(outer, "active_adapters", True))


def _cache_in(values: Iterable[Any]) -> Any:
    return next((value for value in values if hasattr(value, "get_seq_length")), None)


def trust(cache: Any) -> None:
    """Take a cache that was put together from keys and values of the same budget."""
    setattr(cache, MARK, None)


def guard_narrow_heads(model: nn.Module) -> None:
    """Watch caches and adapters of a model, where heads can be narrow in it."""
    layers = [x for x in projections(model) if x.projection.heads and x.projection.role != HEAD]
    if layers:
        guard = Guard(model, layers)
        # peft calls the inner model, and so does whoever fills a cache with it
        for watched in {id(m): m for m in (model, getattr(model, "base_model", model))}.values():
            watched.register_forward_pre_hook(guard.before, with_kwargs=True)
            watched.register_forward_hook(guard.after, with_kwargs=True)
