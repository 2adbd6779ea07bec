"""Whether skipping pays: each way of computing a layer is timed once, on the tokens it first meets."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

MODES = ("auto", "sparse")
ROUNDS = 5  # of timing, every way once in each
CLEAR = 1.5  # a way so many times as slow as another after the first round is out
MARGIN = 0.02  # skipping is left only for what is faster by more than this
Way = Callable[[torch.Tensor], torch.Tensor]
_mode = os.environ.get("D2DMOE_DISPATCH") or "auto"


def automatic() -> bool:
    """May a layer run everything where skipping would take longer?"""
    return _mode == "auto"


@contextmanager
def dispatching(mode: str) -> Iterator[None]:
    """`sparse`: skip whatever the gate skips, also where that is slower; `auto`: take the fastest way.

    A layer that runs everything because that is faster is exactly the dense one, so with `auto` what a model computes
    can depend on the number of tokens at once, the threads and the machine. Whatever measures quality uses `sparse`.
    `D2DMOE_DISPATCH` in the environment sets the mode from the start.
    """
    global _mode
    if mode not in MODES:
        raise ValueError(f"no mode {mode!r}; there are {', '.join(MODES)}")
    before, _mode = _mode, mode
    try:
        yield
    finally:
        _mode = before


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
