"""How long a conversion will take on this machine: its products are counted, and a few like them timed."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import nn

from ..config.options import ConvertConfig
from ..config.record import Block
from ..config.sizes import targets
from ..stages.budgets.costs import TOKENS as COST_TOKENS
from ..stages.budgets.fit import (
    FIRST_TOKENS,
    REGRESSED,
    ROUGH_PENALTIES,
    ROUGH_PER_REGRESSOR,
    ROUGH_TOKENS,
    SEARCH_TOKENS,
)
from ..stages.coactivation import SKETCH
from ..stages.routers.fit import CANDIDATES
from ..stages.standins import RIDGES

ROWS, SIZE, TRIES = 1024, 1536, 5  # of the products that are timed
FIXED = 14.0  # seconds for imports, the report and the figures in it
PASSES, PRODUCTS, SOLVES = 0.45, 0.7, 0.4  # efficiency, relative to the products that are timed
STEP = 0.005  # seconds for a router and a step of its training
SEARCHES = 1.3  # passes over the tokens of a search for thresholds


def predicted_seconds(model: nn.Module, blocks: Sequence[Block], config: ConvertConfig) -> float:
    """Seconds that a conversion takes, without healing, sparsify and attention.

    Args:
        model: A skeleton of the dense model.
        blocks: The blocks that become experts.
        config: What is asked for.
    """
    rate, double = _throughput(torch.float32), _throughput(torch.float64)
    passes, products, solves = _counts(model, blocks, config)
    training = config.router_tokens / config.router_batch * len(blocks) * (config.router_fit != "closed-form")
    work = passes / (PASSES * rate) + products / (PRODUCTS * rate) + solves / (SOLVES * double)
    return FIXED + work + STEP * training


def _throughput(dtype: torch.dtype) -> float:
    """FLOPs per second of a product on the threads that there are, with cores of their own; the best of some tries.

    Processor time is taken, so that other work on the cores does not count.
    """
    a, b = torch.ones(ROWS, SIZE, dtype=dtype), torch.ones(SIZE, SIZE, dtype=dtype)
    best = float("inf")
    for _ in range(TRIES):
        started = time.process_time()
        a @ b
        best = min(best, (time.process_time() - started) / torch.get_num_threads())
    return 2 * ROWS * SIZE * SIZE / best


def _counts(model: nn.Module, blocks: Sequence[Block], config: ConvertConfig) -> tuple[float, float, float]:
    """FLOPs of forward passes, of moments, and of what is solved in double precision."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    logits = 2 * head.weight.numel() if head is not None else 0
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    looked_up |= {id(head.weight)} if head is not None else set()
    body = 2 * sum(p.numel() for p in model.parameters() if id(p) not in looked_up)
    count, budgets, tokens = len(blocks), len(targets(config)), config.calibration_tokens
    trained, closed = config.router_fit != "closed-form", config.router_fit != "trained"
    regressed, shared = config.stand_in in REGRESSED, config.allocation == "sensitivity"
    passes = tokens * body * (1 + closed + (not closed))  # profiles; routers or thresholds
    passes += trained * config.router_tokens * body
    passes += budgets * SEARCHES * (regressed * min(tokens, FIRST_TOKENS) + min(tokens, SEARCH_TOKENS)) * body
    if shared:
        passes += min(tokens, COST_TOKENS) * budgets * count * (body * (count + 1) / (2 * count) + logits)
    passes += config.eval_tokens * (1 + budgets) * (body + logits) * (1 + bool(config.also_eval))
    products = solves = 0.0
    for block in blocks:
        n = block.slots + block.experts + block.d_model
        up = 2 * block.width * block.d_model * (2 if block.kind == "glu" else 1)
        products += 2 * tokens * SKETCH * block.width
        if closed:
            features = CANDIDATES + block.experts
            products += tokens * (up + 2 * features * (features + 2 * block.d_model) + 2 * block.slots * block.size)
        if not regressed:
            continue
        rough = min(tokens, max(ROUGH_TOKENS, ROUGH_PER_REGRESSOR * n)) if shared else 0
        per_token = n * n + 2 * n * block.d_model + 2 * block.width * block.d_model
        products += (rough + tokens) * (budgets * per_token + up)
        fits = budgets * (len(RIDGES) + len(ROUGH_PENALTIES) * shared)
        rest = n - block.d_model
        solves += fits * sum(m**3 / 3 + 2 * m * m * block.d_model for m in (n, rest))
        solves += fits * 2 * 9 * block.d_model**3  # eigenvectors
        products += fits * 2 * 2 * n * n * block.d_model
    return passes, products, solves
