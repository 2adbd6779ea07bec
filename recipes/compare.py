"""Quality against active fraction for several presets and seeds on one model: the table behind every claim.

    python recipes/compare.py --model checkpoints/gpt2-mini --data ../shared/data/wikitext2/train.txt \
        --eval-data ../shared/data/wikitext2/valid.txt --presets paper,default --seeds 0,1,2

For each preset and seed the model is converted in memory with the same calibration data and router training, then
evaluated on text that calibration never saw. Columns: mean over seeds, standard deviation, and the loss increase over
the dense model as a ratio to the `paper` preset's, its loss interpolated to the same measured active fraction.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from pathlib import Path

from d2dmoe import hub
from d2dmoe.cli import add_fields
from d2dmoe.config import ConvertConfig, resolve
from d2dmoe.convert import batches_for, convert_model
from d2dmoe.data import make_batches, read_documents
from d2dmoe.evaluate import evaluate
from d2dmoe.plan import make_plan
from d2dmoe.report import envelope, table, write_json


def loss(row: dict, value: float) -> float:
    """Nats per token for perplexity, one minus the value for accuracy and cosine."""
    return math.log(value) if row["metric"]["name"] == "perplexity" else 1.0 - value


def run_one(config: ConvertConfig, evaluation: str, tokens: int) -> list[dict]:
    """Convert in memory and evaluate; one row per active fraction."""
    model_config = hub.read_config(config.model)
    plan = make_plan(model_config, config)
    processor = hub.load_processor(config.model, model_config)
    calibration, _ = batches_for(config, model_config, plan, processor)
    causal = hub.is_causal(plan.model_class)
    unseen = make_batches(read_documents(evaluation, "all"), processor, config, packed=causal)
    unseen = unseen.first(tokens) if tokens else unseen
    model = hub.load_model(config.model, model_config)
    started = time.time()
    convert_model(model, config, calibration, blocks=plan.blocks)
    minutes = (time.time() - started) / 60
    rows = evaluate(model, unseen, [{"active": a} for a in config.active])
    return [{**row, "minutes": minutes, "increase": increase(row)} for row in rows]


def increase(row: dict) -> float:
    """Loss above the dense model's."""
    return loss(row, row["metric"]["value"]) - loss(row, row["dense"]["value"])


def reference_at(rows: list[dict], active: float) -> float:
    """The paper's loss increase at an active fraction, log-linear between its measured points."""
    points = sorted((row["active_fraction"], max(row["increase"], 1e-9)) for row in rows)
    for (a, low), (b, high) in itertools.pairwise(points):
        if active <= b or b == points[-1][0]:
            share = (active - a) / (b - a)
            return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
    return points[0][1]


def summarise(rows: list[dict], presets: list[str], actives: list[float]) -> str:
    """Markdown: one line per preset and budget."""
    body = []
    for preset in presets:
        for active in actives:
            mine = [r for r in rows if r["preset"] == preset and r["active"] == active]
            values = [r["metric"]["value"] for r in mine]
            ratios = [
                r["increase"] / reference_at([p for p in rows if p["preset"] == "paper" and p["seed"] == r["seed"]],
                                             r["active_fraction"])
                for r in mine
            ] if "paper" in presets else [float("nan")]  # fmt: skip
            body.append([
                preset, active, statistics.mean(r["active_fraction"] for r in mine),
                statistics.mean(r["flops_fraction_model"] for r in mine), statistics.mean(values),
                statistics.stdev(values) if len(values) > 1 else 0.0, statistics.mean(r["increase"] for r in mine),
                statistics.mean(ratios),
            ])  # fmt: skip
    metric = rows[0]["metric"]["name"]
    head = ["preset", "asked", "active", "model FLOPs", metric, "s.d.", "loss increase", "ratio to paper"]
    return table(head, body)


def main() -> None:
    """Run the grid and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_fields(parser, ConvertConfig)
    parser.add_argument("--eval-data", required=True, help="text that calibration does not see")
    parser.add_argument("--eval-limit", type=int, default=65_536, help="tokens of it; 0 for all")
    parser.add_argument("--presets", default="paper,default")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--json", type=Path)
    arguments = vars(parser.parse_args())
    evaluation, limit, output = (arguments.pop(k) for k in ("eval_data", "eval_limit", "json"))
    presets, seeds = arguments.pop("presets").split(","), [int(s) for s in arguments.pop("seeds").split(",")]
    arguments.setdefault("active", [0.125, 0.25, 0.5, 0.75])
    rows = []
    for seed in seeds:
        for preset in presets:
            config = resolve(ConvertConfig, {**arguments, "preset": preset, "seed": seed})
            rows += [{"preset": preset, "seed": seed, **row} for row in run_one(config, evaluation, limit)]
            for row in rows[-len(config.active) :]:
                print(preset, seed, row["active"], round(row["active_fraction"], 4), row["metric"]["value"], flush=True)
    print(summarise(rows, presets, arguments["active"]))
    print(f"\ndense {rows[0]['metric']['name']} {rows[0]['dense']['value']:.4f}, {rows[0]['tokens']} tokens")
    if output:
        write_json(output, envelope(["python", "recipes/compare.py"], seeds[0], rows))


if __name__ == "__main__":
    main()
