"""Time single attention projections with random weights on few tokens: dense, and at each way of doing less.

python recipes/bench_projections.py --shares 0.5,0.25 --tokens 1
"""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import cycle, islice

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from d2dmoe.config.projections import Projection, ProjectionState
from d2dmoe.measure.timing import CLOCKS
from d2dmoe.moe.projected import make_projection
from d2dmoe.moe.projection import DynamicProjection

SHAPES = ("linear:768:768", "conv:768:2304:3", "linear:768:2304", "linear:2048:2048")
CACHES = 300 << 20  # bytes of weights to go through in turn: more than caches hold, as in a model


def build(shape: str, seed: int) -> tuple[nn.Module, DynamicProjection]:
    """`(dense, converted)` for ``kind:inputs:outputs`` and, with ``:sections``, that many equal sections."""
    kind, inputs, outputs, sections = (*shape.split(":"), "1")[:4]
    inputs, outputs, sections = int(inputs), int(outputs), int(sections)
    torch.manual_seed(seed)
    dense = nn.Linear(inputs, outputs) if kind == "linear" else Conv1D(outputs, inputs)
    nn.init.normal_(dense.requires_grad_(False).weight, std=inputs**-0.5)
    projection = Projection("projection", "q", 0, inputs, outputs, [outputs // sections] * sections)
    projection.rank = max(projection.full_ranks)
    layer = make_projection(dense, projection, 0)
    for tensor in (layer.low_rank_in, layer.low_rank_out, layer.output_mean):
        tensor.normal_(std=outputs**-0.5)
    layer.channel_norms.copy_(layer.matrix().norm(dim=0))
    return dense, layer


def settings(layer: DynamicProjection, share: float) -> dict[str, ProjectionState]:
    """Every way at this share of the work; the last one has a low-rank term of a quarter of that besides."""
    projection = layer.projection
    ranks = tuple(int(share * projection.inputs * w / (projection.inputs + w)) for w in projection.sections)
    scores = torch.randn(2048, projection.inputs).abs() * layer.channel_norms
    threshold = float(scores.flatten().kthvalue(int((1 - share) * scores.numel())).values)
    return {
        "low-rank": ProjectionState("low-rank", ranks),
        "channels": ProjectionState("channels", (), threshold),
        "channels and low-rank": ProjectionState("channels", tuple(r // 4 for r in ranks), threshold),
    }


@torch.no_grad()
def times(shape: str, tokens: int, share: float, rounds: int, clock: str) -> dict[str, float]:
    """Median microseconds of a call by way. The ways take turns; every call meets weights that are in no cache."""
    now = CLOCKS[clock]
    first = build(shape, 0)
    copies = max(2, CACHES // first[0].weight.nbytes)
    pairs = [first, *(build(shape, seed) for seed in range(1, copies))]
    states = settings(first[1], share)
    seconds: dict[str, list[float]] = {name: [] for name in ("dense", *states)}
    inputs = list(islice(cycle(torch.randn(8, tokens, first[1].projection.inputs)), copies))
    for turn in range(rounds + 1):
        for name, found in seconds.items():
            for (dense, layer), x in zip(pairs, inputs, strict=True):
                module = dense if name == "dense" else layer
                layer.gate.own = states.get(name, layer.gate.own)
                start = now()
                module(x)
                found += [now() - start] * (turn > 0)
    return {name: 1e6 * statistics.median(found) for name, found in seconds.items()}


def main() -> None:
    """Print a line for every shape, token count and share."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=",".join(SHAPES), help="kind:inputs:outputs, and :sections")
    parser.add_argument("--tokens", default="1")
    parser.add_argument("--shares", default="0.5,0.25", help="of the dense map's work")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    started = time.monotonic()
    for shape in arguments.shapes.split(","):
        for tokens in map(int, arguments.tokens.split(",")):
            for share in map(float, arguments.shares.split(",")):
                found = times(shape, tokens, share, arguments.rounds, arguments.clock)
                columns = ", ".join(f"{name} {us:.0f} µs {found['dense'] / us:.2f}x" for name, us in found.items())
                print(f"{shape}, {tokens} tokens, share {share:g}: {columns}", flush=True)
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
