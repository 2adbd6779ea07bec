"""Where the time of a forward pass goes: feed-forward blocks, other linear maps, the head, everything else."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..config.record import Block
from ..moe.layer import DynamicFFN
from .timing import CLOCKS, Function

BLOCKS, MAPS, HEAD, REST = PARTS = ("blocks", "linear maps", "head", "everything else")
CALLS = 5  # timed passes, at least
Modules = dict[str, list[nn.Module]]


def parts_of(model: nn.Module, blocks: Sequence[Block]) -> Modules:
    """The modules of each part but the last; none of them lies inside another.

    Args:
        model: Converted, or the dense model that it was made from.
        blocks: Of the record. In a dense model a block that is spread over several modules is its linear maps and its
            activation.
    """
    known = dict(model.named_modules())
    found: Modules = {BLOCKS: [], MAPS: [], HEAD: []}
    for block in blocks:
        found[MAPS if block.role else BLOCKS] += [known[name] for name in _places(block, known)]
    inside = {id(m) for part in found.values() for place in part for m in place.modules()}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for module in known.values():
        if isinstance(module, (nn.Linear, Conv1D)) and id(module) not in inside:
            found[HEAD if module is head else MAPS].append(module)
    return found


def _places(block: Block, known: dict[str, nn.Module]) -> list[str]:
    """Where a block's work is done."""
    if isinstance(known[block.name], DynamicFFN) or not block.passed_through:
        return [block.name]
    maps = [name for name in (block.gate, block.up, block.down, block.activation_module) if name]
    return list(dict.fromkeys(maps))


def time_parts(
    model: nn.Module, blocks: Sequence[Block], function: Function, inputs: Sequence[Any], *, seconds: float,
    clock: str = "wall",
) -> dict[str, float]:  # fmt: skip
    """Milliseconds of each part of a forward pass, medians over the calls; hooks add some microseconds a module.

    Args:
        model: What `function` runs.
        blocks: See `parts_of`.
        function: One forward pass.
        inputs: Its arguments, taken in turn.
        seconds: For all calls together.
        clock: As of `timing.measure`.
    """
    now, rounds = CLOCKS[clock], []
    started = now()
    with _timed(parts_of(model, blocks), now) as spent:
        for x in inputs[:2]:
            function(x)
        while len(rounds) < CALLS or now() - started < seconds:
            spent.update(dict.fromkeys(spent, 0.0))
            begin = now()
            function(inputs[len(rounds) % len(inputs)])
            whole = now() - begin
            rounds.append({**spent, REST: whole - sum(spent.values())})
    return {part: 1000 * statistics.median(each[part] for each in rounds) for part in PARTS}


@contextmanager
def _timed(modules: Modules, now: Callable[[], float]) -> Iterator[dict[str, float]]:
    """Seconds that calls of the modules of each part have taken, added up."""
    spent, begun = dict.fromkeys(modules, 0.0), [0.0]

    def start(*_: Any) -> None:
        begun[0] = now()

    def stop(part: str) -> Callable[..., None]:
        def add(*_: Any) -> None:
            spent[part] += now() - begun[0]

        return add

    handles = [
        handle
        for part, members in modules.items()
        for module in members
        for handle in (module.register_forward_pre_hook(start), module.register_forward_hook(stop(part)))
    ]
    try:
        yield spent
    finally:
        for handle in handles:
            handle.remove()
