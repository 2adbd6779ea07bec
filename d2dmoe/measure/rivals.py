"""The rivals of a converted layer in a benchmark: the dense module, compiled or not, and other ways to run experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..kernels.gates import select
from ..moe.layer import DynamicFFN
from .timing import Function


@contextmanager
def freezing() -> Iterator[None]:
    """Inside this block, Inductor prepacks frozen weights."""
    import torch._inductor.config as inductor

    before, inductor.freezing = inductor.freezing, True
    try:
        yield
    finally:
        inductor.freezing = before


def dense_columns(
    dense: nn.Module, x: Any, columns: tuple[str, ...], call: Callable | None = None
) -> dict[str, Function]:
    """The dense module eager, compiled, and compiled with frozen weights; without variants that do not compile."""
    call = call or (lambda module, x: module(x))
    functions: dict[str, Function] = {"eager": lambda x: call(dense, x)}
    for name in ("compiled", "frozen"):
        if name in columns:
            torch._dynamo.reset_code_caches()
            compiled = torch.compile(dense)
            with freezing() if name == "frozen" else torch.no_grad(), torch.no_grad():
                if works(lambda m, x: call(m, x), compiled, x):
                    functions[name] = lambda x, m=compiled: call(m, x)
    return functions


def works(function: Callable, *arguments: Any) -> bool:
    """Whether this call runs on this machine without an exception."""
    try:
        function(*arguments)
    except Exception:  # unsupported dtype or shape, or no compiler
        return False
    return True


def expert_loop(layer: DynamicFFN, x: torch.Tensor) -> torch.Tensor:
    """A loop over the experts, each on the tokens that selected it."""
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
