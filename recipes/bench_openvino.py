"""Time a converted encoder in OpenVINO beside its dense twin in PyTorch and OpenVINO, and compare the embeddings.

d2dmoe convert --model sentence-transformers/all-MiniLM-L6-v2 --data ../shared/data/emotion/train.txt --max-length 64 \
    --active 0.25,0.5 --output-dir runs/minilm-d2dmoe
python recipes/bench_openvino.py --model runs/minilm-d2dmoe --data ../shared/data/emotion/train.txt \
    --eval-data ../shared/data/emotion/test.txt
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import openvino
import torch

from d2dmoe import hub
from d2dmoe.config.options import DataConfig
from d2dmoe.moe.gating import stored_config
from d2dmoe.openvino.cache import Feed
from d2dmoe.openvino.graph import BUDGET, trace
from d2dmoe.pipeline.openvino import calibration, compressed, example_inputs, feeds, traced

DENSE, INT8 = "OpenVINO fp32", "OpenVINO int8"
Run = Callable[[Feed], np.ndarray]


def build(arguments: argparse.Namespace) -> tuple[dict[str, Run], dict[str, Any]]:
    """Functions of the inputs to the last hidden state by name, and the `openvino.Model`s among them."""
    config = hub.read_config(arguments.model)
    dense, model = hub.load_dense(arguments.model, config), hub.load_model(arguments.model, config)
    actives = arguments.active or sorted(budget.active for budget in stored_config(model).budgets)
    data = calibration(arguments.model, config, DataConfig(data=arguments.data, max_length=arguments.length))
    inputs = example_inputs(model)
    plain = trace(dense, inputs)
    graphs = {DENSE: (plain, None)}
    for name, dtype in (("fp32", None), ("int8", "int8"), ("int8-dynamic", "int8-dynamic")):
        graph, _ = traced(copy.deepcopy(model), actives, dtype, dense_projections=arguments.dense_projections)
        graphs[f"experts {name}, rest fp32"] = (graph, actives)
    for name in list(graphs):
        graph, budgets = graphs[name]
        seen = list(feeds(graph, data, len(budgets or [0]), arguments.calibration_batches))
        graphs[INT8 if budgets is None else name.replace("rest fp32", "rest int8")] = (
            compressed(graph.clone(), "int8", seen), budgets,
        )  # fmt: skip
    runs: dict[str, Run] = {"PyTorch fp32": lambda feed: in_torch(dense, feed)}
    for name, (graph, budgets) in graphs.items():
        request = compiled(graph, arguments).create_infer_request()
        for number, active in enumerate(budgets or [None]):
            label = name if active is None else f"{name}, {active:.0%} active"
            runs[label] = at_budget(request, None if active is None else number)
    return runs, {name: graph for name, (graph, _) in graphs.items()}


def compiled(graph: Any, arguments: argparse.Namespace, counters: bool = False) -> Any:
    """The compiled model."""
    options = {"INFERENCE_NUM_THREADS": arguments.threads, "PERF_COUNT": counters}
    if arguments.precision != "default":
        options["INFERENCE_PRECISION_HINT"] = arguments.precision
    return openvino.Core().compile_model(graph, "CPU", options)


@torch.no_grad()
def in_torch(model: torch.nn.Module, feed: Feed) -> np.ndarray:
    """Last hidden state."""
    return model(**{name: torch.from_numpy(value) for name, value in feed.items()})[0].numpy()


def at_budget(request: Any, number: int | None) -> Run:
    """A function of the inputs, without the copies that the Python binding makes by default."""
    more = budget_of(request, number)
    return lambda feed: request.infer({**feed, **more}, share_inputs=True, share_outputs=True)[0]


def budget_of(request: Any, number: int | None) -> Feed:
    """The input that says which budget runs, where a model has several."""
    named = {port.any_name for port in request.model_inputs}
    return {BUDGET: np.array(number, dtype=np.int32)} if BUDGET in named else {}


def whole_feed(given: list[Feed], batch: int, length: int) -> Feed:
    """Tokens of the text one after the other, so that all of them count. Random ones would have more experts run."""
    ids = np.concatenate([feed["input_ids"][feed["attention_mask"] > 0] for feed in given])
    ids = np.resize(ids, (batch, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def timed(runs: dict[str, Run], feed: Feed, seconds: float, clock: Callable[[], float]) -> dict[str, float]:
    """Median time of a call in ms by name; every function once in each round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(feed)
        run(feed)
    end = time.monotonic() + seconds * len(runs)
    while time.monotonic() < end or len(times[INT8]) < 5:
        for name, run in runs.items():
            start = clock()
            run(feed)
            times[name].append(clock() - start)
    return {name: 1000 * statistics.median(values) for name, values in times.items()}


def cosines(runs: dict[str, Run], given: list[Feed]) -> dict[str, float]:
    """Mean cosine of the mean-pooled embeddings to those of PyTorch; of a classifier, how often it says the same."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in runs}
    for feed in given:
        mask = feed["attention_mask"][..., None].astype(np.float32)
        for name, run in runs.items():
            output = run(feed)
            pooled = np.eye(output.shape[-1])[output.argmax(-1)] if output.ndim == 2 else (output * mask).sum(1)
            found[name].append(pooled / np.linalg.norm(pooled, axis=1, keepdims=True))
    wanted = np.concatenate(found["PyTorch fp32"])
    return {name: float((np.concatenate(rows) * wanted).sum(1).mean()) for name, rows in found.items()}


def profile(graphs: dict[str, Any], feed: Feed, arguments: argparse.Namespace) -> None:
    """Print OpenVINO's own counters, wall time of an inference at the least budget: the kinds that take longest."""
    for name, graph in graphs.items():
        request, totals = compiled(graph, arguments, counters=True).create_infer_request(), {}
        given = {**feed, **budget_of(request, 0)}
        for _ in range(10):  # counters are means over all calls of a compiled model
            request.infer(given)
        for info in request.profiling_info:
            key = f"{info.node_type} ({info.exec_type})"
            totals[key] = totals.get(key, 0.0) + 1000 * info.real_time.total_seconds()
        print(f"\n{name}: {sum(totals.values()):.2f} ms in all")
        for key, value in sorted(totals.items(), key=lambda item: -item[1])[:7]:
            print(f"  {value:8.2f} ms  {key}")


def main() -> None:
    """Print a table for each batch size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="converted encoder")
    parser.add_argument("--data", required=True, help="text on which NNCF measures ranges")
    parser.add_argument("--eval-data", required=True, help="text whose embeddings are compared")
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 1])
    parser.add_argument("--active", type=float, nargs="+", help="budgets, one if projections were converted as well")
    parser.add_argument("--dense-projections", action="store_true", help="as of d2dmoe export --openvino")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--calibration-batches", type=int, default=32)
    parser.add_argument("--eval-batches", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1, help="processor time of one, wall time of several")
    parser.add_argument("--precision", choices=("f32", "bf16", "default"), default="f32", help="of what is not int8")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each row")
    parser.add_argument("--profile", action="store_true", help="also print OpenVINO's counters by kind of operation")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    runs, graphs = build(arguments)
    config = hub.read_config(arguments.model)
    text = calibration(arguments.model, config, DataConfig(data=arguments.eval_data, max_length=arguments.length))
    given = list(feeds(graphs[DENSE], text, 0, arguments.eval_batches))
    quality = cosines(runs, given)
    for batch in arguments.batches:
        feed = whole_feed(given, batch, arguments.length)
        clock = time.process_time if arguments.threads == 1 else time.perf_counter
        found = timed(runs, feed, arguments.seconds, clock)
        print(f"\n{batch} x {arguments.length} tokens, {arguments.threads} thread, {arguments.precision}")
        print("| | ms | of OpenVINO int8 | cosine, or agreement of a classifier |\n|---|---|---|---|")
        for name, value in found.items():
            print(f"| {name} | {value:.2f} | {value / found[INT8]:.2f} | {quality[name]:.4f} |", flush=True)
        if arguments.profile:
            profile(graphs, feed, arguments)


if __name__ == "__main__":
    main()
