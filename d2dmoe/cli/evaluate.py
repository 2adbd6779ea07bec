"""`d2dmoe eval`."""

from __future__ import annotations

import argparse

from ..config.checks import check_active
from ..config.options import METRIC_NAMES, DataConfig
from ..config.presets import resolve
from ..errors import UserError
from .flags import add_fields, given, numbers
from .output import emit

NAME = "eval"
HELP = "quality, active fraction and FLOPs on held-out data"


def add_flags(sub: argparse.ArgumentParser) -> None:
    """The verb's own flags."""
    one = sub.add_mutually_exclusive_group(required=True)
    one.add_argument("--model", help="converted or dense model: hub id or local folder")
    one.add_argument("--compare", nargs="+", metavar="MODEL", help="several of them, their figures side by side")
    add_fields(sub, DataConfig)
    natural = "what quality is (default: what fits the model's class and the data)"
    sub.add_argument("--metric", choices=METRIC_NAMES, help=natural)
    parts = "part of the data (default: held_out of builtin, all of anything else)"
    sub.add_argument("--part", choices=("held_out", "calibration", "all"), help=parts)
    every = "active fractions, one row each (default: the stored budgets)"
    sub.add_argument("--active", type=numbers, metavar="A,B,…", help=every)
    sub.add_argument("--tau", type=numbers, metavar="T,U,…", help="thresholds, one row each")
    sub.add_argument("--tokens", type=int, default=0, help="stop after this many tokens; 0 for all")
    second = "a second text: its active fraction and loss stand beside those of --data, for each budget"
    sub.add_argument("--also-eval", metavar="DATA", help=second)
    other = (
        "dense model to compare with, where healing or sparsify has changed the model's own weights: hub id or folder"
    )
    sub.add_argument("--original", metavar="MODEL", help=f"{other} (default: the model with everything on)")
    sub.add_argument("--plot", metavar="FILE", help="draw quality against whole-model FLOPs (needs matplotlib)")
    sub.add_argument(
        "--expert-dtype",
        choices=("int8", "int8-dynamic"),
        help="arithmetic of the experts (default: the model's dtype)",
    )
    others = "the same of the other linear maps, also of a dense model: projections, head"
    sub.add_argument("--linear-dtype", choices=("int8", "int8-dynamic"), help=others)
    sub.add_argument("--oracle", action="store_true", help="select by true expert norms instead of the routers")


def run(arguments: argparse.Namespace, command: list[str]) -> int:
    """Run the verb; returns the exit code."""
    from ..measure.evaluate import compare, prepare
    from ..report import check_plot, compare_table, drift_table, eval_table, plot_curves

    config = resolve(DataConfig, given(arguments, DataConfig))
    names = arguments.compare or [arguments.model]
    if arguments.tokens < 0:
        raise UserError(f"--tokens {arguments.tokens}: must be 0 or more; 0 is all of them")
    if arguments.plot:
        check_plot(arguments.plot)
    settings = [{"active": a} for a in arguments.active or []] + [{"tau": t} for t in arguments.tau or []]
    for setting in settings:
        check_active(setting.get("active", 1.0))
    part = arguments.part or ("held_out" if config.data == "builtin" else "all")
    options = {"part": part, "tokens": arguments.tokens, "metric": arguments.metric}
    options |= {"also_eval": arguments.also_eval, "original": arguments.original}
    subjects = [prepare(name, config, settings, **options) for name in dict.fromkeys(names)]
    dtypes = {"expert_dtype": arguments.expert_dtype, "linear_dtype": arguments.linear_dtype}
    rows = compare(subjects, settings, oracle=arguments.oracle, **dtypes)
    text = compare_table(rows) if arguments.compare else eval_table(rows)
    emit(arguments, command, 0, rows, f"{text}\n\n{drift_table(rows)}" if arguments.also_eval else text)
    if arguments.plot:
        plot_curves(rows, arguments.plot)
    return 0
