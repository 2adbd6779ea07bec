"""`d2dmoe bench`."""

from __future__ import annotations

import argparse
import math
import os
import sys
import warnings
from typing import Any

from ..config.checks import check_active
from ..errors import UserError
from .flags import numbers
from .output import emit

NAME = "bench"
HELP = "time of one layer or a model, dense against converted"
LENGTH = 128  # tokens


def add_flags(sub: argparse.ArgumentParser) -> None:
    """The verb's own flags."""
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument("--layer", metavar="d=…,f=…,experts=…[,glu]", help="one layer with random weights")
    what.add_argument("--model", metavar="DIR", help="converted model: prefill and decode")
    sub.add_argument("--tokens", type=numbers, default=[1, 16, 128, 512], metavar="N,M,…", help="for --layer")
    sub.add_argument("--batch", type=numbers, default=[1, 8, 64], metavar="N,M,…", help="texts or images, for --model")
    most = f"tokens of each text, for --model (default: {LENGTH}, or what the model takes)"
    sub.add_argument("--length", type=int, help=most)
    sub.add_argument(
        "--data", help="for --model: text cut into pieces of --length tokens, or images (default: random tokens, on "
        "which a converted model runs more experts than on text)",
    )  # fmt: skip
    sub.add_argument("--text-column", help="as for eval")
    sub.add_argument("--active", type=numbers, metavar="A,B,…", help="fractions (default: 0.25, or the stored budgets)")
    sub.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and inputs")
    sub.add_argument("--threads", type=int, default=0, help="0 leaves them as they are")
    sub.add_argument("--seconds", type=float, default=2.0, help="for each figure")
    sub.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: one thread on a busy machine")
    columns = "eager,compiled,frozen,dispatched,grouped_mm,loop"
    sub.add_argument(
        "--keep-dense", action="store_true",
        help="hold the dense layout of the feed-forward weights as well, for the column dispatched",
    )  # fmt: skip
    sub.add_argument(
        "--expert-dtype", choices=("int8", "int8-dynamic"), help="a further column: the same with experts in this dtype"
    )
    whole = "for --model: the other linear maps in this dtype in that column, and a column of the dense model in it"
    sub.add_argument("--linear-dtype", choices=("int8", "int8-dynamic"), help=whole)
    peers = "for --model: dense compiled, in bf16 and int8, by torchao, ONNX Runtime and OpenVINO (those installed),"
    peers += " and the converted model in fp32, bf16 and int8; all tokens at once"
    sub.add_argument("--rivals", action="store_true", help=peers)
    spent = "for --model: where the time goes, in blocks, other linear maps, head and everything else"
    sub.add_argument("--profile", action="store_true", help=spent)
    turn = "layers alike, used in turn so that their weights come from memory, as in a model; for --layer"
    sub.add_argument("--copies", type=int, default=1, help=turn)
    sub.add_argument("--columns", default=columns, help="what to compare with; eager is always there")
    drawn = "draw recorded quality against measured time (needs --model and matplotlib)"
    sub.add_argument("--plot", metavar="FILE", help=drawn)


def run(arguments: argparse.Namespace, command: list[str]) -> int:
    """Run the verb; returns the exit code."""
    import torch

    from ..measure import bench
    from ..measure.pairs import parse_layer
    from ..report import bench_table, check_plot, parts_table, peers_table, plot_times

    columns = tuple(arguments.columns.split(","))
    if unknown := set(columns) - set(bench.COLUMNS):
        raise UserError(f"--columns {', '.join(sorted(unknown))}: not one of {', '.join(bench.COLUMNS)}")
    for active in arguments.active or []:
        check_active(active)
    _check_numbers(arguments)
    if arguments.data and arguments.layer:
        raise UserError(f"--data {arguments.data}: a single layer has random inputs; give --model")
    if arguments.rivals:
        _check_rivals(arguments)
    if arguments.linear_dtype and arguments.layer:
        raise UserError(f"--linear-dtype {arguments.linear_dtype}: a single layer has experts only; give --model")
    if arguments.profile and arguments.layer:
        raise UserError("--profile takes a model apart; give --model")
    if arguments.plot:
        if arguments.layer:
            raise UserError("--plot draws the quality of a model, and a single layer has none; give --model")
        check_plot(arguments.plot)
    if arguments.copies != 1 and (columns != ("eager",) or not arguments.layer or arguments.copies < 1):
        raise UserError(f"--copies {arguments.copies}: must be 1 or more, with --layer and --columns eager")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.clock == "cpu" and torch.get_num_threads() != 1:
        raise UserError("--clock cpu counts the calling thread only; give --threads 1 with it")
    options = {
        "seconds": arguments.seconds, "columns": columns, "clock": arguments.clock, "keep_dense": arguments.keep_dense,
        "expert_dtype": arguments.expert_dtype,
    }  # fmt: skip
    if arguments.rivals:
        rows = _bench_rivals(arguments)
        emit(arguments, command, 0, rows, peers_table(rows))
        return 0
    if arguments.layer:
        tokens = [int(n) for n in arguments.tokens]
        spec, dtype = parse_layer(arguments.layer), getattr(torch, arguments.dtype)
        options["copies"] = arguments.copies
        rows = bench.bench_layer(spec, tokens=tokens, actives=arguments.active or [0.25], dtype=dtype, **options)
    else:
        own = {"linear_dtype": arguments.linear_dtype, "profile": arguments.profile}
        rows = _bench_model(arguments, {**options, **own})
    text = bench_table(rows)
    emit(arguments, command, 0, rows, f"{text}\n\n{parts_table(rows)}" if arguments.profile else text)
    if arguments.plot:
        plot_times(rows, arguments.plot)
    return 0


def _check_numbers(arguments: argparse.Namespace) -> None:
    """Refuse counts and times that cannot be measured.

    Raises:
        UserError: Naming the flag, its value and what is allowed.
    """
    if not 0 < arguments.seconds < math.inf:
        raise UserError(f"--seconds {arguments.seconds:g}: must be above 0, for instance 2")
    most = 4 * (os.cpu_count() or 1)
    if not 0 <= arguments.threads <= most:
        raise UserError(f"--threads {arguments.threads}: must be between 0, which changes nothing, and {most}")
    length = LENGTH if arguments.length is None else arguments.length
    counts = {"tokens": arguments.tokens, "batch": arguments.batch, "length": [length]}
    for name, values in counts.items():
        for value in values:
            if not (1 <= value < math.inf and value == int(value)):
                raise UserError(f"--{name} {value:g}: must be a whole number of at least 1")


def _check_rivals(arguments: argparse.Namespace) -> None:
    """Refuse what a comparison with peers does not do.

    Raises:
        UserError: Naming the flag.
    """
    others = {
        "layer": arguments.layer, "plot": arguments.plot, "expert-dtype": arguments.expert_dtype,
        "linear-dtype": arguments.linear_dtype, "keep-dense": arguments.keep_dense, "profile": arguments.profile,
        "dtype": arguments.dtype != "float32",
    }  # fmt: skip
    for name in (name for name, given in others.items() if given):
        raise UserError(f"--rivals and --{name} do not go together; leave one of them out")


def _bench_rivals(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from .. import hub
    from ..measure.peers import bench_peers

    config, stored = _converted(arguments.model)
    if stored.networks:
        raise UserError(f"--rivals: {arguments.model} holds no dense model (--attention mlp) to compare with")
    _set_length(arguments, config)
    batches = [int(n) for n in arguments.batch]
    prompts = _real(arguments, config, max(batches)) if arguments.data else None
    model, dense = hub.load_model(arguments.model, config), hub.load_dense(arguments.model, config)
    return bench_peers(
        model, dense, batches=batches, length=arguments.length, seconds=arguments.seconds, clock=arguments.clock,
        actives=arguments.active or [budget.active for budget in stored.budgets], prompts=prompts,
        say=lambda text: print(f"d2dmoe: note: {text}", file=sys.stderr),
    )  # fmt: skip


def _set_length(arguments: argparse.Namespace, config: Any) -> None:
    """Give texts the length that was asked for, or one that the model takes.

    Raises:
        UserError: If the model does not take as many tokens.
    """
    from .. import hub
    from ..config.options import DataConfig
    from ..discovery.positions import fit_to_positions

    kind, wanted = hub.model_class(config, arguments.model), arguments.length or LENGTH
    more = int(hub.is_causal(kind) and not arguments.rivals)  # decoding adds a token
    most = fit_to_positions(DataConfig(max_length=wanted + more), kind, config).max_length - more
    if arguments.length and wanted > most:
        taken = f"{most + more} tokens" + ", one of them the one that decoding adds" * more
        raise UserError(f"--length {wanted}: the model takes {taken}; give at most {most}")
    arguments.length = min(wanted, most)


def _converted(name: str) -> tuple[Any, Any]:
    """Config and record of a converted model.

    Raises:
        UserError: If it is not converted.
    """
    from .. import hub

    config = hub.read_config(name)
    stored = hub.conversion_record(config)
    if stored is None:
        raise UserError(f"--model {name}: not converted; run `d2dmoe convert --model {name}` first")
    return config, stored


def _bench_model(arguments: argparse.Namespace, options: dict[str, Any]) -> list[dict[str, Any]]:
    import torch

    from .. import hub
    from ..measure import bench
    from ..report import recorded_quality

    config, stored = _converted(arguments.model)
    actives = arguments.active or [budget.active for budget in stored.budgets]
    quality = {active: recorded_quality(arguments.model, active) for active in actives}
    missing = ", ".join(f"{active:g}" for active, found in quality.items() if not found)
    if arguments.plot and (missing or not quality):
        raise UserError(
            f"--plot {arguments.plot}: results.json of {arguments.model} records no quality at --active "
            f"{missing or '…'}; name budgets that convert has stored and evaluated"
        )
    dtype = getattr(torch, arguments.dtype)
    if stored.networks:
        warnings.warn(
            f"{arguments.model} holds no dense model (--attention mlp): dense times are of one with its shapes and "
            f"random weights", stacklevel=1
        )  # fmt: skip
    _set_length(arguments, config)
    batches = [int(n) for n in arguments.batch]
    if arguments.data:
        options["prompts"] = _real(arguments, config, max(batches))
    model, dense = hub.load_model(arguments.model, config, dtype=dtype), hub.load_dense(arguments.model, config, dtype)
    rows = bench.bench_model(
        model, dense, batches=batches, length=arguments.length, settings=[{"active": a} for a in actives], **options
    )
    return [{**row, **quality[row["active"]]} for row in rows]


def _real(arguments: argparse.Namespace, config: Any, most: int) -> Any:
    """Inputs from `--data`, enough for the largest batch."""
    from .. import hub
    from ..config.options import DataConfig
    from ..config.presets import resolve
    from ..measure.prompts import real_prompts

    keys = {"data": arguments.data, "text_column": arguments.text_column, "max_length": arguments.length}
    processor = hub.load_processor(arguments.model, config)
    return real_prompts(arguments.model, config, processor, resolve(DataConfig, keys), most)
