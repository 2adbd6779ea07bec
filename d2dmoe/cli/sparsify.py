"""`d2dmoe sparsify`."""

from __future__ import annotations

import argparse
import sys

from ..sparsify.options import SparsifyConfig, further_options, resolve_sparsify
from .flags import add_fields, given, read_recipe

NAME = "sparsify"
HELP = "fine-tune a dense model so that fewer of its neurons answer to a token"


def add_flags(sub: argparse.ArgumentParser) -> None:
    """The verb's own flags."""
    sub.allow_abbrev = False
    sub.set_defaults(takes_more="--")
    sub.epilog = "Any field of transformers.TrainingArguments is a flag as well, for instance --learning-rate 1e-4, "
    sub.epilog += "--max-steps 300, --gradient-accumulation-steps 4, --bf16, --eval-steps 50, --report-to tensorboard."
    add_fields(sub, SparsifyConfig)
    sub.add_argument("--recipe", metavar="YAML", help="file with any of these keys; flags win over it")
    sub.add_argument("--resume", action="store_true", help="go on with an interrupted training")
    sub.add_argument("--overwrite", action="store_true", help="replace a non-empty output folder")


def run(arguments: argparse.Namespace, command: list[str]) -> int:
    """Run the verb; returns the exit code."""
    flags = {**given(arguments, SparsifyConfig), **further_options(arguments.further)}
    config, training = resolve_sparsify(read_recipe(arguments.recipe), flags)
    from ..pipeline.sparsify import sparsify
    from ..report import write_json
    from ..sparsify.card import sparsity_table

    results = sparsify(
        config, training, resume=arguments.resume, overwrite=arguments.overwrite,
        say=lambda text: print(text, file=sys.stderr, flush=True), command=["d2dmoe", *command],
    )  # fmt: skip
    if results:
        print(sparsity_table(results["rows"]))
        if arguments.json:
            write_json(arguments.json, results)
    return 0
