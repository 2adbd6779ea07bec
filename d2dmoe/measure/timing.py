"""Comparable times: the columns take turns, round by round, so that a disturbance hits all of them.

A figure is a median with its quartiles. The inputs change from call to call: with equal inputs the few experts of a
token would stay in the cache.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Function = Callable[[Any], Any]
PLAIN = ("eager", "compiled", "frozen", "sparse", "grouped_mm", "loop")  # the speed-up of other columns stands in a row
CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time, "process": time.process_time}


def measure(
    functions: dict[str, Function], inputs: list[Any], *, seconds: float, clock: str = "wall"
) -> dict[str, list[float]]:
    """Milliseconds of every call; each function gets about `seconds`, at least five calls, in rounds of a few.

    The clock `cpu` counts the time that the calling thread has run, `process` that of all threads. They suit one thread
    on a machine that is shared.
    """
    now = CLOCKS[clock]
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        for x in inputs[:2]:
            function(x)
    fastest = min(_timed(function, inputs[0], now) for function in functions.values())
    burst = max(1, min(20, int(2.0 / fastest)))  # calls in a row, so that threads are awake and caches are warm
    turn, started = 0, time.perf_counter()
    while turn < 5 or time.perf_counter() - started < seconds * len(functions):
        for name, function in functions.items():
            function(inputs[turn % len(inputs)])
            for i in range(burst):
                times[name].append(_timed(function, inputs[(turn + i) % len(inputs)], now))
        turn += 1
    return times


def _timed(function: Function, x: Any, now: Callable[[], float]) -> float:
    start = now()
    function(x)
    return 1000 * (now() - start)


def row(
    times: dict[str, list[float]], *, dtype: torch.dtype, phase: str, tokens: int, active: float, backend: str
) -> dict[str, Any]:
    """One row of the command contract; `dense_ms` is the faster of eager and compiled."""
    median = {name: statistics.median(values) for name, values in times.items()}
    dense = min(median[name] for name in ("eager", "compiled") if name in median)
    quartiles = {name: [round(q, 4) for q in statistics.quantiles(v, n=4)[::2]] for name, v in times.items()}
    return {
        "device": "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "phase": phase,
        "tokens": tokens,
        "active_fraction": active,
        "backend": backend,
        "dense_ms": dense,
        "sparse_ms": median["sparse"],
        "speedup": dense / median["sparse"],
        **{f"{name}_speedup": dense / median[name] for name in median if name not in PLAIN},
        "ideal": 1 / active,
        "ms": median,
        "quartiles_ms": quartiles,
        "fastest_ms": {name: min(values) for name, values in times.items()},
        "threads": torch.get_num_threads(),
    }
