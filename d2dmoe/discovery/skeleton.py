"""A model without memory for its weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


def skeleton(model_class: type[nn.Module], config: Any) -> nn.Module:
    """A model of this class and config whose parameters take no memory: each is one number, expanded.

    Good for discovery, counting and planning; its outputs mean nothing.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = model_class(config)
    if getattr(model.config, "_experts_implementation", None) is not None:
        _run_experts_one_by_one(model)
    shared: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in shared:
                    value = torch.full((), 0.02, dtype=torch.float32).expand(parameter.shape)
                    shared[id(parameter)] = nn.Parameter(value, requires_grad=False)
                module._parameters[name] = shared[id(parameter)]
    return model.float().eval() if any(b.is_floating_point() for b in model.buffers()) else model.eval()


def _run_experts_one_by_one(model: nn.Module) -> None:
    """The grouped product of a mixture of experts does not take weights without memory."""
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "_experts_implementation"):
            module.config = copy.copy(module.config)
            module.config._experts_implementation = "eager"
