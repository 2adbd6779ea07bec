"""Repeat a forward pass from one converted layer on, where nothing before it has changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import nn

from ..moe.layer import layers


class Replay:
    """One forward pass of a converted model, which can be repeated with some converted layer changed.

    The parts that a model repeats (elements of a `ModuleList`) and that end before the changed layer's own part begins
    give again what they gave in the first pass. Memory: one output of each such part.

    The first repetition checks that the same pass gives the same output, bit for bit. Where it does not (a part passes
    something on by another way than its output), every repetition runs the whole model.

    Args:
        model: Converted model; its gate is that of the first pass.
        changing: The modules of which one changes at a time; by default the converted layers.
    """

    def __init__(self, model: nn.Module, changing: Sequence[nn.Module] | None = None):
        self.model = model
        self._parts = innermost_parts(model, layers(model) if changing is None else changing)
        self._trusted: bool | None = None
        self._order: list[tuple[str, nn.Module]] = []  # ("begin" | "end", part), as the first pass met them
        self._outputs: dict[nn.Module, Any] = {}
        self._inputs: dict[str, Any] = {}

    def first(self, inputs: dict[str, Any]) -> Any:
        """The forward pass itself; what it gives is the model's output."""
        self._order, self._outputs, self._inputs = [], {}, inputs

        def begin(part: nn.Module, _: Any) -> None:
            self._order.append(("begin", part))

        def end(part: nn.Module, _: Any, output: Any) -> None:
            self._order.append(("end", part))
            self._outputs[part] = _copied(output)

        parts = {*self._parts} - {None}
        handles = [part.register_forward_pre_hook(begin) for part in parts]
        handles += [part.register_forward_hook(end) for part in parts]
        try:
            output = self.model(**inputs)
        finally:
            for handle in handles:
                handle.remove()
        if self._trusted is None:
            self._trusted = self._same(output)
        return output

    def again(self, index: int) -> Any:
        """The model's output for the inputs of `first`, when nothing but module `index` has changed."""
        kept = self._before(index) if self._trusted else []
        with ExitStack() as stack:
            for part in kept:
                stack.enter_context(giving(part, self._outputs[part]))
            return self.model(**self._inputs)

    def _before(self, index: int) -> list[nn.Module]:
        """Parts that run once, and end before the part of this layer begins."""
        own = self._parts[index]
        if own is None or ("begin", own) not in self._order:
            return []
        start = self._order.index(("begin", own))
        ended = [part for what, part in self._order[:start] if what == "end"]
        return [part for part in ended if self._order.count(("end", part)) == 1]

    def _same(self, output: Any) -> bool:
        """Whether a repetition from the last part on gives this output."""
        last = max(range(len(self._parts)), key=lambda index: len(self._before(index)), default=None)
        if last is None or not self._before(last):
            return False
        self._trusted = True
        with suppress(Exception):  # whatever a model does not bear: then the whole of it runs
            pairs = list(zip(_tensors(output), _tensors(self.again(last)), strict=True))
            return all(torch.equal(a, b) for a, b in pairs)
        return False


def innermost_parts(model: nn.Module, changing: Sequence[nn.Module]) -> list[nn.Module | None]:
    """For every module the innermost element of a `ModuleList` that holds it; `None` if there is none."""
    elements = [part for module in model.modules() if isinstance(module, nn.ModuleList) for part in module]
    holders: dict[nn.Module, nn.Module] = {}
    for part in elements:  # outer ones come first
        holders.update(dict.fromkeys(part.modules(), part))
    return [holders.get(module) for module in changing]


@contextmanager
def giving(part: nn.Module, output: Any) -> Iterator[None]:
    """Inside, the part computes nothing and gives this output."""
    before = part.__dict__.get("forward")
    part.forward = lambda *args, **kwargs: _copied(output)
    try:
        yield
    finally:
        del part.forward
        if before is not None:
            part.forward = before


def mapped(value: Any, change: Callable[[Any], Any], kind: type = torch.Tensor) -> Any:
    """What a part gives, with `change` made to everything of this kind in it."""
    if isinstance(value, kind):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(mapped(item, change, kind) for item in value)
    return value


def _copied(output: Any) -> Any:
    """Tensors that nobody changes in place."""
    return mapped(output, torch.clone)


def _tensors(output: Any) -> list[torch.Tensor]:
    """The floating-point results of a pass, caches left out."""
    return [v for v in output.values() if isinstance(v, torch.Tensor) and v.is_floating_point()]
