"""Time linear maps of usual shapes in int8 by the native library, beside torch's product in fp32, weights from memory.

python recipes/bench_linear.py
D2DMOE_AMX_INT8=0 python recipes/bench_linear.py --maps 768x2304 --tokens 512
"""

from __future__ import annotations

import argparse

import torch

from d2dmoe.kernels import LinearPlan
from d2dmoe.measure.bench import in_turn
from d2dmoe.measure.timing import measure

BYTES = 120 * 2**20  # of fp32 weights that take turns: more than the last cache holds


def rows(inputs: int, outputs: int, tokens: list[int], seconds: float) -> list[list[str]]:
    """A line of the table for each token count: medians in µs, and times as fast as fp32."""
    weights = [torch.randn(outputs, inputs) for _ in range(max(2, BYTES // (4 * inputs * outputs)))]
    plans = {
        "fp32": [lambda x, w=w: torch.nn.functional.linear(x, w) for w in weights],
        "int8": [LinearPlan(w) for w in weights],
        "int8-dynamic": [LinearPlan(w, rounds=True) for w in weights],
    }
    found = []
    for count in tokens:
        given = [torch.randn(count, inputs) for _ in range(4)]
        times = measure({name: in_turn(each) for name, each in plans.items()}, given, seconds=seconds, clock="cpu")
        median = {name: sorted(values)[len(values) // 2] for name, values in times.items()}
        cells = [f"{1000 * ms:.0f} ({median['fp32'] / ms:.1f})" for ms in median.values()]
        found.append([f"{inputs} → {outputs}", str(count), *cells])
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--maps", default="768x2304,768x50257", help="inputs x outputs")
    parser.add_argument("--tokens", default="1,16,128,512")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each figure")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| map | tokens | fp32 | int8 | int8-dynamic |\n|---|---|---|---|---|")
    for shape in arguments.maps.split(","):
        inputs, outputs = map(int, shape.split("x"))
        for line in rows(inputs, outputs, [int(n) for n in arguments.tokens.split(",")], arguments.seconds):
            print(f"| {' | '.join(line)} |", flush=True)


if __name__ == "__main__":
    main()
