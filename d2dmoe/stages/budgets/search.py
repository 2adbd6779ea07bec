"""Where a rising function reaches a value, in few tries."""

from __future__ import annotations

from collections.abc import Callable

SEARCH_STEPS = 8
SEARCH_TOLERANCE = 0.005  # relative


def bisect(
    measure: Callable[[float], float], target: float, *, low: float, high: float, start: float,
    steps: int = SEARCH_STEPS, tolerance: float = SEARCH_TOLERANCE, slope: float = 1.0,
) -> tuple[float, float]:  # fmt: skip
    """Argument at which a rising function reaches `target`, within a relative tolerance; the best of the points tried.

    Args:
        measure: The function.
        target: Its value wanted.
        low, high: Where the argument lies.
        start: First argument tried.
        steps: Most arguments tried.
        tolerance: Relative to the target.
        slope: First guess; corrected by what is measured.
    """
    point, best = start, (start, float("inf"))
    before: tuple[float, float] | None = None
    for _ in range(steps):
        value = measure(point)
        if abs(value - target) <= abs(best[1] - target):
            best = (point, value)
        if abs(value - target) <= tolerance * abs(target):
            break
        low, high = (point, high) if value < target else (low, point)
        if before is not None and point != before[0]:
            slope = (value - before[1]) / (point - before[0])
        before = (point, value)
        step = point + (target - value) / slope if slope > 0 else low
        point = step if low < step < high else (low + high) / 2
    return best
