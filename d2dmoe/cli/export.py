"""`d2dmoe export`."""

from __future__ import annotations

import argparse

from ..errors import UserError
from .output import emit

NAME = "export"
HELP = "get the original dense model back, or put an adapter of the original model on a converted one"


def add_flags(sub: argparse.ArgumentParser) -> None:
    """The verb's own flags."""
    one = sub.add_mutually_exclusive_group(required=True)
    one.add_argument("--dense", metavar="DIR", help="converted folder whose dense model is written, neurons in order")
    one.add_argument("--adapter", metavar="DIR", help="folder of a LoRA that was trained on the original model")
    sub.add_argument("--model", metavar="DIR", help="converted folder that the adapter is for")
    sub.add_argument("output", metavar="OUT", help="new folder")


def run(arguments: argparse.Namespace, command: list[str]) -> int:
    """Run the verb; returns the exit code."""
    if bool(arguments.adapter) != bool(arguments.model):
        raise UserError("--adapter and --model belong together: a LoRA, and the converted folder that it is for")
    from ..pipeline.export import export_adapter, export_dense

    if arguments.dense:
        count = export_dense(arguments.dense, arguments.output)
        row, text = {"blocks": count}, f"{count} blocks with their neurons in the original order"
    else:
        count = export_adapter(arguments.adapter, arguments.model, arguments.output)
        row, text = {"tensors": count}, f"{count} tensors of the adapter with their neurons in the order of the experts"
    emit(arguments, command, 0, [row], f"{text}: {arguments.output}")
    return 0
