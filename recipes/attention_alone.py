"""Loss of attention projections at a share of their work, feed-forward blocks dense: each way alone, and `auto`.

Output projections are fitted on what they get from the converted ones before them; with `--no-compensate` they are not.
With `--heal STEPS` the bases of `auto` are then trained by distillation from the dense model, the shares taking turns.
With `--networks` it is the paper's way instead (`--attention mlp`): all experts on, then with the paper's gate, nothing
for skipped experts, and with the default gate and refitted down projections; routers are narrow in both. Shares count
routers.

    python recipes/attention_alone.py --model checkpoints/gpt2-mini --data ../shared/data/wikitext2/train.txt \
        --eval-data ../shared/data/wikitext2/valid.txt --eval-limit 16384

Loss is that of `recipes/compare.py`: nats per token above the dense model, or 1 - cosine for embeddings.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from alone import Rows, keys_of, parser, prepared, shares_of, show
from compare import places
from torch import nn

from d2dmoe import hub
from d2dmoe.attention.fit import fit_all
from d2dmoe.config import PRESETS, ConvertConfig, D2DMoEConfig, resolve
from d2dmoe.config.budgets import Budget
from d2dmoe.config.record import router_width
from d2dmoe.measure.evaluate import evaluate
from d2dmoe.measure.metrics import quality_loss
from d2dmoe.moe.loader import attach
from d2dmoe.pipeline.model import convert_model
from d2dmoe.pipeline.plan import ConversionPlan
from d2dmoe.stages.budgets.allocate import give_out
from d2dmoe.stages.budgets.receivers import KINDS, measure_ways
from d2dmoe.stages.compensate import compensate, forget_refits
from d2dmoe.stages.heal import heal


def rows_of(config: ConvertConfig, eval_data: str, eval_limit: int, shares: list[float]) -> Rows:
    """One row of the table for each way."""
    subject, plan, all_batches = prepared(config, eval_data, eval_limit)
    batches = all_batches.first(config.calibration_tokens)
    model = hub.load_model(config.model, subject.config)
    record = D2DMoEConfig(blocks=plan.blocks, router_width=1, projections=plan.projections)
    attach(model, record, [torch.arange(block.width) for block in plan.blocks])
    measured = measure_ways(model, batches, *fit_all(model, batches, config.seed), "auto")
    rows = []
    for name in KINDS:
        groups, budgets = measured.receivers(name), []
        for share in shares:
            given = give_out(share, [g.curve() for g in groups], [g.macs for g in groups], [1] * len(groups))
            states = {}
            for group, own in zip(groups, given, strict=True):
                states |= group.settings(own)
            budget = Budget(share, [0.0] * len(plan.blocks))
            budget.projection_states = [states[n] for n in sorted(states)]
            budgets.append(budget)
        forget_all(model, record, budgets)
        if config.compensate:
            for number in range(len(budgets)):
                compensate(model, batches, record, number)
        settings = [{"active": share} for share in shares]
        found = evaluate(model, subject.batches, settings, metric=subject.metric, tokenizer=subject.tokenizer)
        rows.append([name, *cells(found)])
    if config.heal:
        heal(model, all_batches, config, record)
        found = evaluate(model, subject.batches, settings, metric=subject.metric, tokenizer=subject.tokenizer)
        rows.append([f"{name}, healed", *cells(found)])
    return rows


def forget_all(model: nn.Module, record: D2DMoEConfig, budgets: list[Budget]) -> None:
    """Other budgets in the place of those that the record has, without their refits."""
    record.budgets.replace(budgets)
    for number in range(len(budgets)):
        forget_refits(model, record, number)


def cells(found: list[dict[str, Any]]) -> list[str]:
    """Loss and share of the projections' FLOPs of each evaluation."""
    return [f"{quality_loss(r):.4g} (at {r['flops_fraction_attention']:.3f})" for r in found]


NETWORKS = {
    "mlp, paper": {"preset": "paper", "router_width": 0},
    "mlp, share and refit": {"stand_in": "refit"},
}


def active_for(share: float, plan: ConversionPlan, config: ConvertConfig) -> float:
    """The active fraction at which networks and their routers take this share of the projections' work."""
    pairs = list(zip(plan.networks, plan.projections, strict=True))
    dense = sum(p.macs for _, p in pairs)
    routers = sum(router_width(config.router_width, b) * (b.d_model + b.experts) for b, _ in pairs)
    everything = sum(b.width * (p.inputs + p.outputs) for b, p in pairs)
    return (share * dense - routers) / everything


def rows_of_networks(config: ConvertConfig, eval_data: str, eval_limit: int, shares: list[float]) -> Rows:
    """The same for `--attention mlp`: everything on, then the gates of `NETWORKS`, on the same networks."""
    subject, plan, batches = prepared(config, eval_data, eval_limit)
    dense, rows = hub.load_model(config.model, subject.config), []
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, keys) in enumerate(NETWORKS.items()):
            own = resolve(ConvertConfig, {**vars(config), **PRESETS[keys.get("preset", "default")], **keys})
            own.active = [round(active_for(share, plan, own), 4) for share in shares]
            model, work = hub.load_model(config.model, subject.config), Path(scratch, str(number))
            work.mkdir()
            if number:
                shutil.copy(Path(scratch, "0", "networks.safetensors"), work)
            convert_model(model, own, batches, blocks=[], projections=plan.projections, work=work, resume=True)
            found = evaluate(
                model, subject.batches, [{"active": active} for active in (*own.active, 1.0)], original=dense,
                metric=subject.metric, tokenizer=subject.tokenizer,
            )  # fmt: skip
            own_cells = cells(found)
            rows += [["mlp, all on", *[own_cells[-1]] * len(shares)]] * (not number) + [[name, *own_cells[:-1]]]
    return rows


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    model = "hub id, folder, or minilm for the encoder in its Python package"
    flags = parser(__doc__, model=model, shares="0.25,0.5,0.75")
    flags.add_argument("--networks", action="store_true", help="the paper's way, --attention mlp, alone")
    flags.add_argument("--no-compensate", dest="compensate", action="store_false")
    flags.add_argument("--attention-tokens", type=int, default=700_000, help="of the distillation")
    flags.add_argument("--heal", type=int, default=0, help="steps, on --router-tokens of text")
    flags.add_argument("--heal-learning-rate", type=float, default=0.0, help="as of d2dmoe convert; bases get a tenth")
    flags.add_argument("--heal-tokens", type=int, default=2048, help="of a step")
    arguments = flags.parse_args(argv)
    if arguments.networks and arguments.heal:
        flags.error("--heal trains bases, and --networks has none")
    if arguments.model == "minilm":
        arguments.model = places()["minilm"]
    shares = shares_of(arguments)

    def make() -> Rows:
        own = {
            key: getattr(arguments, key) for key in ("heal", "heal_tokens", "heal_learning_rate") * bool(arguments.heal)
        }
        own |= {
            "compensate": arguments.compensate,
            "attention_tokens": arguments.attention_tokens,
            "attention": "mlp" if arguments.networks else "auto",
        }
        config = resolve(ConvertConfig, {**keys_of(arguments), **own})
        way = rows_of_networks if arguments.networks else rows_of
        return way(config, arguments.eval_data, arguments.eval_limit, shares)

    return show("attention_alone.py", ["way", *(f"{share:g}" for share in shares)], make)


if __name__ == "__main__":
    sys.exit(main())
