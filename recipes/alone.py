"""What the scripts share that change one kind of part and leave the rest dense: data, plan and command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import transformers

from d2dmoe.config import ConvertConfig, UserError
from d2dmoe.data.batches import Batches
from d2dmoe.measure.evaluate import Subject, prepare
from d2dmoe.pipeline.parts import both_parts
from d2dmoe.pipeline.plan import ConversionPlan, make_plan
from d2dmoe.report import table

Rows = list[list]


def prepared(
    config: ConvertConfig, eval_data: str, eval_limit: int, **changes: Any
) -> tuple[Subject, ConversionPlan, Batches]:
    """What is evaluated, what would be converted (with `changes` of the config), and shuffled calibration batches."""
    subject = prepare(config.model, replace(config, data=eval_data), [], tokens=eval_limit)
    plan = make_plan(subject.config, replace(config, **changes))
    batches, _ = both_parts(config, plan.model_class, subject.config, subject.tokenizer)
    return subject, plan, batches.shuffled(config.seed)


def parser(description: str, *, model: str, shares: str) -> argparse.ArgumentParser:
    """The flags that all of them have; `model` is the help of `--model`, `shares` the default of `--shares`."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", required=True, help=model)
    made.add_argument("--data", required=True)
    made.add_argument("--eval-data", required=True)
    made.add_argument("--eval-limit", type=int, default=16_384, help="tokens")
    made.add_argument("--max-length", type=int, default=256)
    made.add_argument("--shares", default=shares, help="of the work of what is changed")
    made.add_argument("--seed", type=int, default=0)
    return made


def keys_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keys of `d2dmoe convert` among the flags."""
    return {name: getattr(arguments, name) for name in ("model", "data", "max_length", "seed")}


def shares_of(arguments: argparse.Namespace) -> list[float]:
    """`--shares` as numbers."""
    return [float(share) for share in arguments.shares.split(",")]


def show(script: str, head: list[str], make: Callable[[], Rows]) -> int:
    """Print a table of what `make` measures, or the one sentence that says why not; the exit code."""
    transformers.logging.disable_progress_bar()
    try:
        rows = make()
    except UserError as error:
        print(f"{script}: {error}", file=sys.stderr)
        return 1
    print(table(head, rows))
    return 0
