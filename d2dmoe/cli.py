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

from .config import PRESETS, ConvertConfig, DataConfig, UserError, check_active, check_tau, resolve


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit code: 0 done, 1 failed, 2 usage."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if not getattr(arguments, "run", None):
        parser.print_help()
        return 2
    _quiet()
    try:
        _check_json(arguments.json)
        return arguments.run(arguments, sys.argv[1:] if argv is None else argv)
    except UserError as error:
        if arguments.debug:
            raise
        print(f"d2dmoe: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("d2dmoe: interrupted" + "; --resume goes on" * (arguments.run is _convert), file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
    except Exception as error:
        if arguments.debug:
            raise
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        print(f"d2dmoe: {type(error).__name__}: {first} (--debug shows where)", file=sys.stderr)
        return 1


def _check_json(path: str | None) -> None:
    """Before any long work: can the figures be written there at its end?"""
    if path:
        above = next(p for p in Path(path).absolute().parents if p.exists())
        if Path(path).is_dir() or not above.is_dir() or not os.access(above, os.W_OK):
            raise UserError(f"--json {path}: cannot be written; name a file in a folder that can be")


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

    sub = verb("eval", _eval, "quality, active fraction and FLOPs on held-out data")
    sub.add_argument("--model", required=True, help="converted or dense model: hub id or local folder")
    add_fields(sub, DataConfig)
    parts = "part of the data (default: held_out of builtin, all of anything else)"
    sub.add_argument("--part", choices=("held_out", "calibration", "all"), help=parts)
    every = "active fractions, one row each (default: the stored budgets)"
    sub.add_argument("--active", type=_numbers, metavar="A,B,…", help=every)
    sub.add_argument("--tau", type=_numbers, metavar="T,U,…", help="thresholds, one row each")
    sub.add_argument("--tokens", type=int, default=0, help="stop after this many tokens; 0 for all")
    sub.add_argument("--oracle", action="store_true", help="select by true expert norms instead of the routers")

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
        return [float(part) for part in text.split(",") if part.strip()]
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


def _plan_text(plan: Any, config: ConvertConfig) -> str:
    from .report import table

    rows = [
        [b.name, b.kind, b.activation, f"{b.d_model}->{b.width}", b.experts, b.width // b.experts] for b in plan.blocks
    ]
    lines = [
        table(["block", "kind", "activation", "size", "experts", "neurons each"], rows),
        "",
        f"stages: {', '.join(plan.summary()['stages'])} (preset {config.preset} of {', '.join(PRESETS)})",
        f"parameters: {plan.dense_parameters:,} dense, {plan.added_parameters:,} added by routers and stand-ins",
        f"peak memory: about {plan.peak_memory_bytes / 1e9:.2f} GB; disk: about {plan.disk_bytes / 1e9:.2f} GB",
    ]
    return "\n".join(lines)


def _eval(arguments: argparse.Namespace, command: list[str]) -> int:
    from . import hub
    from .data import make_batches, read_documents
    from .evaluate import evaluate
    from .report import eval_table

    config = resolve(DataConfig, _given(arguments, DataConfig))
    if arguments.tokens < 0:
        raise UserError(f"--tokens {arguments.tokens}: must be 0 or more; 0 is all of them")
    settings = [{"active": a} for a in arguments.active or []] + [{"tau": t} for t in arguments.tau or []]
    for setting in settings:
        check_active(setting.get("active", 1.0))
    model_config = hub.read_config(arguments.model)
    stored = hub.stored_config(model_config)
    for setting in settings:
        check_tau(setting.get("tau", 0.0), stored.gate if stored else "max")
    limit = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    config.max_length = min(config.max_length, limit) if limit and limit > 0 else config.max_length
    part = arguments.part or ("held_out" if config.data == "builtin" else "all")
    documents = read_documents(config.data, part, config.text_column)
    processor = hub.load_processor(arguments.model, model_config)
    causal = hub.is_causal(hub.model_class(model_config, arguments.model))
    batches = make_batches(documents, processor, config, packed=causal)
    batches = batches.first(arguments.tokens) if arguments.tokens else batches
    model = hub.load_model(arguments.model, model_config)
    if stored:
        settings = settings or [{"active": a} for a in sorted({*(b.active for b in stored.budgets), 1.0})]
    settings = [{**s, "oracle": True} for s in settings] if arguments.oracle else settings
    rows = evaluate(model, batches, settings)
    _emit(arguments, command, 0, rows, eval_table(rows))
    return 0


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
