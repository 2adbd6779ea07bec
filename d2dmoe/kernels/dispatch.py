"""Which way of computing a layer is faster. All give the same; they are timed once for each shape and machine."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from .decisions import Decisions

MODES = ("auto", "sparse")
ROUNDS = 5  # of timing, every way once in each
CLEAR = 1.5  # a way so many times as slow as another after the first round is out
MARGIN = 0.02  # skipping is left only for what is faster by more than this
Way = Callable[[torch.Tensor], torch.Tensor]
_MODE: ContextVar[str] = ContextVar("d2dmoe_dispatch", default=os.environ.get("D2DMOE_DISPATCH") or "auto")
_TAKEN: dict[tuple, str] = {}  # also those read from `_STORED`, whose keys take longer to make
_STORED = Decisions()


def automatic() -> bool:
    """May a layer compute everything, and zero what the gate skips, where skipping would take longer?"""
    return _MODE.get() == "auto"


@contextmanager
def dispatching(mode: str) -> Iterator[None]:
    """`sparse`: always skip what the gate skips, also where that is slower; `auto`: take the faster way.

    What is computed is the same up to rounding. The mode is that of the calling thread or task; `D2DMOE_DISPATCH` in
    the environment sets it from the start.
    """
    if mode not in MODES:
        raise ValueError(f"no mode {mode!r}; there are {', '.join(MODES)}")
    before = _MODE.set(mode)
    try:
        yield
    finally:
        _MODE.reset(before)


def bucket(tokens: int) -> int:
    """Numbers of tokens that share a decision: up to the same power of two."""
    return (tokens - 1).bit_length() if tokens > 0 else 0


def fastest(ways: Mapping[str, Way], x: torch.Tensor, clock: Callable[[], float] = time.perf_counter) -> str:
    """The name of the way with the least median time on `x`; the first one unless another is clearly faster.

    Args:
        ways: By name, the one to prefer first.
        x: Tokens ``(tokens, d_model)``.
        clock: Seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way(x)
    for _ in range(ROUNDS):
        for name, seconds in times.items():
            start = clock()
            ways[name](x)
            seconds.append(clock() - start)
        least = min(min(seconds) for seconds in times.values())
        times = {name: seconds for name, seconds in times.items() if min(seconds) <= CLEAR * least}
        if len(times) == 1:
            break
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    best, first = min(medians, key=lambda name: medians[name]), next(iter(ways))
    return first if first in medians and medians[first] <= (1 + MARGIN) * medians[best] else best


def choose_way(place: tuple, ways: Mapping[str, Way], x: torch.Tensor) -> str:
    """The name of the fastest way for layers of this kind and so many tokens and threads, timed when first met.

    The decision is kept for later processes on this machine; see `decisions`.
    """
    key = _key(place, len(x))
    taken = _TAKEN.get(key)
    if taken is None:
        taken = _STORED.get(repr(key))
        if taken not in ways:
            taken = fastest(ways, x)
            _STORED.put(repr(key), taken)
        _TAKEN[key] = taken
    return taken


def way_taken(place: tuple, tokens: int) -> str | None:
    """What `choose_way` has chosen; `None` before it has."""
    return _TAKEN.get(_key(place, tokens))


def forget_ways() -> None:
    """Time them again, here and in later processes."""
    _TAKEN.clear()
    _STORED.clear()


def _key(place: tuple, tokens: int) -> tuple:
    return (*place, bucket(tokens), torch.get_num_threads())
