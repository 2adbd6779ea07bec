"""Time: one layer or a whole model, dense against converted and against what is on the shelf.

Columns are measured in turn, round by round, so that a disturbance hits all of them; a figure is a median with the
quartiles beside it. Inputs change from call to call: with the same ones the few experts of a token would stay in the
cache. Nothing is timed before the outputs have been compared.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import nn

from .config import Block, UserError
from .experts import DynamicFFN, GateState, layers, pack
from .gating import set_gate
from .kernels import chosen, dispatching, use_backend
from .observe import ActiveCounter, model_inputs, observing
from .routing import select

INPUTS = 8  # different ones, in turn
DENSE = ("eager", "compiled", "frozen")
RIVALS = ("grouped_mm", "loop")
COLUMNS = (*DENSE, "sparse", "dispatched", *RIVALS)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # relative RMSE of the converted layer to the reference
Function = Callable[[Any], Any]


CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}


def measure(
    functions: dict[str, Function], inputs: list[Any], *, seconds: float, clock: str = "wall"
) -> dict[str, list[float]]:
    """Milliseconds of every call; each function gets about `seconds`, at least five calls, in rounds of a few.

    The clock `cpu` counts what the calling thread has really run: for one thread on a machine that others use too.
    """
    now = CLOCKS[clock]
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        for x in inputs[:2]:
            function(x)
    fastest = min(_timed(function, inputs[0], now) for function in functions.values())
    burst = max(1, min(20, int(2.0 / fastest)))  # calls in a row: threads are awake and caches as they are in use
    turn, started = 0, time.perf_counter()
    while turn < 5 or time.perf_counter() - started < seconds * len(functions):
        for name, function in functions.items():
            function(inputs[turn % len(inputs)])
            for i in range(burst):
                times[name].append(_timed(function, inputs[(turn + i) % len(inputs)], now))
        turn += 1
    return times


def _timed(function: Function, x: Any, now: Callable[[], float]) -> float:
    start = now()
    function(x)
    return 1000 * (now() - start)


def row(
    times: dict[str, list[float]], *, dtype: torch.dtype, phase: str, tokens: int, active: float, backend: str
) -> dict[str, Any]:
    """One row of the command contract; `dense_ms` is the faster of eager and compiled."""
    median = {name: statistics.median(values) for name, values in times.items()}
    dense = min(median[name] for name in ("eager", "compiled") if name in median)
    quartiles = {name: [round(q, 4) for q in statistics.quantiles(v, n=4)[::2]] for name, v in times.items()}
    return {
        "device": "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "phase": phase,
        "tokens": tokens,
        "active_fraction": active,
        "backend": backend,
        "dense_ms": dense,
        "sparse_ms": median["sparse"],
        "speedup": dense / median["sparse"],
        **({"dispatched_speedup": dense / median["dispatched"]} if "dispatched" in median else {}),
        "ideal": 1 / active,
        "ms": median,
        "quartiles_ms": quartiles,
        "fastest_ms": {name: min(values) for name, values in times.items()},
        "threads": torch.get_num_threads(),
    }


# ---- one layer


def parse_layer(text: str) -> dict[str, Any]:
    """`d=768,f=3072,experts=96[,glu][,act=relu]` to keyword arguments of `make_pair`.

    Raises:
        UserError: If it is not of that form, or the experts do not divide the width.
    """
    given: dict[str, Any] = {"glu": False}
    try:
        for part in filter(None, text.split(",")):
            key, _, value = part.partition("=")
            given[key.strip()] = value.strip() if key == "act" else int(value) if value else True
        d, f, experts = (given[key] for key in ("d", "f", "experts"))
    except (KeyError, ValueError):
        raise UserError(f"--layer {text}: give d=…,f=…,experts=…[,glu], as in d=768,f=3072,experts=96") from None
    if min(d, f, experts) < 1 or f % experts:
        raise UserError(f"--layer {text}: {experts} experts do not divide the width {f}")
    unknown = set(given) - {"d", "f", "experts", "glu", "act"}
    if unknown:
        raise UserError(f"--layer {text}: unknown {', '.join(sorted(unknown))}; known are d, f, experts, glu, act")
    return {"d": d, "width": f, "experts": experts, "glu": given["glu"], "act": given.get("act")}


class DenseFFN(nn.Module):
    """What a dense model runs."""

    def __init__(self, d: int, width: int, glu: bool, act: Callable):
        super().__init__()
        self.up, self.down = nn.Linear(d, width, bias=not glu), nn.Linear(width, d, bias=not glu)
        self.gate = nn.Linear(d, width, bias=False) if glu else None
        self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(tokens, d)`` to ``(tokens, d)``."""
        hidden = self.act(self.up(x)) if self.gate is None else self.act(self.gate(x)) * self.up(x)
        return self.down(hidden)


def make_pair(
    d: int, width: int, experts: int, glu: bool, act: str | None, dtype: torch.dtype
) -> tuple[DenseFFN, DynamicFFN]:
    """A dense block with random weights and the same as experts with a random router of width 128."""
    from transformers.activations import ACT2FN

    torch.manual_seed(0)
    function = ACT2FN[act or ("silu" if glu else "gelu")]
    dense = DenseFFN(d, width, glu, function).to(dtype).eval()
    block = Block(
        name="layer", kind="glu" if glu else "ffn", activation=act or "", d_model=d, width=width, up="up",
        gate="gate" if glu else None, down="down", experts=experts,
    )  # fmt: skip
    biases = (not glu, False, not glu)
    layer = DynamicFFN(block, d_out=d, biases=biases, act=function, router_width=128, dtype=dtype).eval()
    layer.router.reset(0)
    with torch.no_grad():
        layer.up_weight.copy_(pack(dense.up.weight, experts, "up_linear"))
        layer.down_weight.copy_(pack(dense.down.weight, experts, "down_linear"))
        if glu:
            layer.gate_weight.copy_(pack(dense.gate.weight, experts, "up_linear"))
        else:
            layer.up_bias.copy_(pack(dense.up.bias, experts, "bias"))
            layer.down_bias.copy_(dense.down.bias)
    return dense, layer


def dispatched(function: Function) -> Function:
    """The same where layers may take the fastest way instead of the one their gate asks for."""

    def run(x: Any) -> Any:
        with dispatching("auto"):
            return function(x)

    return run


@dispatching("sparse")
@torch.inference_mode()
def bench_layer(
    spec: dict[str, Any], *, tokens: list[int], actives: list[float], dtype: torch.dtype, seconds: float = 2.0,
    columns: tuple[str, ...] = COLUMNS, clock: str = "wall", keep_dense: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows for every number of tokens and active fraction; topk gate, so that the fraction is exact.

    With `keep_dense` the layer holds the dense layout as well, for the column `dispatched`.
    """
    dense, layer = make_pair(**spec, dtype=dtype)
    layer.keep_dense = keep_dense
    rows = []
    for count in tokens:
        inputs = [torch.randn(count, spec["d"]).to(dtype) for _ in range(INPUTS)]
        for active in actives:
            layer.gate_state = GateState("topk", 1 - active)
            check_layer(dense, layer, inputs[0])
            functions = _dense_columns(dense, inputs[0], columns)
            functions["sparse"] = layer
            if "dispatched" in columns:
                functions["dispatched"] = dispatched(layer)
            for name in RIVALS:
                if name in columns and active < 1 and _works(RIVAL_FUNCTIONS[name], layer, inputs[0]):
                    functions[name] = lambda x, f=RIVAL_FUNCTIONS[name]: f(layer, x)
            times = measure(functions, inputs, seconds=seconds, clock=clock)
            backend = chosen(inputs[0], layer.activation, "topk")
            shown = round(active * spec["experts"]) / spec["experts"]
            one = row(times, dtype=dtype, phase="layer", tokens=count, active=shown, backend=backend)
            rows.append({**one, "way": layer.way(count), "dense_layout_bytes": keep_dense * layer.dense_bytes()})
    return rows


def check_layer(dense: nn.Module, layer: DynamicFFN, x: torch.Tensor) -> None:
    """The correctness gate: the backend against the reference, and everything on against the dense block.

    Raises:
        RuntimeError: If they disagree.
    """
    state = layer.gate_state
    layer.gate_state = GateState("topk", 0.0)
    _agree(layer(x), dense(x), "all experts on and the dense block")
    layer.gate_state = state
    if state.tau > 0:
        run = select(layer.router(x), state.name, state.tau)
        _check_backend(layer, x, f"at {run.float().mean():.2f} active")


def _check_backend(layer: DynamicFFN, x: torch.Tensor, where: str) -> None:
    """The live backend against the reference, as the layer's gate is set."""
    layer.observer = lambda *_: None
    layer.observer.needs_hidden = False
    y = layer(x)  # observed, so with the set of experts given: rounding must not decide which run
    layer.observer = None
    with use_backend("reference"):
        _agree(y, layer(x), f"the backend and the reference {where}")


def _agree(y: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    error = float((y - expected).float().norm() / expected.float().norm().clamp_min(1e-9))
    if not error <= TOLERANCE[y.dtype]:
        raise RuntimeError(f"not timed: {what} differ by {error:.1e}")


@contextmanager
def freezing() -> Iterator[None]:
    """Inductor prepacks weights meanwhile."""
    import torch._inductor.config as inductor

    before, inductor.freezing = inductor.freezing, True
    try:
        yield
    finally:
        inductor.freezing = before


def _dense_columns(
    dense: nn.Module, x: Any, columns: tuple[str, ...], call: Callable | None = None
) -> dict[str, Function]:
    """The dense module eager, compiled, and compiled with frozen weights; what does not compile is left out."""
    call = call or (lambda module, x: module(x))
    functions: dict[str, Function] = {"eager": lambda x: call(dense, x)}
    for name in ("compiled", "frozen"):
        if name in columns:
            torch._dynamo.reset_code_caches()
            compiled = torch.compile(dense)
            with freezing() if name == "frozen" else torch.no_grad(), torch.no_grad():
                if _works(lambda m, x: call(m, x), compiled, x):
                    functions[name] = lambda x, m=compiled: call(m, x)
    return functions


def _works(function: Callable, *arguments: Any) -> bool:
    try:
        function(*arguments)
    except Exception:  # a rival that cannot do this dtype or shape, or a compiler that is not there
        return False
    return True


def expert_loop(layer: DynamicFFN, x: torch.Tensor) -> torch.Tensor:
    """The plain way: one expert after the other on the tokens that want it."""
    run = select(layer.router(x), layer.gate_state.name, layer.gate_state.tau)
    y = torch.zeros_like(x) if layer.down_bias is None else layer.down_bias.repeat(len(x), 1)
    for e in range(layer.block.experts):
        index = run[:, e].nonzero()[:, 0]
        if len(index):
            y.index_add_(0, index, _expert(layer, x[index], e))
    return y


def _expert(layer: DynamicFFN, x: torch.Tensor, e: int) -> torch.Tensor:
    up = x @ layer.up_weight[e]
    if layer.up_bias is not None:
        up += layer.up_bias[e]
    hidden = layer.act(up) if layer.gate_weight is None else layer.act(x @ layer.gate_weight[e]) * up
    return hidden @ layer.down_weight[e]


def grouped(layer: DynamicFFN, x: torch.Tensor) -> torch.Tensor:
    """With `torch.nn.functional.grouped_mm`: pairs sorted by expert, two or three grouped products, summed back."""
    run = select(layer.router(x), layer.gate_state.name, layer.gate_state.tau)
    expert, token = run.T.nonzero(as_tuple=True)
    ends = run.sum(0).cumsum(0).to(torch.int32)
    rows, product = x[token], torch.nn.functional.grouped_mm
    up = product(rows, layer.up_weight, offs=ends)
    if layer.up_bias is not None:
        up = up + layer.up_bias[expert]
    hidden = layer.act(up) if layer.gate_weight is None else layer.act(product(rows, layer.gate_weight, offs=ends)) * up
    y = torch.zeros_like(x) if layer.down_bias is None else layer.down_bias.repeat(len(x), 1)
    return y.index_add_(0, token, product(hidden, layer.down_weight, offs=ends))


RIVAL_FUNCTIONS = {"grouped_mm": grouped, "loop": expert_loop}


# ---- a whole model


@dispatching("sparse")
@torch.no_grad()
def speedup(model: nn.Module, dense: nn.Module, batches: Sequence[dict[str, Any]], *, seconds: float = 1.0) -> float:
    """How many times as fast as the dense model the converted one is on such batches, its gate as it is set.

    The ratio of medians of forward passes that take turns, in the threads and on the device in force.
    """

    def timed(module: nn.Module) -> Function:
        def run(inputs: dict[str, Any]) -> None:
            module(**inputs)
            if module.device.type == "cuda":
                torch.cuda.synchronize(module.device)

        return run

    inputs = [model_inputs(model, batch) for batch in islice(batches, INPUTS)]
    times = measure({"dense": timed(dense), "sparse": timed(model)}, inputs, seconds=seconds)
    return statistics.median(times["dense"]) / statistics.median(times["sparse"])


@dispatching("sparse")
@torch.no_grad()
def bench_model(
    model: nn.Module, dense: nn.Module, *, batches: list[int], length: int, settings: list[dict], seconds: float = 4.0,
    columns: tuple[str, ...] = COLUMNS, clock: str = "wall", keep_dense: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of prefill (`batch` × `length` tokens at once) and, for a model that generates, decode (one token each)."""
    for layer in layers(model):
        layer.keep_dense = keep_dense
    rows = []
    decodes = hasattr(model, "can_generate") and model.can_generate() and not model.config.is_encoder_decoder
    vocabulary = model.config.get_text_config().vocab_size
    for batch in batches:
        prompts = [torch.randint(5, vocabulary, (batch, length)) for _ in range(INPUTS)]
        for phase in ("prefill", "decode") if decodes else ("prefill",):
            caches: dict[int, Any] = {}
            call = _prefill if phase == "prefill" else lambda m, x, c=caches, p=prompts[0]: _decode(m, x, p, c)
            inputs = prompts if phase == "prefill" else [p[:, :1] for p in prompts]
            dense_functions = _dense_columns(dense, inputs[0], columns, call)
            for setting in settings:
                with _gate(model, setting):
                    active = check_model(model, prompts[0])
                    caches.clear()
                    functions = {**dense_functions, "sparse": lambda x, c=call: c(model, x)}
                    if "dispatched" in columns:
                        functions["dispatched"] = dispatched(functions["sparse"])
                    for name in RIVALS:
                        if name in columns and all(layer.gate_state.tau > 0 for layer in layers(model)):
                            functions[name] = _rival(model, RIVAL_FUNCTIONS[name], call)
                    times = measure(_working(functions, inputs[0]), inputs, seconds=seconds, clock=clock)
                tokens = batch * length if phase == "prefill" else batch
                dtype = next(model.parameters()).dtype
                backend = chosen(
                    torch.empty(0, dtype=dtype), layers(model)[0].activation, layers(model)[0].gate_state.name
                )
                one = row(times, dtype=dtype, phase=phase, tokens=tokens, active=active, backend=backend)
                rows.append({**setting, "batch": batch, "context": length, **one})
    return rows


@contextmanager
def _gate(model: nn.Module, setting: dict) -> Iterator[None]:
    """`set_gate` where the model is a stored one; a random model's layers are set by hand."""
    if getattr(model.config, "quantization_config", None) is not None and model.config.quantization_config.d2dmoe.curve:
        with set_gate(model, **setting):
            yield
        return
    before = [layer.gate_state for layer in layers(model)]
    for layer in layers(model):
        layer.gate_state = GateState("topk", 1 - setting["active"])
    yield
    for layer, state in zip(layers(model), before, strict=True):
        layer.gate_state = state


def _working(functions: dict[str, Function], x: Any) -> dict[str, Function]:
    return {name: f for name, f in functions.items() if name in ("eager", "sparse", "dispatched") or _works(f, x)}


def _prefill(model: nn.Module, ids: torch.Tensor) -> Any:
    """Logits of the last position only, as `generate` asks for them."""
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    return model(input_ids=ids, **last)


def _decode(model: nn.Module, ids: torch.Tensor, prompt: torch.Tensor, caches: dict[int, Any]) -> Any:
    """One step after the prompt; its keys and values are taken off the cache again."""
    if id(model) not in caches:
        caches[id(model)] = model(input_ids=prompt, use_cache=True).past_key_values
    cache = caches[id(model)]
    output = model(input_ids=ids, past_key_values=cache, use_cache=True)
    cache.crop(-1)
    return output


def _rival(model: nn.Module, function: Callable, call: Callable) -> Function:
    def run(x: Any) -> Any:
        for layer in layers(model):
            layer.forward = lambda h, layer=layer: function(layer, h.reshape(-1, h.shape[-1])).reshape(h.shape)
        try:
            return call(model, x)
        finally:
            for layer in layers(model):
                del layer.forward

    return run


def check_model(model: nn.Module, ids: torch.Tensor) -> float:
    """The correctness gate for every layer on the model's own inputs; returns the measured active fraction."""
    seen: dict[int, torch.Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, i=i: seen.update({i: args[0].detach()}))
        for i, layer in enumerate(layers(model))
    ]
    counter = ActiveCounter()
    with observing(model, counter):
        model(input_ids=ids[:1])
    for hook in hooks:
        hook.remove()
    for index, layer in enumerate(layers(model)):
        _check_backend(layer, seen[index], f"in layer {index}")
    return counter.fraction
