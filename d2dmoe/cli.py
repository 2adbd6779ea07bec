"""The command `d2dmoe`: subcommands, messages, exit codes. Only here is anything printed."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import types
import typing
import warnings
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from .config import METRIC_NAMES, PRESETS, ConvertConfig, DataConfig, UserError, check_active, resolve
from .sparsify.options import SparsifyConfig, further_options, resolve_sparsify


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit code: 0 done, 1 failed, 2 usage."""
    parser = _parser()
    arguments, further = parser.parse_known_args(argv)
    if further and not getattr(arguments, "takes_more", False):
        parser.error(f"unrecognized arguments: {' '.join(further)}")
    arguments.further = further
    if not getattr(arguments, "run", None):
        parser.print_help()
        return 2
    _quiet()
    try:
        for name in ("json", "plot"):
            _check_writable("--" + name, getattr(arguments, name, None))
        return arguments.run(arguments, sys.argv[1:] if argv is None else argv)
    except UserError as error:
        if arguments.debug:
            raise
        print(f"d2dmoe: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("d2dmoe: interrupted" + "; --resume goes on" * (arguments.run in (_convert, _sparsify)), file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
    except Exception as error:
        if arguments.debug:
            raise
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        print(f"d2dmoe: {type(error).__name__}: {first} (--debug shows where)", file=sys.stderr)
        return 1


def _check_writable(flag: str, path: str | None) -> None:
    """Before any long work: can the figures be written there at its end?"""
    if path:
        above = next(p for p in Path(path).absolute().parents if p.exists())
        if Path(path).is_dir() or not above.is_dir() or not os.access(above, os.W_OK):
            raise UserError(f"{flag} {path}: cannot be written; name a file in a folder that can be")


def _quiet() -> None:
    """Libraries keep their notes to themselves; ours are shown as plain sentences."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with contextlib.suppress(ImportError):
        import datasets

        datasets.disable_progress_bars()
    warnings.showwarning = lambda message, *_, **__: print(f"d2dmoe: note: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    from . import __version__

    parser = argparse.ArgumentParser(
        prog="d2dmoe", description="Turn a trained dense Transformer into a dynamic-k Mixture-of-Experts."
    )
    parser.add_argument("--version", action="version", version=f"d2dmoe {__version__}")
    verbs = parser.add_subparsers(metavar="VERB")

    def verb(name: str, run: Any, help: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(
            name, help=help, description=help, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        sub.set_defaults(run=run)
        sub.add_argument("--debug", action="store_true", help="show tracebacks")
        sub.add_argument("--json", metavar="FILE", help="write the figures to this file as well")
        return sub

    sub = verb("convert", _convert, "convert a dense model into a checkpoint folder")
    add_fields(sub, ConvertConfig)
    sub.add_argument("--recipe", metavar="YAML", help="file with any of these keys; flags win over it")
    sub.add_argument("--dry-run", action="store_true", help="print the plan from the config alone and stop")
    sub.add_argument("--resume", action="store_true", help="go on with an interrupted conversion")
    sub.add_argument("--overwrite", action="store_true", help="replace a non-empty output folder")

    sub = verb("sparsify", _sparsify, "fine-tune a dense model so that fewer of its neurons answer to a token")
    sub.allow_abbrev = False
    sub.set_defaults(takes_more=True)
    sub.epilog = "Any field of transformers.TrainingArguments is a flag as well, for instance --learning-rate 1e-4, "
    sub.epilog += "--max-steps 300, --gradient-accumulation-steps 4, --bf16, --eval-steps 50, --report-to tensorboard."
    add_fields(sub, SparsifyConfig)
    sub.add_argument("--recipe", metavar="YAML", help="file with any of these keys; flags win over it")
    sub.add_argument("--resume", action="store_true", help="go on with an interrupted training")
    sub.add_argument("--overwrite", action="store_true", help="replace a non-empty output folder")

    sub = verb("eval", _eval, "quality, active fraction and FLOPs on held-out data")
    one = sub.add_mutually_exclusive_group(required=True)
    one.add_argument("--model", help="converted or dense model: hub id or local folder")
    one.add_argument("--compare", nargs="+", metavar="MODEL", help="several of them, their figures side by side")
    add_fields(sub, DataConfig)
    natural = "what quality is (default: what fits the model's class and the data)"
    sub.add_argument("--metric", choices=METRIC_NAMES, help=natural)
    parts = "part of the data (default: held_out of builtin, all of anything else)"
    sub.add_argument("--part", choices=("held_out", "calibration", "all"), help=parts)
    every = "active fractions, one row each (default: the stored budgets)"
    sub.add_argument("--active", type=_numbers, metavar="A,B,…", help=every)
    sub.add_argument("--tau", type=_numbers, metavar="T,U,…", help="thresholds, one row each")
    sub.add_argument("--tokens", type=int, default=0, help="stop after this many tokens; 0 for all")
    sub.add_argument("--plot", metavar="FILE", help="draw quality against whole-model FLOPs (needs matplotlib)")
    sub.add_argument("--oracle", action="store_true", help="select by true expert norms instead of the routers")

    sub = verb("bench", _bench, "time of one layer or a model, dense against converted")
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument("--layer", metavar="d=…,f=…,experts=…[,glu]", help="one layer with random weights")
    what.add_argument("--model", metavar="DIR", help="converted model: prefill and decode")
    sub.add_argument("--tokens", type=_numbers, default=[1, 16, 128, 512], metavar="N,M,…", help="for --layer")
    sub.add_argument("--batch", type=_numbers, default=[1, 8, 64], metavar="N,M,…", help="sequences, for --model")
    sub.add_argument("--length", type=int, default=128, help="tokens of each sequence, for --model")
    sub.add_argument(
        "--active", type=_numbers, metavar="A,B,…", help="fractions (default: 0.25, or the stored budgets)"
    )
    sub.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and inputs")
    sub.add_argument("--threads", type=int, default=0, help="0 leaves them as they are")
    sub.add_argument("--seconds", type=float, default=2.0, help="for each figure")
    sub.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: one thread on a busy machine")
    columns = "eager,compiled,frozen,dispatched,grouped_mm,loop"
    sub.add_argument(
        "--keep-dense", action="store_true",
        help="hold the dense layout of the feed-forward weights as well, for the column dispatched",
    )  # fmt: skip
    sub.add_argument("--columns", default=columns, help="what to compare with; eager is always there")

    sub = verb("list", _list, "what would be converted in a model, what not, and why")
    sub.add_argument("--model", required=True, help="hub id or local folder")
    sub.add_argument("--revision", help="branch, tag or commit of a hub model")

    verb("env", _env, "versions, machine and which kernel backends work here")
    return parser


def add_fields(parser: argparse.ArgumentParser, config_class: type) -> None:
    """One flag per field, without defaults, so that a flag that was not given does not override a recipe."""
    hints = typing.get_type_hints(config_class)
    for f in fields(config_class):
        default = f.default if f.default is not MISSING else f.default_factory()
        many, kind = f.metadata.get("many"), _plain(hints[f.name])
        shown = ",".join(map(str, default)) if many else default
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": f.name, "choices": f.metadata.get("choices")}
        options["help"] = f.metadata["help"] + ("" if default in (None, "", 0) else f" (default: {shown})")
        flag = "--" + f.name.replace("_", "-")
        if kind is bool:
            parser.add_argument(
                flag, action=argparse.BooleanOptionalAction, **{k: options[k] for k in ("default", "dest", "help")}
            )
        else:
            parser.add_argument(
                flag, type=_numbers if many else kind, metavar=None if options["choices"] else f.name.upper(), **options
            )


def _plain(hint: Any) -> type:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(a for a in typing.get_args(hint) if a is not type(None))
    return hint if isinstance(hint, type) else str


def _numbers(text: str) -> list[float]:
    try:
        return [float(p[:-1]) / 100 if p.endswith("%") else float(p) for p in map(str.strip, text.split(",")) if p]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a comma-separated list of numbers") from None


def _given(arguments: argparse.Namespace, config_class: type) -> dict[str, Any]:
    names = {f.name for f in fields(config_class)}
    return {k: v for k, v in vars(arguments).items() if k in names}


def _recipe(path: str | None) -> dict[str, Any]:
    if not path:
        return {}
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--recipe {path}: {error.strerror}; give a YAML file of convert's keys") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" near line {mark.line + 1}" if mark else ""
        raise UserError(f"--recipe {path}: not valid YAML{where}; write one `key: value` per line") from None
    if not isinstance(content, dict):
        raise UserError(f"--recipe {path}: not a mapping; write one `key: value` per line")
    return {str(key): value for key, value in content.items()}


def _emit(arguments: argparse.Namespace, command: list[str], seed: int, rows: list[dict], text: str) -> None:
    from .report import envelope, write_json

    print(text)
    if arguments.json:
        write_json(arguments.json, envelope(["d2dmoe", *command], seed, rows))


def _convert(arguments: argparse.Namespace, command: list[str]) -> int:
    config = resolve(ConvertConfig, _recipe(arguments.recipe), _given(arguments, ConvertConfig))
    from . import hub
    from .convert import convert
    from .plan import make_plan
    from .report import eval_table, write_json

    if arguments.dry_run:
        model_config = hub.read_config(config.model, config.revision)
        plan = make_plan(model_config, config)
        _emit(arguments, command, config.seed, [plan.summary()], _plan_text(plan, config))
        return 0
    results = convert(
        config, resume=arguments.resume, overwrite=arguments.overwrite,
        say=lambda text: print(text, file=sys.stderr, flush=True), command=["d2dmoe", *command],
    )  # fmt: skip
    print(eval_table(results["rows"]))
    if arguments.json:
        write_json(arguments.json, results)
    return 0


def _sparsify(arguments: argparse.Namespace, command: list[str]) -> int:
    flags = {**_given(arguments, SparsifyConfig), **further_options(arguments.further)}
    config, training = resolve_sparsify(_recipe(arguments.recipe), flags)
    from .report import write_json
    from .sparsify.card import sparsity_table
    from .sparsify.run import sparsify

    results = sparsify(
        config, training, resume=arguments.resume, overwrite=arguments.overwrite,
        say=lambda text: print(text, file=sys.stderr, flush=True), command=["d2dmoe", *command],
    )  # fmt: skip
    if results:
        print(sparsity_table(results["rows"]))
        if arguments.json:
            write_json(arguments.json, results)
    return 0


def _plan_text(plan: Any, config: ConvertConfig) -> str:
    from .report import table

    rows = [[b.name, b.kind, b.activation, f"{b.d_model}->{b.width}", b.experts, b.size] for b in plan.blocks]
    lines = [
        table(["block", "kind", "activation", "size", "experts", "neurons each"], rows),
        "",
        f"stages: {', '.join(plan.summary()['stages'])} (preset {config.preset} of {', '.join(PRESETS)})",
        f"parameters: {plan.dense_parameters:,} dense, {plan.added_parameters:,} added by routers and stand-ins",
        f"peak memory: about {plan.peak_memory_bytes / 1e9:.2f} GB; disk: about {plan.disk_bytes / 1e9:.2f} GB",
    ]
    padded = plan.summary()["padded_neurons"]
    if padded:
        lines.append(f"padding: {padded} zero neurons in memory, because the experts do not divide the width")
    return "\n".join(lines)


def _eval(arguments: argparse.Namespace, command: list[str]) -> int:
    from .evaluate import compare, prepare
    from .report import check_plot, compare_table, eval_table, plot_curves

    config = resolve(DataConfig, _given(arguments, DataConfig))
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
    subjects = [prepare(name, config, settings, **options) for name in dict.fromkeys(names)]
    rows = compare(subjects, settings, oracle=arguments.oracle)
    _emit(arguments, command, 0, rows, compare_table(rows) if arguments.compare else eval_table(rows))
    if arguments.plot:
        plot_curves(rows, arguments.plot)
    return 0


def _bench(arguments: argparse.Namespace, command: list[str]) -> int:
    import torch

    from . import bench
    from .report import bench_table

    columns = tuple(arguments.columns.split(","))
    if unknown := set(columns) - set(bench.COLUMNS):
        raise UserError(f"--columns {', '.join(sorted(unknown))}: not one of {', '.join(bench.COLUMNS)}")
    for active in arguments.active or []:
        check_active(active)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.clock == "cpu" and torch.get_num_threads() != 1:
        raise UserError("--clock cpu counts the calling thread only; give --threads 1 with it")
    options = {
        "seconds": arguments.seconds, "columns": columns, "clock": arguments.clock, "keep_dense": arguments.keep_dense,
    }  # fmt: skip
    if arguments.layer:
        tokens = [int(n) for n in arguments.tokens]
        spec, dtype = bench.parse_layer(arguments.layer), getattr(torch, arguments.dtype)
        rows = bench.bench_layer(spec, tokens=tokens, actives=arguments.active or [0.25], dtype=dtype, **options)
    else:
        rows = _bench_model(arguments, options)
    _emit(arguments, command, 0, rows, bench_table(rows))
    return 0


def _bench_model(arguments: argparse.Namespace, options: dict[str, Any]) -> list[dict[str, Any]]:
    import torch

    from . import bench, hub
    from .report import recorded_quality

    config = hub.read_config(arguments.model)
    stored = hub.stored_config(config)
    if stored is None:
        raise UserError(
            f"--model {arguments.model}: not converted; run `d2dmoe convert --model {arguments.model}` first"
        )
    dtype = getattr(torch, arguments.dtype)
    model, dense = hub.load_model(arguments.model, config, dtype=dtype), hub.load_dense(arguments.model, config, dtype)
    actives = arguments.active or [b.active for b in stored.budgets]
    batches = [int(n) for n in arguments.batch]
    rows = bench.bench_model(
        model, dense, batches=batches, length=arguments.length, settings=[{"active": a} for a in actives], **options
    )
    return [{**row, **recorded_quality(arguments.model, row["active"])} for row in rows]


def _list(arguments: argparse.Namespace, command: list[str]) -> int:
    from . import hub
    from .discovery import discover, skeleton
    from .plan import describe
    from .report import list_table

    model_config = hub.read_config(arguments.model, arguments.revision)
    model = skeleton(hub.model_class(model_config, arguments.model), model_config)
    rows = describe(discover(model))
    _emit(arguments, command, 0, rows, list_table(rows))
    if not any(row["converted"] for row in rows):
        raise UserError(f"--model {arguments.model}: no feed-forward block found; give another model")
    return 0


def _env(arguments: argparse.Namespace, command: list[str]) -> int:
    from . import __version__
    from .kernels import backends
    from .report import machine, table

    facts = {"d2dmoe": __version__, **machine()}
    rows = [{"backend": name, "live": live, "why": why} for name, live, why in backends()]
    text = table(["fact", "value"], [[k, v] for k, v in facts.items()])
    text += "\n\n" + table(
        ["backend", "live", "why"], [[r["backend"], "yes" if r["live"] else "no", r["why"]] for r in rows]
    )
    _emit(arguments, command, 0, rows, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
