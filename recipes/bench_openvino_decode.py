"""Time a decoder token by token in OpenVINO, dense and converted, random weights, a fixed share of the experts on.

python recipes/bench_openvino_decode.py --shapes llama,gpt2 --active 0.25 --attention 0.5 --threads 1
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import openvino
import torch
from bench_shapes import SHAPES, build

from d2dmoe import set_expert_dtype, set_gate, set_linear_dtype
from d2dmoe.openvino.cache import MASK, Feed, complete
from d2dmoe.openvino.compiled import IN_FP32
from d2dmoe.openvino.graph import BUDGET, trace
from d2dmoe.pipeline.openvino import compressed, example_inputs, traced
from d2dmoe.report import table

STEPS, PROMPTS = 32, 3  # steps between two prompts, and prompts at least
DENSE = "OpenVINO, weights in int8"


class InOpenVINO:
    """Steps of one of OpenVINO's models."""

    def __init__(self, graph: Any, threads: int, precision: str):
        options = {**IN_FP32, "INFERENCE_NUM_THREADS": threads}
        if precision != "f32":
            options |= {"INFERENCE_PRECISION_HINT": precision}
        compiled = openvino.Core().compile_model(graph, "CPU", options)
        self.request, self.ports = compiled.create_infer_request(), [port.any_name for port in compiled.inputs]

    def start(self, prompt: np.ndarray) -> None:
        """Forget, and read a prompt ``(1, length)``."""
        self.request.reset_state()
        self.length = 0
        self.step(prompt)

    def step(self, ids: np.ndarray) -> np.ndarray:
        """Logits of new tokens ``(1, new)``."""
        self.length += ids.shape[1]
        feed: Feed = {"input_ids": ids, MASK: np.ones((1, self.length), dtype=np.int64)}
        if BUDGET in self.ports:
            feed[BUDGET] = np.array(0, dtype=np.int32)
        feed = complete(feed, self.ports)
        return self.request.infer(feed, share_inputs=True, share_outputs=True)[0]


class InTorch:
    """Steps of a model of Transformers."""

    def __init__(self, model: torch.nn.Module):
        self.model = model

    def start(self, prompt: np.ndarray) -> None:
        """Forget, and read a prompt ``(1, length)``."""
        self.cache = None
        self.step(prompt)

    @torch.no_grad()
    def step(self, ids: np.ndarray) -> np.ndarray:
        """Logits of new tokens ``(1, new)``."""
        output = self.model(input_ids=torch.from_numpy(ids), past_key_values=self.cache, use_cache=True)
        self.cache = output.past_key_values
        return output.logits.numpy()


def columns(shape: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What is timed, by name."""
    model, dense = build(shape, arguments.active, arguments.attention)
    set_gate(model, active=arguments.active)
    inputs = example_inputs(dense)
    found: dict[str, Any] = {"torch fp32": InTorch(dense)}
    for name, rest in (("OpenVINO fp32", None), (DENSE, "int8-weights")):
        graph = trace(dense, inputs, cached=True)
        graph = compressed(graph, rest, []) if rest else graph
        found[name] = InOpenVINO(graph, arguments.threads, arguments.precision)
    share = f"{arguments.active:g} of the experts"
    share += f" and {arguments.attention:g} of the projections" if arguments.attention else ""
    for name, dtype, rest in (
        (f"OpenVINO fp32, {share}", None, None),
        (f"{DENSE}, {share} in int8", "int8", "int8-weights"),
        (f"{DENSE}, {share} in int8-dynamic", "int8-dynamic", "int8-weights"),
    ):
        converted = build(shape, arguments.active, arguments.attention)[0]
        graph, _ = traced(converted, [arguments.active], dtype, cached=True)
        graph = compressed(graph, rest, []) if rest else graph
        found[name] = InOpenVINO(graph, arguments.threads, arguments.precision)
        gc.collect()
    set_expert_dtype(model, "int8")
    set_linear_dtype(model, "int8")
    found[f"torch, {share}, all in int8"] = InTorch(model)
    return found


def timed(
    found: dict[str, Any], prompt: np.ndarray, seconds: float, now: Callable[[], float]
) -> dict[str, tuple[float, float]]:
    """Milliseconds of the prompt and of a step after it, medians, by name; the columns take turns."""
    rng = np.random.default_rng(0)
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in found}
    for model in found.values():
        model.start(prompt)
    end = time.monotonic() + seconds * len(found)
    while time.monotonic() < end or len(times[DENSE][0]) < PROMPTS:
        tokens = rng.integers(5, 8000, (STEPS, 1, 1))
        for name, model in found.items():
            for place, calls in enumerate(([partial(model.start, prompt)], [partial(model.step, t) for t in tokens])):
                for call in calls:
                    start = now()
                    call()
                    times[name][place].append(1000 * (now() - start))
    return {name: (statistics.median(first), statistics.median(steps)) for name, (first, steps) in times.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    decoders = [name for name in SHAPES if name != "minilm"]
    parser.add_argument("--shapes", default="llama", help=", ".join(decoders))
    parser.add_argument("--active", type=float, default=0.25)
    parser.add_argument(
        "--attention", type=float, default=0.0, help="share of the projections' work, at low rank; 0: dense"
    )
    parser.add_argument("--length", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: time of the whole process")
    parser.add_argument("--precision", choices=("f32", "bf16"), default="f32", help="of what is not int8")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each row")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    prompt = np.random.default_rng(1).integers(5, 8000, (1, arguments.length))
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    for shape in arguments.shapes.split(","):
        times = timed(columns(shape, arguments), prompt, arguments.seconds, clock)
        body = []
        for name, figures in times.items():
            pairs = zip(figures, times[DENSE], strict=True)
            body.append([name, *(text for ms, dense in pairs for text in (f"{ms:.3g}", f"{ms / dense:.2f}"))])
        head = ["", f"prompt of {arguments.length}, ms", f"of {DENSE}", "one token, ms", f"of {DENSE}"]
        print(f"{shape}\n\n{table(head, body)}\n", flush=True)


if __name__ == "__main__":
    main()
