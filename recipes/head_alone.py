"""Loss of a head by SVD-softmax at shares of its work, everything else dense, and of its factors alone.

    python recipes/head_alone.py --model checkpoints/gpt2-mini --data ../shared/data/wikitext2/train.txt \
        --eval-data ../shared/data/wikitext2/valid.txt

The factors alone, at the rank that the same share pays for, are a low-rank head. Loss is in nats per token above the
dense model.
"""

from __future__ import annotations

import sys

import torch
from alone import Rows, keys_of, parser, prepared, shares_of, show

from d2dmoe import hub
from d2dmoe.attention.head import fit_head
from d2dmoe.config import ConvertConfig, D2DMoEConfig, resolve
from d2dmoe.config.budgets import Budget
from d2dmoe.config.projections import Projection, ProjectionState
from d2dmoe.measure.evaluate import evaluate
from d2dmoe.measure.metrics import quality_loss
from d2dmoe.moe.loader import attach


def rows_of(config: ConvertConfig, eval_data: str, eval_limit: int, shares: list[float]) -> Rows:
    """One row of the table for each share."""
    subject, plan, batches = prepared(config, eval_data, eval_limit, head_active=max(shares))
    batches = batches.first(config.calibration_tokens)
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
    arguments = parser(__doc__, model="hub id or folder", shares="0.15,0.25,0.4,0.6").parse_args(argv)
    head = ["share", "rank", "exact outputs", "loss", "loss of the factors alone"]

    def make() -> Rows:
        config = resolve(ConvertConfig, {**keys_of(arguments), "head": "svd-softmax"})
        return rows_of(config, arguments.eval_data, arguments.eval_limit, shares_of(arguments))

    return show("head_alone.py", head, make)


if __name__ == "__main__":
    sys.exit(main())
