"""Figures as plots."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import UserError
from .tables import short_names

PLOT_SUFFIXES = (".png", ".svg", ".pdf")


def check_plot(path: str | Path) -> None:
    """Before any long work: can a plot be drawn?

    Raises:
        UserError: If matplotlib is missing or the file's suffix is none it knows.
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
    if metric in ("perplexity", "masked_lm"):
        axes.set_yscale("log")
    axes.set(xlabel="FLOPs of the whole model, relative to dense", ylabel=metric, title="dashed: dense")
    axes.grid(alpha=0.3)
    axes.legend()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
