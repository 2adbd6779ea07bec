"""Run a converted model over batches with an observer in every layer. Padding is left out; memory holds one batch."""

from __future__ import annotations

import ctypes
import gc
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from ..discovery.inputs import model_inputs
from ..moe.layer import DynamicFFN, layers
from ..moe.projection import DynamicProjection, around_attention, projections
from ..progress import progress

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
# (layer number, layer, x (tokens, d), hidden (E, tokens, s), scores (tokens, E) or None, run (tokens, E) or None);
# an observer whose attribute `needs_hidden` is false may get `None` for hidden, and does not slow the layer down
Observer = Callable[[int, DynamicFFN, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None], None]


def release_memory() -> None:
    """Return freed memory to the system. glibc keeps hundreds of megabytes of it after a stage."""
    gc.collect()
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        # Allocations above 32 MB get their own pages, which go back to the system when freed. A lower bound would map
        # every tensor anew, which costs more than a third of a training step.
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)
        libc.mallopt(M_TRIM_THRESHOLD, 2**28)
        libc.malloc_trim(0)


class EnoughSeen(Exception):
    """Raised by an observer that needs no later layer: it ends the pass over this batch."""


def real_rows(mask: torch.Tensor | None, rows: int) -> torch.Tensor | None:
    """Which of so many rows are tokens ``(rows,)``, by a batch's `attention_mask`; `None` if all of them count."""
    if mask is None or mask.numel() != rows or mask.all():
        return None
    return mask.reshape(-1).bool()


@contextmanager
def observing(model: nn.Module, observer: Observer) -> Iterator[dict[str, torch.Tensor | None]]:
    """Have `observer` called in every converted layer at every forward pass.

    Yields:
        A mapping whose entry `"mask"` may be set to the batch's `attention_mask` ``(batch, length)``: tokens it
        excludes are then not shown to the observer.
    """
    current: dict[str, torch.Tensor | None] = {"mask": None}

    def watch(index: int) -> Callable:
        def call(layer, x, hidden, scores, run):
            keep = real_rows(current["mask"], len(x))
            if keep is not None:
                hidden = None if hidden is None else hidden[:, keep]
                x, scores, run = (None if t is None else t[keep] for t in (x, scores, run))
            observer(index, layer, x, hidden, scores, run)

        call.needs_hidden = getattr(observer, "needs_hidden", True)
        return call

    watched = layers(model)
    for index, layer in enumerate(watched):
        layer.observer = watch(index)
    try:
        yield current
    finally:
        for layer in watched:
            layer.observer = None


@contextmanager
def observing_projections(
    model: nn.Module, observer: Callable[[DynamicProjection, torch.Tensor, torch.Tensor | None], None]
) -> Iterator[dict[str, torch.Tensor | None]]:
    """Have `observer(layer, x, keep)` called in every projection at every forward pass; otherwise as `observing`."""
    current: dict[str, torch.Tensor | None] = {"mask": None}

    def call(layer: DynamicProjection, x: torch.Tensor, keep: torch.Tensor | None) -> None:
        wanted = real_rows(current["mask"], len(x))
        if wanted is not None:
            x, keep = x[wanted], None if keep is None else keep[wanted]
        observer(layer, x, keep)

    watched = projections(model)
    for layer in watched:
        layer.observer = call
    try:
        yield current
    finally:
        for layer in watched:
            layer.observer = None


TOKENS_AT_ONCE = 1024


def pieces(batches: Iterable[dict[str, Any]], row_limit: int = 2**30) -> Iterator[dict[str, Any]]:
    """The batches cut to at most `TOKENS_AT_ONCE` tokens and `row_limit` sequences, to bound the memory of a pass."""
    for batch in batches:
        first = next(iter(batch.values()))
        length = batch["input_ids"].shape[1] if "input_ids" in batch else 1
        rows = max(1, min(row_limit, TOKENS_AT_ONCE // length))
        for start in range(0, len(first), rows):
            yield {k: v[start : start + rows] for k, v in batch.items()}


def trunk(model: nn.Module) -> nn.Module:
    """The model without its head, if every converted layer lies below the head: logits can take most of the memory."""
    base = getattr(model, "base_model", model)
    takes = inspect.signature(base.forward).parameters
    return base if model.main_input_name in takes and len(layers(base)) == len(layers(model)) else model


def trunk_below(model: nn.Module, names: list[str]) -> nn.Module:
    """As `trunk`, for a dense model whose observed modules have these names."""
    prefix = getattr(model, "base_model_prefix", "")
    below = prefix and all(name.startswith(f"{prefix}.") for name in names)
    takes = inspect.signature(model.base_model.forward).parameters if below else ()
    return model.base_model if model.main_input_name in takes else model


@torch.no_grad()
def run_observed(model: nn.Module, batches: Iterable[dict[str, Any]], observer: Observer, *, name: str = "") -> None:
    """One pass of the model, without its head, over the batches with `observer` in every layer."""
    model = trunk(model)
    with observing(model, observer) as current:
        for batch in pieces(progress(batches, desc=name, disable=not name)):
            current["mask"] = batch.get("attention_mask")
            with suppress(EnoughSeen):
                model(**model_inputs(model, batch))


@torch.no_grad()
def run_groups(
    model: nn.Module, batches: Iterable[dict[str, Any]], observer: Callable[[DynamicProjection, torch.Tensor], None],
    *, name: str = "",
) -> None:  # fmt: skip
    """One pass of the model, without its head, with `observer(layer, x)` in the first projection of each group."""
    first = {layer.projection.group: layer for layer in reversed(around_attention(model))}
    model = trunk(model)

    def call(layer: DynamicProjection, x: torch.Tensor, keep: torch.Tensor | None) -> None:
        if first[layer.projection.group] is layer:
            observer(layer, x)

    with observing_projections(model, call) as current:
        for batch in pieces(progress(batches, desc=name, disable=not name)):
            current["mask"] = batch.get("attention_mask")
            model(**model_inputs(model, batch))


class ChannelCounter:
    """An observer of projections that counts the input channels that run, padding left out."""

    def __init__(self) -> None:
        self.executed: dict[int, int] = {}
        self.possible: dict[int, int] = {}

    def __call__(self, layer: DynamicProjection, x: torch.Tensor, keep: torch.Tensor | None) -> None:
        """See `observing_projections`."""
        self.possible[layer.number] = self.possible.get(layer.number, 0) + x.numel()
        self.executed[layer.number] = self.executed.get(layer.number, 0) + (
            x.numel() if keep is None else int(keep.sum())
        )

    def fraction(self, number: int) -> float:
        """Share of the channels of one projection that ran; 1 if it never ran."""
        return self.executed[number] / self.possible[number] if self.possible.get(number) else 1.0


class ActiveCounter:
    """An observer that counts executed (token, expert) pairs of each layer, padding left out."""

    needs_hidden = False

    def __init__(self) -> None:
        self.executed: dict[int, int] = {}
        self.possible: dict[int, int] = {}

    def __call__(self, index, layer, x, hidden, scores, run) -> None:
        """See `Observer`."""
        pairs = x.shape[0] * layer.block.experts
        self.possible[index] = self.possible.get(index, 0) + pairs
        self.executed[index] = self.executed.get(index, 0) + (pairs if run is None else int(run.sum()))

    @property
    def fraction(self) -> float:
        """Executed pairs over all pairs, all layers together."""
        return sum(self.executed.values()) / max(sum(self.possible.values()), 1)

    def by_layer(self, count: int) -> list[float]:
        """The same for each of `count` layers; a layer that never ran counts as 1."""
        return [self.executed[i] / self.possible[i] if self.possible.get(i) else 1.0 for i in range(count)]
