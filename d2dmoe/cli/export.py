"""`d2dmoe export`."""

from __future__ import annotations

import argparse

from ..config.options import DataConfig
from ..config.presets import resolve
from ..errors import UserError
from .flags import add_fields, given, numbers
from .output import emit

NAME = "export"
HELP = "get the original dense model back, an OpenVINO model, or an adapter of the original model on a converted one"


def add_flags(sub: argparse.ArgumentParser) -> None:
    """The verb's own flags."""
    one = sub.add_mutually_exclusive_group(required=True)
    one.add_argument("--dense", metavar="DIR", help="converted folder whose dense model is written, neurons in order")
    one.add_argument("--adapter", metavar="DIR", help="folder of a LoRA that was trained on the original model")
    one.add_argument("--openvino", metavar="DIR", help="converted folder that is written in OpenVINO's form")
    sub.add_argument("--model", metavar="DIR", help="converted folder that the adapter is for")
    sub.add_argument("output", metavar="OUT", help="new folder")
    further = sub.add_argument_group("of --openvino")
    budgets = "active fractions that it can run at (default: the stored budgets)"
    further.add_argument("--active", type=numbers, metavar="A,B,…", help=budgets)
    experts = "arithmetic of the experts (default: fp32)"
    further.add_argument("--expert-dtype", choices=("int8", "int8-dynamic"), help=experts)
    rest = "everything else by NNCF: weights and activations, or weights only, in int8 (default: fp32)"
    further.add_argument("--rest", choices=("int8", "int8-weights"), help=rest)
    further.add_argument("--batches", type=int, default=64, help="batches of --data that --rest int8 measures")
    past = "keys and values of a decoder as its state, to generate token by token (default: where it has them)"
    further.add_argument("--cache", action=argparse.BooleanOptionalAction, default=None, help=past)
    plain = "leave converted projections around attention dense, as suits encoders in int8"
    further.add_argument("--dense-projections", action="store_true", default=None, help=plain)
    add_fields(sub, DataConfig)


def run(arguments: argparse.Namespace, command: list[str]) -> int:
    """Run the verb; returns the exit code."""
    if bool(arguments.adapter) != bool(arguments.model):
        raise UserError("--adapter and --model belong together: a LoRA, and the converted folder that it is for")
    from ..pipeline.export import export_adapter, export_dense

    if arguments.openvino:
        return _openvino(arguments, command)
    data = given(arguments, DataConfig)
    for flag, value in (("active", arguments.active), ("expert-dtype", arguments.expert_dtype),
                        ("rest", arguments.rest), ("cache", arguments.cache),
                        ("dense-projections", arguments.dense_projections), *data.items()):  # fmt: skip
        if value is not None:
            raise UserError(f"--{flag.replace('_', '-')} belongs to --openvino; leave it out")
    if arguments.dense:
        count = export_dense(arguments.dense, arguments.output)
        row, text = {"blocks": count}, f"{count} blocks with their neurons in the original order"
    else:
        count = export_adapter(arguments.adapter, arguments.model, arguments.output)
        row, text = {"tensors": count}, f"{count} tensors of the adapter with their neurons in the order of the experts"
    emit(arguments, command, 0, [row], f"{text}: {arguments.output}")
    return 0


def _openvino(arguments: argparse.Namespace, command: list[str]) -> int:
    from ..pipeline.openvino import export_openvino

    if arguments.batches < 1:
        raise UserError(f"--batches {arguments.batches}: must be 1 or more")
    row = export_openvino(
        arguments.openvino, arguments.output, actives=arguments.active, expert_dtype=arguments.expert_dtype,
        rest=arguments.rest, data=resolve(DataConfig, given(arguments, DataConfig)), batches=arguments.batches,
        cache=arguments.cache, dense_projections=bool(arguments.dense_projections),
    )  # fmt: skip
    budgets = ", ".join(f"{active:g}" for active in row["actives"])
    cached = ", with its cache" if row["cached"] else ""
    text = f"{row['layers']} layers at budgets {budgets}{cached}, {row['error']:.1g} from PyTorch: {arguments.output}"
    emit(arguments, command, 0, [row], text)
    return 0
