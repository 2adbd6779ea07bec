"""Python time of one layer call at one token: what passes between the call and the C function.

    python recipes/layer_overhead.py

A layer so small (64 -> 256, 16 experts, a quarter of them active, with stand-ins) that little else is left. It is time
of the calling thread, so other work on the machine counts less. The C function alone is timed with its arguments ready.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from d2dmoe.config import Block
from d2dmoe.moe.gate import GateState
from d2dmoe.moe.layer import DynamicFFN

CALLS, ROUNDS = 20_000, 5


def microseconds(function: Callable[[], object]) -> float:
    """Median over the rounds of the mean time of a call."""
    means = []
    for _ in range(ROUNDS):
        start = time.thread_time()
        for _ in range(CALLS):
            function()
        means.append((time.thread_time() - start) / CALLS * 1e6)
    return statistics.median(means)


@torch.no_grad()
def main() -> None:
    """Time and print."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    block = Block("mlp", "ffn", "gelu", 64, 256, "up", None, "down", experts=16)
    layer = DynamicFFN(
        block, d_out=64, biases=(True, False, True), act=torch.nn.GELU(), router_width=16, budgets=1, delta_rank=8
    )
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    layer.requires_grad_(False).eval().gate_state = GateState("topk", 0.75, 0)
    x = torch.randn(1, 1, 64)
    layer(x)
    whole = microseconds(partial(layer, x))
    plan = next(iter(layer.prepared.entries.values())).sparse
    row, y = x.reshape(1, 64), torch.empty(1, 64)
    alone = microseconds(partial(plan.forward, plan.call, row.data_ptr(), 64, None, 1, y.data_ptr(), 1))
    print(f"layer {whole:.1f}, C function {alone:.1f}, Python {whole - alone:.1f} microseconds")


if __name__ == "__main__":
    main()
