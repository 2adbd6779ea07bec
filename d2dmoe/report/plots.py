"""Figures as plots."""

from __future__ import annotations

import statistics
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import UserError
from .tables import short_names

PLOT_SUFFIXES = (".png", ".svg", ".pdf")
LOG_METRICS = ("perplexity", "masked_lm")  # spread over powers of ten when much is skipped


def check_plot(path: str | Path) -> None:
    """Check, before any long work, that a plot can be drawn.

    Raises:
        UserError: If matplotlib is missing, or the file's suffix is not one that matplotlib writes.
    """
    if find_spec("matplotlib") is None:
        raise UserError(f"--plot {path}: matplotlib is not installed; pip install 'd2dmoe-toolkit[plot]'")
    if Path(path).suffix not in PLOT_SUFFIXES:
        raise UserError(f"--plot {path}: the name must end in one of {', '.join(PLOT_SUFFIXES)}")


def plot_curves(rows: list[dict[str, Any]], path: str | Path) -> None:
    """Draw quality against the whole-model FLOPs fraction: a line per model, its dense quality dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for model, name in short_names(list(dict.fromkeys(row["model"] for row in rows))).items():
        mine = [row for row in rows if row["model"] == model]
        points = sorted((row["flops_fraction_model"], row["metric"]["value"]) for row in mine)
        (line,) = axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.axhline(mine[0]["dense"]["value"], color=line.get_color(), linestyle="--", linewidth=1)
    metric = rows[0]["metric"]["name"]
    set_scale(axes, metric)
    axes.set(xlabel="FLOPs of the whole model, relative to dense", ylabel=metric, title="dashed: dense")
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def set_scale(axes: Any, metric: str | None) -> None:
    """A logarithmic axis for one of `LOG_METRICS` whose values lie far apart."""
    values = [value for line in axes.lines for value in line.get_ydata()]
    if metric in LOG_METRICS and max(values) > 4 * min(values) > 0:
        axes.set_yscale("log")


def plot_times(rows: list[dict[str, Any]], path: str | Path) -> None:
    """Draw recorded quality against measured time: a panel per phase and batch, a point per budget, dense as a star.

    Args:
        rows: Rows of `bench_model`, each with the `metric` and the `dense` value that the conversion recorded.
        path: File to write.
    """
    from matplotlib.figure import Figure

    panels: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["active_fraction"]):
        panels.setdefault((row["phase"], row["batch"], row["context"]), []).append(row)
    figure = Figure(figsize=(max(5.0, 3.5 * len(panels)), 3.5), layout="constrained")
    every = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, ((phase, batch, length), mine) in zip(every, panels.items(), strict=True):
        points = [(row["sparse_ms"], row["metric"]["value"]) for row in mine]
        dense_ms = statistics.median(row["dense_ms"] for row in mine)  # timed anew beside every budget
        axes.plot(*zip(*points, strict=True), "o-", label="converted, by active fraction")
        axes.plot([dense_ms], [mine[0]["dense"]["value"]], "k*", markersize=11, label="dense")
        for row, point in zip(mine, points, strict=True):
            axes.annotate(f"{row['active']:.0%}", point, xytext=(7, 3), textcoords="offset points")
        tokens = f"{length} tokens" if phase == "prefill" else "1 token"
        axes.set(xlabel="measured time, ms", title=f"{phase}, {batch} × {tokens}")
        axes.set_xlim(0, 1.15 * max(dense_ms, *(time for time, _ in points)))
        axes.margins(y=0.12)
        axes.grid(alpha=0.3)
    every[0].set_ylabel(rows[0]["metric"]["name"])
    figure.legend(*every[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    _save(figure, path)


def _save(figure: Any, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
