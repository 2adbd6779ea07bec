"""Where one converted layer spends its time, and what OpenVINO adds to it.

python recipes/openvino_layer.py --model runs/minilm-d2dmoe --expert-dtype int8-dynamic --tokens 64 2048
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import openvino
import torch
from openvino import opset13

from d2dmoe import hub, set_gate
from d2dmoe.kernels import native
from d2dmoe.moe.layer import DynamicFFN, layers
from d2dmoe.moe.prepared import settings
from d2dmoe.openvino.graph import layer_inputs, make_node

OPTIONS = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}


def in_openvino(layer: DynamicFFN, state: Any, expert_dtype: str | None, rows: int, x: np.ndarray) -> Callable:
    """The layer as a model of its own, for `rows` tokens or, at -1, for any number."""
    tokens, budget = opset13.parameter([rows, x.shape[1]], np.float32), opset13.parameter([], np.int32)
    node = make_node(tokens.output(0), budget.output(0), *layer_inputs(layer, [state], expert_dtype))
    model = openvino.Model([node.output(0)], [tokens, budget])
    request = openvino.Core().compile_model(model, "CPU", OPTIONS).create_infer_request()
    inputs = [x, np.array(0, dtype=np.int32)]
    return lambda: request.infer(inputs, share_inputs=True, share_outputs=True)


def ways(layer: DynamicFFN, state: Any, expert_dtype: str | None, x: torch.Tensor) -> dict[str, Callable]:
    """Functions to time, by name."""
    tensors = layer.prepared.tensors(layer, state, None)
    bare = {**tensors, "linear_in": None, "linear_out": None}
    given = (layer.activation, *settings(state))
    whole, plain = (native.Plan(t, *given, expert_dtype=expert_dtype) for t in (tensors, bare))
    run, data = state.select(layer.router(x)), x.numpy()
    tokens = opset13.parameter([-1, x.shape[1]], np.float32)
    relu = openvino.Model([opset13.relu(tokens).output(0)], [tokens])
    request = openvino.Core().compile_model(relu, "CPU", OPTIONS).create_infer_request()
    return {
        "native library": lambda: whole(x), "  without the linear term": lambda: plain(x),
        f"  and without the router ({run.float().mean():.0%} active)": lambda: plain(x, run),
        "OpenVINO, fixed shape": in_openvino(layer, state, expert_dtype, len(x), data),
        "OpenVINO, sizes left open": in_openvino(layer, state, expert_dtype, -1, data),
        "OpenVINO, a ReLU alone": lambda: request.infer([data], share_inputs=True, share_outputs=True),
    }  # fmt: skip


@torch.no_grad()
def main() -> None:
    """Print medians of the processor time of interleaved calls."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="converted encoder")
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument("--active", type=float, default=0.25)
    parser.add_argument("--expert-dtype", choices=("int8", "int8-dynamic"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 2048])
    parser.add_argument("--rounds", type=int, default=60)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = hub.read_config(arguments.model)
    model = hub.load_model(arguments.model, config)
    layer = layers(model)[arguments.layer]
    seen: list[torch.Tensor] = []
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, -2).clone()))
    generator = torch.Generator().manual_seed(0)
    model(input_ids=torch.randint(5, config.vocab_size, (-(-max(arguments.tokens) // 64), 64), generator=generator))
    with set_gate(model, active=arguments.active):
        state = layer.gate_state
    for count in arguments.tokens:
        functions = ways(layer, state, arguments.expert_dtype, seen[0][:count].contiguous())
        times: dict[str, list[float]] = {name: [] for name in functions}
        for turn in range(arguments.rounds + 2):
            for name, function in functions.items():
                start = time.process_time()
                function()
                times[name] += [time.process_time() - start] if turn > 1 else []
        print(f"\n{count} tokens, experts {arguments.expert_dtype or 'fp32'}, ms")
        for name, values in times.items():
            print(f"  {1000 * statistics.median(values):7.3f}  {name}")


if __name__ == "__main__":
    main()
