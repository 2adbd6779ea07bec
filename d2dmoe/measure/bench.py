"""Time of one layer or a whole model: dense, converted, and rivals.

Outputs are compared before anything is timed.
"""

from __future__ import annotations

import copy
import inspect
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import cycle, islice
from typing import Any

import torch
from torch import nn

from ..kernels import chosen, dispatching, use_backend
from ..kernels.gates import select
from ..moe.gating import set_gate
from ..moe.layer import DynamicFFN, GateState, layers
from ..moe.memory import twin_in
from .observe import ActiveCounter, model_inputs, observing
from .pairs import make_pair
from .parts import time_parts
from .prompts import INPUTS, Prompts, random_prompts
from .rivals import RIVAL_FUNCTIONS, dense_columns, works
from .timing import Function, measure, row

DENSE = ("eager", "compiled", "frozen")
RIVALS = ("grouped_mm", "loop")
COLUMNS = (*DENSE, "sparse", "dispatched", *RIVALS)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # relative RMSE of the converted layer to the reference
STEPS = 3e-3  # the same where hidden values are rounded: a sum in another order can take one of them to the next step


def dispatched(function: Function) -> Function:
    """The function with automatic dispatch: layers with a dense layout may use it where that is faster."""

    def run(x: Any) -> Any:
        with dispatching("auto"):
            return function(x)

    return run


def in_turn(modules: Sequence[nn.Module]) -> Function:
    """Calls of modules that are alike, one after the other."""
    following = cycle(modules)
    return lambda x: next(following)(x)


@dispatching("sparse")
@torch.inference_mode()
def bench_layer(
    spec: dict[str, Any], *, tokens: list[int], actives: list[float], dtype: torch.dtype, seconds: float = 2.0,
    columns: tuple[str, ...] = COLUMNS, clock: str = "wall", keep_dense: bool = False,
    expert_dtype: str | None = None, copies: int = 1,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for every token count and active fraction. The gate is topk, so the fraction is exact.

    With `keep_dense` the layer also holds the dense layout, which the column `dispatched` may use. With `expert_dtype`
    there is a column of that name, the layer with its experts in that dtype. With several `copies` of the weights, used
    in turn, the calls read them from memory; the only columns are then `eager`, `sparse` and that of `expert_dtype`.
    """
    dense, layer = make_pair(**spec, dtype=dtype)
    layer.keep_dense = keep_dense
    others = [copy.deepcopy((dense, layer)) for _ in range(copies - 1)]
    twins = [twin_in(x, expert_dtype) for x in (layer, *(x for _, x in others))] if expert_dtype else []
    rows = []
    for count in tokens:
        inputs = [torch.randn(count, spec["d"]).to(dtype) for _ in range(INPUTS)]
        for active in actives:
            for one in (layer, *(x for _, x in others), *twins):
                one.gate_state = GateState("topk", 1 - active)
            check_layer(dense, layer, inputs[0])
            functions = dense_columns(dense, inputs[0], columns)
            functions["sparse"] = layer
            if twins:
                _check_backend(twins[0], inputs[0], f"with experts in {expert_dtype}")
                functions[str(expert_dtype)] = in_turn(twins)
            if others:
                functions["eager"] = in_turn([dense, *(x for x, _ in others)])
                functions["sparse"] = in_turn([layer, *(x for _, x in others)])
            if "dispatched" in columns:
                functions["dispatched"] = dispatched(layer)
            for name in RIVALS:
                if name in columns and active < 1 and works(RIVAL_FUNCTIONS[name], layer, inputs[0]):
                    functions[name] = lambda x, f=RIVAL_FUNCTIONS[name]: f(layer, x)
            times = measure(functions, inputs, seconds=seconds, clock=clock)
            backend = chosen(inputs[0], layer.activation, "topk")
            ranked = torch.arange(spec["experts"], 0.0, -1)[None]  # scores whose order is known
            ran = float(layer.gate_state.select(ranked).float().mean())
            one = row(times, dtype=dtype, phase="layer", tokens=count, active=ran, backend=backend)
            rows.append({**one, "way": layer.way(count), "dense_layout_bytes": keep_dense * layer.dense_bytes()})
    return rows


def check_layer(dense: nn.Module, layer: DynamicFFN, x: torch.Tensor) -> None:
    """Check the backend against the reference, and the layer with all experts on against the dense block.

    Raises:
        RuntimeError: If they disagree.
    """
    state = layer.gate_state
    layer.gate_state = GateState("topk", 0.0)
    _agree(layer(x), dense(x), "all experts on and the dense block")
    layer.gate_state = state
    if state.tau > 0:
        run = select(layer.scores(x), state.name, state.tau)
        _check_backend(layer, x, f"at {run.float().mean():.2f} active")


def _check_backend(layer: DynamicFFN, x: torch.Tensor, where: str) -> None:
    """Check the live backend against the reference, with the layer's gate in force."""
    layer.observer = lambda *_: None
    layer.observer.needs_hidden = False
    y = layer(x)  # an observed layer takes its experts from Python, so rounding cannot change the selection
    layer.observer = None
    least = STEPS if layer.expert_dtype == "int8-dynamic" else 0.0
    with use_backend("reference"):
        _agree(y, layer(x), f"the backend and the reference {where}", least)


def _agree(y: torch.Tensor, expected: torch.Tensor, what: str, least: float = 0.0) -> None:
    error = float((y - expected).float().norm() / expected.float().norm().clamp_min(1e-9))
    if not error <= max(TOLERANCE[y.dtype], least):
        raise RuntimeError(f"not timed: {what} differ by {error:.1e}")


@dispatching("sparse")
@torch.no_grad()
def speedup(model: nn.Module, dense: nn.Module, batches: Sequence[dict[str, Any]], *, seconds: float = 1.0) -> float:
    """Speed-up of the converted model over the dense one on these batches, with the gate in force.

    It is the ratio of median times. The forward passes of both models take turns, with the threads and device in force.
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
    columns: tuple[str, ...] = COLUMNS, clock: str = "wall", keep_dense: bool = False, expert_dtype: str | None = None,
    linear_dtype: str | None = None, prompts: Prompts | None = None, profile: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of prefill (all tokens or patches at once) and, for generative models, of decode (one token each).

    Args:
        model: Converted.
        dense: What it is compared with.
        batches: Numbers of samples.
        length: Tokens of each text. An image has as many as its patches make, whatever is given here.
        settings: Arguments of `set_gate`, a row for each.
        seconds: For each figure.
        columns: What to compare with.
        clock: `wall`, or `cpu` for one thread on a busy machine.
        keep_dense: Hold the dense layout as well.
        expert_dtype: A further column, the model with its experts in that dtype.
        linear_dtype: Of the other linear maps in that column, and of those of the dense model in one more.
        prompts: What to time them on, by default random tokens.
        profile: Add an entry `parts` to each row: where the time of the dense model, the converted one and those in
            other dtypes goes, see `time_parts`.
    """
    make = prompts or random_prompts(length)
    for layer in layers(model):
        layer.keep_dense = keep_dense
    title = rounded_title(expert_dtype, linear_dtype)
    twin = twin_in(model, expert_dtype, linear_dtype) if title else None
    rounded = {f"dense {linear_dtype}": twin_in(dense, None, linear_dtype)} if linear_dtype else {}
    blocks = [layer.block for layer in layers(model)]

    def parts_of(modules: dict[str, nn.Module], call: Callable, inputs: list[Any]) -> dict[str, dict[str, float]]:
        return {
            name: time_parts(m, blocks, lambda x, m=m: call(m, x), inputs, seconds=seconds, clock=clock)
            for name, m in modules.items() if profile
        }  # fmt: skip

    rows = []
    text = model.main_input_name == "input_ids"
    decodes = text and hasattr(model, "can_generate") and model.can_generate() and not model.config.is_encoder_decoder
    for batch in batches:
        given = make(model, batch)
        for phase in ("prefill", "decode") if decodes else ("prefill",):
            caches: dict[int, Any] = {}
            call = _prefill if phase == "prefill" else lambda m, x, c=caches, p=given[0]: _decode(m, x, p, c)
            inputs: list[Any] = given if phase == "prefill" else [p["input_ids"][:, :1] for p in given]
            dense_functions = dense_columns(dense, inputs[0], columns, call)
            dense_parts = parts_of({"eager": dense, **rounded}, call, inputs)
            for setting in settings:
                with _gate(model, setting), _gate(twin, setting) if twin else nullcontext():
                    single = {k: v[:1] for k, v in given[0].items()}
                    active, each = check_model(model, single)
                    active = active_fraction(model, given) if prompts and phase == "prefill" else active
                    caches.clear()
                    functions = {**dense_functions, "sparse": lambda x, c=call: c(model, x)}
                    if twin:
                        check_model(twin, single)
                        functions[title] = lambda x, c=call: c(twin, x)
                    for name, other in rounded.items():
                        functions[name] = lambda x, c=call, m=other: c(m, x)
                    if "dispatched" in columns:
                        functions["dispatched"] = dispatched(functions["sparse"])
                    for name in RIVALS:
                        if name in columns and all(layer.gate_state.tau > 0 for layer in layers(model)):
                            functions[name] = _rival(model, RIVAL_FUNCTIONS[name], call)
                    times = measure(_working(functions, inputs[0]), inputs, seconds=seconds, clock=clock)
                    parts = parts_of({"sparse": model, **({title: twin} if twin else {})}, call, inputs)
                tokens = batch * each if phase == "prefill" else batch
                dtype = next(model.parameters()).dtype
                backend = chosen(
                    torch.empty(0, dtype=dtype), layers(model)[0].activation, layers(model)[0].gate_state.name
                )
                one = row(times, dtype=dtype, phase=phase, tokens=tokens, active=active, backend=backend)
                one |= {"parts": {"eager": dense_parts["eager"], **parts, **dense_parts}} if profile else {}
                rows.append({**setting, "batch": batch, "context": each, **one})
    return rows


def rounded_title(expert_dtype: str | None, linear_dtype: str | None) -> str:
    """Name of the column of a model in these dtypes; empty where nothing is rounded."""
    if linear_dtype is None:
        return expert_dtype or ""
    return f"all {linear_dtype}" if expert_dtype == linear_dtype else f"{expert_dtype or 'own'}, others {linear_dtype}"


@contextmanager
def _gate(model: nn.Module, setting: dict) -> Iterator[None]:
    """`set_gate` for a converted checkpoint. A random model has no record, so its layers are set one by one."""
    record = getattr(getattr(model.config, "quantization_config", None), "d2dmoe", None)
    if record is not None and (record.curve or record.budgets):
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
    return {name: f for name, f in functions.items() if name in ("eager", "sparse", "dispatched") or works(f, x)}


def _prefill(model: nn.Module, inputs: dict[str, torch.Tensor]) -> Any:
    """Logits of the last position only, as `generate` asks for them."""
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    return model(**inputs, **last)


def _decode(model: nn.Module, ids: torch.Tensor, prompt: dict[str, torch.Tensor], caches: dict[int, Any]) -> Any:
    """One step after the prompt. The step's keys and values are then removed from the cache."""
    if id(model) not in caches:
        caches[id(model)] = model(**prompt, use_cache=True).past_key_values
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


def active_fraction(model: nn.Module, batches: Sequence[dict[str, torch.Tensor]]) -> float:
    """The share of the experts that run on these inputs, with the gate in force."""
    counter = ActiveCounter()
    with observing(model, counter):
        for inputs in batches:
            model(**inputs)
    return counter.fraction


def check_model(model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[float, int]:
    """Check every layer against the reference on the model's own inputs, of one sample.

    Returns:
        The measured active fraction, and the rows that the first layer sees: tokens, or patches of an image.
    """
    seen: dict[int, torch.Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, i=i: seen.update({i: args[0].detach()}))
        for i, layer in enumerate(layers(model))
    ]
    counter = ActiveCounter()
    with observing(model, counter):
        model(**inputs)
    for hook in hooks:
        hook.remove()
    for index, layer in enumerate(layers(model)):
        _check_backend(layer, seen[index], f"in layer {index}")
    return counter.fraction, seen[0].numel() // seen[0].shape[-1]
