"""How one layer would scale to more threads than this machine has cores, by timing each thread's part on its own.

The library can have the parts of a layer computed one after the other. The time on N cores is then that of the longest
part of each phase, phases added up. What cores do to each other is left out: barriers, the last cache and memory that
they share. Weights lie in the last cache, if it holds them.

python recipes/bench_threads.py --tokens 128,512 --threads 2,16
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import time

import torch

from d2dmoe.kernels import native
from d2dmoe.measure.pairs import make_pair, parse_layer
from d2dmoe.moe.layer import GateState
from d2dmoe.moe.prepared import settings

PART = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
PARTS = ctypes.CFUNCTYPE(None, ctypes.c_int, PART, ctypes.c_void_p)


class Cores:
    """Runs the parts of each phase in turn; `times` are seconds, for each phase those of its parts."""

    def __init__(self):
        self.times: list[list[float]] = []
        self.callback = PARTS(self._phase)

    def _phase(self, parts: int, part, context: int) -> None:
        self.times.append([])
        for number in range(parts):
            start = time.thread_time()
            part(context, number, parts)
            self.times[-1].append(time.thread_time() - start)


def phases(plan: native.Plan, x: torch.Tensor, threads: int, groups: int | None, rounds: int) -> list[float]:
    """Milliseconds of the longest part of each phase, which are medians of `rounds`.

    With `groups` of 1 every thread takes all experts on tokens of its own.
    """
    forward = native.library()[0].d2dmoe_forward_by
    forward.argtypes = [*native.library()[0].d2dmoe_forward.argtypes, PARTS]
    y, found = torch.empty(len(x), plan.d_out, dtype=x.dtype), []
    if groups:
        os.environ["D2DMOE_GROUPS"] = str(groups)
    for _ in range(rounds):
        cores = Cores()
        if forward(plan.call, x.data_ptr(), x.stride(0), None, len(x), y.data_ptr(), threads, cores.callback):
            raise MemoryError
        if len(cores.times) == 1:  # the first thread to come took all tiles, which are alike
            cores.times = [[sum(cores.times[0]) / threads]]
        found.append(cores.times)
    os.environ.pop("D2DMOE_GROUPS", None)
    each = [[statistics.median(times) for times in zip(*phase, strict=True)] for phase in zip(*found, strict=True)]
    return [1000 * max(parts) for parts in each]


@torch.no_grad()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layer", default="d=768,f=3072,experts=96")
    parser.add_argument("--tokens", default="128,512,2048")
    parser.add_argument("--threads", default="1,2,4,8,16,32,64")
    parser.add_argument("--active", type=float, default=0.25)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--expert-dtype", choices=("int8", "int8-dynamic"))
    parser.add_argument("--groups", type=int, help="by default as the library chooses")
    parser.add_argument("--rounds", type=int, default=25)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dtype = getattr(torch, arguments.dtype)
    spec = parse_layer(arguments.layer)
    dense, layer = make_pair(**spec, dtype=dtype)
    layer.gate_state = GateState("topk", 1 - arguments.active)
    tensors = layer.prepared.tensors(layer, layer.gate_state, None)
    given = (layer.activation, *settings(layer.gate_state))
    plan = native.Plan(tensors, *given, tiles={}, expert_dtype=arguments.expert_dtype)
    plan(torch.zeros(64, spec["d"], dtype=dtype))  # weights are put into tiles now
    print("| tokens | threads | dense / threads, ms | tiles of tokens | and groups of experts | gain | phases |")
    print("|---|---|---|---|---|---|---|")
    for tokens in map(int, arguments.tokens.split(",")):
        x, times = torch.randn(tokens, spec["d"]).to(dtype), []
        for _ in range(arguments.rounds):
            start = time.thread_time()
            dense(x)
            times.append(time.thread_time() - start)
        for threads in map(int, arguments.threads.split(",")):
            before = sum(phases(plan, x, threads, 1, arguments.rounds))
            after = phases(plan, x, threads, arguments.groups, arguments.rounds)
            cells = [f"{1000 * statistics.median(times) / threads:.3f}", f"{before:.3f}", f"{sum(after):.3f}"]
            parts = " + ".join(f"{ms:.3f}" for ms in after)
            print(f"| {tokens} | {threads} | {' | '.join(cells)} | {before / sum(after):.2f} | {parts} |", flush=True)


if __name__ == "__main__":
    main()
