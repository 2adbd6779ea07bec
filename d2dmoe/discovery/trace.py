"""One recorded forward pass in which every linear map returns noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..moe.fatrelu import fatrelu_names
from ..moe.packing import sizes as features

# One name per function: gelu_new, gelu_fast and gelu_accurate are gelu_pytorch_tanh; swish is silu.
ACTIVATIONS = (
    "relu", "gelu", "gelu_pytorch_tanh", "quick_gelu", "silu", "relu2", "mish", "gelu_10", "laplace", "relu6",
    "leaky_relu", "tanh", "sigmoid",
)  # fmt: skip
Change = Callable[[str, torch.Tensor], torch.Tensor]
NOISE_SCALE, NOISE_LIMIT = 1.5, 4.0


@dataclass
class Call:
    """One call of a linear map: its input, and the noise that it returned."""

    name: str
    input: torch.Tensor
    output: torch.Tensor
    leaf: torch.Tensor | None = None  # what autograd follows, if it does


@dataclass
class Trace:
    """The record of one forward pass."""

    linears: list[Call] = field(default_factory=list)
    modules: dict[str, list[tuple[Any, Any]]] = field(default_factory=dict)  # name -> [(first tensor in, output)]
    samples: int = 1
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    activations: tuple[str, ...] = ACTIVATIONS


def _is_map(linear: nn.Module) -> bool:
    """Does a `Linear` or `Conv1D` return one tensor? A subclass may return something else (the router of Llama 4)."""
    if type(linear).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    width, out = features(linear)
    y = linear(torch.zeros(1, width, device=linear.weight.device, dtype=linear.weight.dtype))
    return isinstance(y, torch.Tensor) and y.shape == (1, out)


def runs_on(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> set[str]:
    """Names of the linear maps that these inputs reach. A skeleton suffices."""
    return {call.name for call in run_traced(model, dict(inputs)).linears}


@contextmanager
def _instrumented(model: nn.Module, trace: Trace, follow: bool, change: Change | None) -> Iterator[None]:
    """Make linear maps return noise, and record the inputs and outputs of all modules."""
    generator = torch.Generator().manual_seed(1)
    linears, handles = [], []

    def noisy(name: str, linear: nn.Module):
        def forward(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            shape = (*x.shape[:-1], features(linear)[1])
            noise = torch.randn(shape, generator=generator, dtype=torch.float64) * NOISE_SCALE
            noise = noise.clamp(-NOISE_LIMIT, NOISE_LIMIT).to(x.device, x.dtype)
            noise = noise if change is None else change(name, noise)
            leaf = noise.requires_grad_() if follow else None
            trace.linears.append(Call(name, x, noise, leaf))
            return noise.clone()  # an in-place activation must not change the record

        return forward

    def record(name: str):
        def hook(_: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            first = next((a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)), None)
            trace.modules.setdefault(name, []).append((first, output))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and _is_map(module):
            module.forward = noisy(name, module)
            linears.append(module)
        elif not follow:
            handles.append(module.register_forward_hook(record(name), with_kwargs=True))
    try:
        yield
    finally:
        for module in linears:
            del module.forward
        for handle in handles:
            handle.remove()


def run_traced(
    model: nn.Module, inputs: dict[str, torch.Tensor], *, follow: bool = False, change: Change | None = None
) -> Trace:
    """Run the model once with linear maps that return noise, the same in every run; returns the record.

    Args:
        model: Any module.
        inputs: Keyword arguments of its forward pass.
        follow: Let autograd know what each tensor was computed from; calls of other modules are not recorded then.
        change: Gets the name of a linear map and what it is to return, and says what it returns instead.
    """
    samples = next(iter(inputs.values())).shape[0]
    trace = Trace(samples=samples, inputs=inputs, activations=(*fatrelu_names(model), *ACTIVATIONS))
    training = model.training
    model.eval()
    try:
        with _instrumented(model, trace, follow, change), torch.set_grad_enabled(follow):
            model(**inputs)
    finally:
        model.train(training)
    return trace
