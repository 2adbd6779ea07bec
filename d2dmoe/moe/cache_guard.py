"""A key-value cache belongs to the heads that filled it: narrower ones have another basis than the dense model's."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..config.projections import ProjectionState
from ..errors import UserError
from .gate import Gates
from .projection import DynamicProjection, projections

MARK = "_d2dmoe_narrow"  # of a cache: which heads were narrow
CACHE = "past_key_values"


class CacheGuard:
    """Refuses a cache in which other heads are narrow than are now. Budgets that narrow the same heads can take turns.

    Args:
        layers: The projections whose outputs a cache holds, or that meet it.
    """

    def __init__(self, layers: list[DynamicProjection]):
        self.layers = layers
        self._known: dict[tuple[int, Gates], Any] = {}

    def before(self, _: nn.Module, args: Any, given: dict[str, Any]) -> None:
        """Hook of a model.

        Raises:
            UserError: If the cache does not fit.
        """
        cache = given.get(CACHE)
        if cache is None or torch.compiler.is_compiling():
            return
        mark = getattr(cache, MARK, None)
        if mark is not None and mark != self._now() and cache.get_seq_length() > 0:
            raise UserError(
                "this key-value cache was filled at another budget, at which other attention heads are narrow: keys "
                "and queries would not be in one basis; start with an empty cache, or convert with --attention low-rank"
            )

    def after(self, _: nn.Module, args: Any, output: Any) -> None:
        """Hook of a model: mark its cache."""
        cache = getattr(output, CACHE, None)
        if cache is not None and not torch.compiler.is_compiling() and hasattr(cache, "get_seq_length"):
            setattr(cache, MARK, self._now())

    def _now(self) -> tuple:
        """Which heads are narrow, layer by layer."""
        found = []
        for n, layer in enumerate(self.layers):
            state = layer.gate.in_force(layer)
            if (n, state) not in self._known:
                own = state if isinstance(state, tuple) else (state,)
                self._known[n, state] = tuple(dict.fromkeys(_narrow(layer, s) for s in own))
            found.append(self._known[n, state])
        return tuple(found)


def _narrow(layer: DynamicProjection, state: ProjectionState) -> tuple[bool, ...]:
    widths = layer.projection.head_widths
    kept = state.ranks if state.method == "heads" else widths
    return tuple(width < full for width, full in zip(kept, widths, strict=True))


def guard_cache(model: nn.Module) -> None:
    """Watch the caches of a model, where heads can be narrow in it."""
    layers = [x for x in projections(model) if x.projection.heads and x.projection.role != "o"]
    if layers:
        guard = CacheGuard(layers)
        model.register_forward_pre_hook(guard.before, with_kwargs=True)
        model.register_forward_hook(guard.after)
