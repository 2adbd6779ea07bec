"""How many tokens a model takes at once, by what it looks up for their positions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..config.options import DataConfig
from ..hub import fit_length, without_record
from .inputs import dummy_inputs
from .skeleton import skeleton

Data = TypeVar("Data", bound=DataConfig)
SPARE = 64  # tokens; no model begins to count its positions so far from 0


class _Lookups(TorchDispatchMode):
    """Records the sizes of embedding tables, and the indices looked up in them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, torch.Tensor]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.embedding.default and args[1].ndim:
            self.calls.append((args[0].shape[0], args[1].clone()))
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def position_limit(model: torch.nn.Module) -> int | None:
    """The longest sequence whose positions are all in the model's tables; `None` where it looks up no positions.

    Positions do not begin at 0 everywhere: RoBERTa counts from behind its padding token, so that 514 embeddings are
    enough for 512 tokens.

    Args:
        model: A skeleton suffices.
    """
    inputs = dummy_inputs(model)
    length = inputs["input_ids"].shape[-1] if "input_ids" in inputs else 0
    if length < 3:
        return None
    with _Lookups() as lookups:
        model(**inputs)
    steps = torch.arange(length, device=inputs["input_ids"].device)
    limits = []
    for size, indices in lookups.calls:
        rows = indices.reshape(-1, indices.shape[-1])
        if rows.shape[1] >= length:
            counted = ((rows[:, :length] - rows[:, :1]) == steps).all(dim=1)
            if rows.shape[1] > length:  # padding behind the tokens, or else the positions of something longer
                counted &= rows[:, length] != rows[:, 0] + length
            limits += [size - int(rows[counted, 0].max())] if counted.any() else []
    return min(limits, default=None)


def fit_to_positions(data: Data, kind: type, config: Any) -> Data:
    """The data's settings, with sequences no longer than the model can take.

    Args:
        data: What was asked for.
        kind: The model's class.
        config: The model's config. Only where its limit is near, a skeleton is made to find the real one.
    """
    fitted = fit_length(data, config)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int) or fitted.max_length <= limit - SPARE:
        return fitted
    try:
        limit = position_limit(skeleton(kind, without_record(config)))
    except Exception:  # no valid inputs from the config alone; whether those of the data are is seen later
        return fitted
    return replace(fitted, max_length=min(fitted.max_length, limit)) if limit and limit > 0 else fitted
