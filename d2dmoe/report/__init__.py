"""Figures for people and for programs: Markdown tables, plots, the common JSON form, the model card."""

from .card import auto_class, model_card
from .machine import envelope, machine, portable, recorded_quality, write_json
from .plots import check_plot, plot_curves, plot_times
from .tables import bench_table, compare_table, drift_table, eval_table, list_table, parts_table, peers_table, table

__all__ = [
    "auto_class",
    "bench_table",
    "check_plot",
    "compare_table",
    "drift_table",
    "envelope",
    "eval_table",
    "list_table",
    "machine",
    "model_card",
    "parts_table",
    "peers_table",
    "plot_curves",
    "plot_times",
    "portable",
    "recorded_quality",
    "table",
    "write_json",
]  # fmt: skip
