"""`d2dmoe convert`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..config.options import ConvertConfig
from ..config.presets import PRESETS, resolve
from ..sparsify.options import further_options
from .flags import add_fields, given, read_recipe
from .output import emit

NAME = "convert"
HELP = "convert a dense model into a checkpoint folder"


def add_flags(sub: argparse.ArgumentParser) -> None:
    """The verb's own flags."""
    sub.set_defaults(takes_more="--sparsify-")
    sub.allow_abbrev = False
    add_fields(sub, ConvertConfig)
    sub.add_argument("--recipe", metavar="YAML", help="file with any of these keys; flags win over it")
    sub.add_argument("--dry-run", action="store_true", help="print the plan from the config alone and stop")
    sub.add_argument("--resume", action="store_true", help="go on with an interrupted conversion")
    sub.add_argument("--overwrite", action="store_true", help="replace a non-empty output folder")


def run(arguments: argparse.Namespace, command: list[str]) -> int:
    """Run the verb; returns the exit code."""
    further = further_options(arguments.further)
    flags = {**given(arguments, ConvertConfig), **further}
    config = resolve(ConvertConfig, read_recipe(arguments.recipe), flags)
    from ..pipeline.convert import convert
    from ..pipeline.first import check_sparsify
    from ..pipeline.plan import check_fed, make_plan
    from ..report import drift_table, eval_table, write_json
    from ..training import first_process
    from ..twin import read_dense_config

    if arguments.dry_run:
        model_config = read_dense_config(config.model, config.revision)
        plan = make_plan(model_config, config)
        check_fed(plan.skeleton, plan.discovery, config.model)
        if config.sparsify != "skip":
            check_sparsify(config, Path(config.output_dir))
            print("before that: sparsify, whose training the plan below does not count", file=sys.stderr)
        seconds = plan.seconds()
        row = {**plan.summary(), "seconds": round(seconds)}
        emit(arguments, command, config.seed, [row], _plan_text(plan, config, seconds))
        return 0
    quiet = not first_process()
    results = convert(
        config, resume=arguments.resume, overwrite=arguments.overwrite,
        say=lambda text: quiet or print(text, file=sys.stderr, flush=True), command=["d2dmoe", *command],
    )  # fmt: skip
    if results:
        print(eval_table(results["rows"]))
        if config.also_eval:
            print("", drift_table(results["rows"]), sep="\n")
        if arguments.json:
            write_json(arguments.json, results)
    return 0


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 600 else f"{seconds / 60:.1f} minutes"


def _plan_text(plan: Any, config: ConvertConfig, seconds: float) -> str:
    from ..report import table

    rows = [
        [b.name, "attention" if b.role else b.kind, b.activation, f"{b.d_model}->{b.width}", b.experts, b.size]
        for b in (*plan.blocks, *plan.networks)
    ]
    lines = [
        table(["block", "kind", "activation", "size", "experts", "neurons each"], rows),
        "",
        f"stages: {', '.join(plan.summary()['stages'])} (preset {config.preset} of {', '.join(PRESETS)})",
        f"parameters: {plan.dense_parameters:,} dense, {plan.added_parameters:,} added by routers and stand-ins",
        f"peak memory: about {plan.peak_memory_bytes / 1e9:.2f} GB; disk: about {plan.disk_bytes / 1e9:.2f} GB",
        f"time: about {_minutes(seconds)}, on as many cores like these as torch has threads, with no other work",
    ]
    padded = plan.summary()["padded_neurons"]
    if padded:
        lines.append(f"padding: {padded} zero neurons in memory, because the experts do not divide the width")
    return "\n".join(lines)
