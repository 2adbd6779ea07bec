"""Walk through a model module by module, all batches in step: what was passed may change what comes after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import nn

from ..data.batches import Batches
from ..moe.gating import set_gate
from .layer_inputs import Spill
from .observe import EnoughSeen, model_inputs, pieces, real_rows, trunk
from .replay import giving, innermost_parts, mapped

KEPT = 128 * 2**20  # bytes kept in memory
Rows = tuple[torch.Tensor, torch.Tensor]


class Walk:
    """What modules read and write, one module after the other in the order in which the model runs them.

    Whoever asks for a module meets it with everything before it as it is by then. The parts that a model repeats
    (elements of a `ModuleList`) run once or twice on the way, whatever the number of modules: what a part gave that has
    been passed is kept, and given again. That this changes nothing is checked on the first piece of the batches; where
    it does, everything before a module runs again for each.

    Args:
        model: Converted model.
        batches: Calibration batches.
        modules: Those that will be asked for. They share nothing and pass nothing on but their outputs.
        gate: Arguments of `set_gate` for the walk.
        folder: Where a file may hold what is kept.
        memory: Bytes kept in memory, by default and at most `KEPT`.

    Attributes:
        order: Those of `modules` that run once in a forward pass, in this order.
    """

    def __init__(
        self, model: nn.Module, batches: Batches, modules: Sequence[nn.Module], gate: dict[str, Any],
        folder: Path | None = None, memory: int | None = None,
    ):  # fmt: skip
        self.model, self.gate, self.folder = model, gate, folder
        self._pieces, self._left = list(pieces(batches)), KEPT if memory is None else min(memory, KEPT)
        self._parts = dict(zip(modules, innermost_parts(model, modules), strict=True))
        self._kept: list[dict[nn.Module, Any]] = [{} for _ in self._pieces]  # of each piece, what parts gave
        self._spill: Spill | None = None
        self._trusted: bool | None = None
        counts = self._count([*modules, *{part: None for part in self._parts.values() if part is not None}])
        self.order = [module for module in counts if module in self._parts and counts[module] == 1]
        self._once = {module for module, count in counts.items() if count == 1}

    def at(self, module: nn.Module) -> Iterator[Rows]:
        """Its input ``(rows, width)`` and output ``(rows, width)`` piece by piece, padding left out."""
        for number in range(len(self._pieces)):
            yield self._met(number, module)

    def _count(self, modules: Sequence[nn.Module]) -> dict[nn.Module, int]:
        """How often each runs in a forward pass, in the order in which they begin."""
        counts: dict[nn.Module, int] = {}

        def begin(module: nn.Module, _: Any) -> None:
            counts[module] = counts.get(module, 0) + 1

        handles = [module.register_forward_pre_hook(begin) for module in modules]
        try:
            self._forward({k: v[:1] for k, v in self._pieces[0].items()})
        finally:
            for handle in handles:
                handle.remove()
        return counts

    @torch.no_grad()
    def _forward(self, piece: dict[str, Any]) -> None:
        with set_gate(self.model, **self.gate), suppress(EnoughSeen):
            trunk(self.model)(**model_inputs(self.model, piece))

    def _met(self, number: int, module: nn.Module) -> Rows:
        kept = self._kept[number]
        if kept and self._trusted is None:
            self._trusted = True
            without = self._run(number, module, {})
            self._trusted = all(map(torch.equal, without, self._run(number, module, kept)))
        if not self._trusted:
            kept = {}
        found = self._run(number, module, kept, keep=self._trusted is not False)
        wanted = real_rows(self._pieces[number].get("attention_mask"), len(found[0]))
        return found if wanted is None else (found[0][wanted], found[1][wanted])

    def _run(self, number: int, module: nn.Module, given: dict[nn.Module, Any], *, keep: bool = False) -> Rows:
        """The forward pass of a piece up to this module, with the outputs of some parts given."""
        found: list[torch.Tensor] = []

        def end(part: nn.Module, _: Any, output: Any) -> None:
            value = mapped(output, self._stored)
            if self._trusted is not False:
                self._kept[number][part] = value

        def reached(_: nn.Module, args: Any, kwargs: dict[str, Any], output: torch.Tensor) -> None:
            read = args[0] if args else next(iter(kwargs.values()))
            found.extend(t.detach().reshape(-1, t.shape[-1]) for t in (read, output))
            raise EnoughSeen

        own = self._parts[module]
        new = {*self._parts.values()} - {None, own, *given} if keep else set()
        with ExitStack() as stack:
            for part, output in given.items():
                stack.enter_context(giving(part, mapped(output, lambda read: read(), FunctionType)))
            for part in new & self._once:
                stack.callback(part.register_forward_hook(end).remove)
            stack.callback(module.register_forward_hook(reached, with_kwargs=True).remove)
            self._forward(self._pieces[number])
        return found[0], found[1]

    def _stored(self, value: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Keep a tensor in memory, or in a file where there is one; where neither has room, nothing is kept."""
        self._left -= value.nbytes
        if self._left >= 0:
            value = value.detach().clone()
            return lambda: value
        if self._spill is None:
            needed = value.nbytes * len(self._pieces) * len({*self._parts.values()})  # parts are alike
            self._spill = Spill.where_room(self.folder, needed)
        if self._spill is None:
            self._trusted = False
            for kept in self._kept:
                kept.clear()
            return lambda: value
        return self._spill.write(value)
