"""The figures of a report, drawn by matplotlib: as SVG that takes the colours of the page, and as PNG files."""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .conversions import Conversion, percent
from .plots import set_scale
from .tables import short_names

INK = "#2a2c31"  # text and axes: readable as it is in a PNG, replaced by the page's text colour in an SVG
COLOURS = ("#3f7fd0", "#d9722e", "#2f9e78", "#b357b8", "#b08a1e", "#c9485b")  # readable on white and on black
SETTINGS = {
    "font.size": 10, "font.family": "DejaVu Sans", "svg.fonttype": "none",
    "svg.hashsalt": "d2dmoe", "text.parse_math": False, "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.titlesize": 10, "axes.spines.top": False,
    "axes.spines.right": False, "figure.facecolor": "none", "axes.facecolor": "none", "legend.frameon": False,
    "savefig.facecolor": "none", "legend.fontsize": 9, "image.cmap": "viridis",
}  # fmt: skip
SIZE = (4.8, 3.2)  # inches: what a phone shows without making the letters too small
Figure = Any  # matplotlib's
DENSE = "dense"


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def draw(conversions: list[Conversion]) -> Iterator[tuple[str, str, Figure]]:
    """Every figure that these conversions have the numbers for: its file name, what it shows, and the figure."""
    plans: list[tuple[str, str, Callable[[], Figure]]] = []
    if conversions[0].metric:
        plans.append(("quality-flops", f"{conversions[0].metric} against whole-model FLOPs",
                      lambda: quality_against_flops(conversions)))  # fmt: skip
        if any(c.times for c in conversions):
            plans.append(("quality-time", f"{conversions[0].metric} against measured time",
                          lambda: quality_against_time(conversions)))  # fmt: skip
    if len(conversions) == 1 and conversions[0].usage and conversions[0].usage["budgets"]:
        plans += _usage_plans(conversions[0].usage)
    for name, title, make in plans:
        with _drawing():
            figure = make()
        yield name, title, figure


@contextmanager
def _drawing() -> Iterator[None]:
    """The style, without notes on letters that the font lacks."""
    from matplotlib import rc_context

    with rc_context(SETTINGS), warnings.catch_warnings(action="ignore", category=UserWarning):
        yield


def _usage_plans(usage: dict[str, Any]) -> Iterator[tuple[str, str, Callable[[], Figure]]]:
    yield "layers", "Active fraction of each layer", lambda: compute_by_layer(usage)
    for budget in usage["budgets"]:
        share = percent(budget["active"])
        ending = share.removesuffix(" %")
        yield f"experts-{ending}", f"Experts used at budget {share}", lambda b=budget: experts_used(b)
        yield f"k-{ending}", f"Experts per token at budget {share}", lambda b=budget: experts_per_token(b)
    for number, sample in enumerate(usage["samples"]):
        if "png" in sample:
            yield (f"image-{number + 1}", f"Share of experts over the patches of image {number + 1}",
                   lambda s=sample: patches(s))  # fmt: skip


def _axes(**words: str) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE)
    axes = figure.add_axes((0.15, 0.15, 0.82, 0.82))
    axes.set(**words)
    return figure, axes


def quality_against_flops(conversions: list[Conversion]) -> Figure:
    """A line per conversion through its budgets, and the dense model as a star where its FLOPs are 1."""
    metric = conversions[0].metric
    figure, axes = _axes(xlabel="FLOPs of the whole model, relative to dense", ylabel=metric)
    for colour, (conversion, label) in zip(_colours(), labels(conversions), strict=False):
        points = sorted((row["flops_fraction_model"], row["metric"]["value"]) for row in conversion.rows)
        axes.plot(*zip(*points, strict=True), marker="o", markersize=5, color=colour, label=label)
        axes.plot([1.0], [conversion.rows[0]["dense"]["value"]], "*", color=INK, markersize=11, zorder=3)
    axes.plot([], [], "*", color=INK, markersize=9, label=DENSE)
    _finish(axes, metric)
    return figure


def quality_against_time(conversions: list[Conversion]) -> Figure:
    """Recorded quality against measured time, as a share of the dense model's time: a line per phase and batch."""
    metric = conversions[0].metric
    figure, axes = _axes(xlabel="measured time, relative to dense", ylabel=metric)
    colours = _colours()
    for conversion, label in labels(conversions):
        quality = {row.get("active", 1.0): row["metric"]["value"] for row in conversion.rows}
        for panel, rows in panels(conversion.times).items():
            known = [row for row in rows if row["active"] in quality]
            known.sort(key=lambda row: row["active"])
            points = [(row["sparse_ms"] / row["dense_ms"], quality[row["active"]]) for row in known]
            if points:
                name = f"{label}, {panel}" if len(conversions) > 1 else panel
                axes.plot(*zip(*points, strict=True), marker="o", markersize=5, color=next(colours), label=name)
                axes.plot([1.0], [conversion.rows[0]["dense"]["value"]], "*", color=INK, markersize=11, zorder=3)
    axes.plot([], [], "*", color=INK, markersize=9, label=DENSE)
    axes.set_xlim(left=0)
    axes.set_position((0.15, 0.34, 0.82, 0.63))
    _finish(axes, metric, loc="upper center", bbox_to_anchor=(0.45, -0.22), ncols=1 + (len(conversions) == 1))
    return figure


def panels(times: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows of `bench` by what was timed."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in times:
        tokens = f"{row['context']} tokens" if row["phase"] == "prefill" else "1 token"
        found.setdefault(f"{row['phase']}, {row['batch']} × {tokens}", []).append(row)
    return found


def compute_by_layer(usage: dict[str, Any]) -> Figure:
    """Active fraction of each layer, a line per budget."""
    figure, axes = _axes(xlabel="layer", ylabel="active fraction")
    for colour, budget in zip(_colours(), usage["budgets"], strict=False):
        points = [(n, layer["active"]) for n, layer in enumerate(budget["layers"]) if "active" in layer]
        label = f"{percent(budget['active'])} overall"
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=colour, label=label)
    axes.set_ylim(0, 1.02)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _finish(axes, None)
    return figure


def experts_used(budget: dict[str, Any]) -> Figure:
    """Heat map: the share of tokens that run each expert; within a layer the experts stand by their use."""
    import numpy as np

    layers = budget["layers"]
    shares = np.full((len(layers), max(layer["experts"] for layer in layers)), np.nan)
    for number, layer in enumerate(layers):
        used = sorted(layer.get("usage", []), reverse=True)
        shares[number, : len(used)] = used
    figure, axes = _axes(xlabel="experts of the layer, by use", ylabel="layer")
    _heat(figure, axes, shares, "share of tokens", 1.0)
    return figure


def experts_per_token(budget: dict[str, Any]) -> Figure:
    """Heat map: the distribution of the number of experts per token, layer by layer."""
    import numpy as np

    layers = budget["layers"]
    step = max(layer.get("k_step", 1) for layer in layers)
    rows = [np.asarray(layer.get("k", [0]), dtype=float) for layer in layers]
    rows = [row / max(row.sum(), 1) for row in rows]
    shares = np.zeros((len(layers), max(map(len, rows))))
    for number, row in enumerate(rows):
        shares[number, : len(row)] = row
    figure, axes = _axes(xlabel="k: experts that run for a token", ylabel="layer")
    same = len({(layer["experts"], layer.get("k_step", step)) for layer in layers}) == 1
    if not same:
        axes.set_xlabel("k, in steps of each layer")
    _heat(figure, axes, shares, "share of tokens", None, step if same else 1)
    return figure


def _heat(figure: Figure, axes: Any, shares: Any, label: str, most: float | None, step: int = 1) -> None:
    """A heat map ``(layers, columns)`` of shares, with its colour bar."""
    rows, columns = shares.shape
    extent = (-0.5 * step, (columns - 0.5) * step, rows - 0.5, -0.5)
    drawn = axes.imshow(shares, aspect="auto", interpolation="nearest", vmin=0, vmax=most, extent=extent)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.xaxis.get_major_locator().set_params(integer=True)
    left, bottom, _, height = axes.get_position().bounds
    axes.set_position((left - 0.03, bottom, 0.7, height))
    bar = figure.colorbar(drawn, cax=figure.add_axes((left + 0.69, bottom, 0.03, height)), label=label)
    bar.outline.set_visible(False)


def patches(sample: dict[str, Any]) -> Figure:
    """An image, and over it the share of experts that each patch runs, a panel per budget."""
    import matplotlib.image
    from matplotlib.figure import Figure

    image = matplotlib.image.imread(io.BytesIO(base64.b64decode(sample["png"])))
    grey = image[..., :3].mean(-1)  # colours are those of the shares
    figure = Figure(figsize=(4.8, 2.0))
    every = figure.subplots(1, 1 + len(sample["active"]), squeeze=False)[0]
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.02, top=0.86, wspace=0.06)
    extent = (0, image.shape[1], image.shape[0], 0)
    for axes, (active, shares) in zip(every, [(None, None), *sample["active"]], strict=True):
        axes.set_axis_off()
        if shares is None:
            axes.imshow(image, extent=extent, interpolation="nearest")
            axes.set_title("image", fontsize=8)
        else:
            values = [value for row in shares for value in row]
            axes.imshow(grey, extent=extent, interpolation="nearest", cmap="gray", vmin=0, vmax=1)
            axes.imshow(shares, extent=extent, interpolation="nearest", alpha=0.6)
            axes.set_title(f"{percent(active)}: {min(values):.2f}–{max(values):.2f}", fontsize=8)
    return figure


def labels(conversions: list[Conversion]) -> list[tuple[Conversion, str]]:
    """Conversions with names that tell them apart."""
    short = short_names([str(c.folder.resolve()) for c in conversions])
    paper = [" (the paper's rule)" * (c.recipe.get("preset") == "paper") for c in conversions]
    if len(conversions) == 1:
        return [(conversions[0], conversions[0].title)]
    return [(c, short[str(c.folder.resolve())] + p) for c, p in zip(conversions, paper, strict=True)]


def _colours() -> Iterator[str]:
    while True:
        yield from COLOURS


def _finish(axes: Any, metric: str | None, **legend: Any) -> None:
    set_scale(axes, metric)
    axes.locator_params(axis="x", nbins=6)
    axes.grid(alpha=0.25, color=INK, linewidth=0.6)
    axes.legend(**legend)


def as_svg(figure: Figure, prefix: str, title: str) -> str:
    """The figure as an `<svg>` element that scales with the page and takes its text colour.

    Args:
        figure: Drawn with `SETTINGS`.
        prefix: Begins its ids, so that several figures can stand in one page.
        title: For those who do not see it.
    """
    stream = io.StringIO()
    with _drawing():
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'\b(id=")|(url\(#)|(href="#)', lambda m: f"{m[0]}{prefix}-", text)
    text = text.replace(INK, "currentColor").replace("'DejaVu Sans'", "'DejaVu Sans', sans-serif")
    head, rest = text.split(">", 1)
    head = re.sub(r' (width|height|version)="[^"]*"', "", head)
    name = title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return f'{head} role="img" aria-label="{name}">{rest.strip()}'


def save_png(figure: Figure, file: Path) -> None:
    """The figure on white."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with _drawing():
        figure.savefig(file, dpi=150, facecolor="white", metadata={"Software": None})
