"""Loss of a head by SVD-softmax at shares of its work, everything else dense, and of its factors alone.

    python recipes/head_alone.py --model checkpoints/gpt2-mini --data ../shared/data/wikitext2/train.txt \
        --eval-data ../shared/data/wikitext2/valid.txt

The factors alone, at the rank that the same share pays for, are a low-rank head. Loss is in nats per token above the
dense model.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

import torch
import transformers

from d2dmoe import hub
from d2dmoe.attention.head import fit_head
from d2dmoe.config import ConvertConfig, D2DMoEConfig, UserError, resolve
from d2dmoe.config.budgets import Budget
from d2dmoe.config.projections import Projection, ProjectionState
from d2dmoe.measure.evaluate import evaluate, prepare
from d2dmoe.measure.metrics import quality_loss
from d2dmoe.moe.loader import attach
from d2dmoe.pipeline.parts import both_parts
from d2dmoe.pipeline.plan import make_plan
from d2dmoe.report import table


def rows_of(config: ConvertConfig, eval_data: str, eval_limit: int, shares: list[float]) -> list[list]:
    """One row of the table for each share."""
    subject = prepare(config.model, replace(config, data=eval_data), [], tokens=eval_limit)
    plan = make_plan(subject.config, replace(config, head_active=max(shares)))
    batches, _ = both_parts(config, plan.model_class, subject.config, subject.tokenizer)
    batches = batches.shuffled(config.seed).first(config.calibration_tokens)
    model, (head,) = hub.load_model(config.model, subject.config), plan.projections
    record = D2DMoEConfig(blocks=plan.blocks, router_width=1, projections=[head])
    attach(model, record, [torch.arange(block.width) for block in plan.blocks])
    rows = []
    for share in shares:
        both = fit_head(model, batches, share), rough_only(head, share)
        cells = []
        for state in both:
            budget = Budget(0.5, [0.0] * len(plan.blocks))
            budget.projection_states = [state]
            record.budgets.replace([budget])
            (found,) = evaluate(model, subject.batches, [{"active": 0.5}], metric=subject.metric)
            cells.append(f"{quality_loss(found):.4f}")
        rows.append([f"{share:g}", *both[0].ranks, both[0].candidates, *cells])
    return rows


def rough_only(head: Projection, share: float) -> ProjectionState:
    """No exact logits: a low-rank head of the same work."""
    return ProjectionState("svd-softmax", (max(1, min(head.affordable_rank(share), head.rank)),))


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="hub id or folder")
    parser.add_argument("--data", required=True)
    parser.add_argument("--eval-data", required=True)
    parser.add_argument("--eval-limit", type=int, default=16_384, help="tokens")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--shares", default="0.15,0.25,0.4,0.6")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    transformers.logging.disable_progress_bar()
    keys = {name: getattr(arguments, name) for name in ("model", "data", "max_length", "seed")}
    shares = [float(share) for share in arguments.shares.split(",")]
    try:
        config = resolve(ConvertConfig, {**keys, "head": "svd-softmax"})
        rows = rows_of(config, arguments.eval_data, arguments.eval_limit, shares)
    except UserError as error:
        print(f"head_alone.py: {error}", file=sys.stderr)
        return 1
    print(table(["share", "rank", "exact outputs", "loss", "loss of the factors alone"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
