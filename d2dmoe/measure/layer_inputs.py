"""What the converted layers read in the dense model, kept so that statistics need not run the model again."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.batches import Batches
from ..moe.gating import set_gate
from ..moe.layer import layers
from ..progress import progress
from .observe import EnoughSeen, Observer, run_observed

KEPT = 512 * 2**20  # bytes of inputs kept in memory
ROOM = 2  # times what a file will take must be free


class Spill:
    """Tensors in a file that nobody else sees, and that is gone when this is."""

    def __init__(self, folder: Path):
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        weakref.finalize(self, self._file.close)

    @classmethod
    def where_room(cls, folder: Path | None, needed: int) -> Spill | None:
        """A file for so many bytes, where there is a folder with room for it."""
        enough = folder is not None and shutil.disk_usage(folder).free > ROOM * needed
        return cls(folder) if enough else None

    def write(self, value: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Write a tensor; returns what reads it."""
        place, shape, dtype = self._file.seek(0, os.SEEK_END), value.shape, value.dtype
        self._file.write(value.detach().cpu().contiguous().view(torch.uint8).numpy())
        device, size = value.device, value.nbytes

        def read() -> torch.Tensor:
            self._file.seek(place)
            return torch.frombuffer(bytearray(self._file.read(size)), dtype=dtype).view(shape).to(device)

        return read


class LayerInputs:
    """The dense pass of a converted model over some batches, for one observer after another.

    The first one has the whole model run. The inputs of its layers are kept, the rest in a file if there is a folder
    with room for it; every further observer then has each layer run by itself on them, one layer after the other.

    Args:
        model: Converted model.
        batches: Calibration batches.
        folder: Where the file may be.
        memory: Bytes kept in memory, by default `KEPT`.
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[dict[str, Any]], folder: Path | None = None, memory: int | None = None
    ):
        self.model, self.batches, self.folder = model, batches, folder
        self.memory = KEPT if memory is None else memory
        self._fits = True
        self._kept: dict[int, list[Callable[[], torch.Tensor]]] | None = None  # by layer, each ``(tokens, d_model)``
        self._lengths: list[int] = []  # tokens of each piece

    @property
    def kept(self) -> bool:
        """Is every layer there by itself?"""
        return self._kept is not None

    def forget(self) -> None:
        """Free what is kept."""
        self._kept = None

    def leading(self, tokens: int) -> LayerInputs:
        """Those of the first tokens, a whole piece of a batch at the end; of no `Batches`, all."""
        few = LayerInputs(self.model, self.batches)
        if isinstance(self.batches, Batches):
            few.batches = self.batches.first(tokens)
            count = sum(before < tokens for before in accumulate(self._lengths[:-1], initial=0))
            few._lengths = self._lengths[:count]
            few._kept = self._kept and {index: parts[:count] for index, parts in self._kept.items()}
        return few

    @torch.no_grad()
    def observe(self, observer: Observer, *, name: str = "", only: Collection[int] | None = None) -> None:
        """Show the observer the inputs and activations of every layer, all experts on.

        Args:
            observer: Its `scores` and `run` are `None`.
            name: Of the progress bar.
            only: Numbers of the layers that it looks at; others may be left out.
        """
        with set_gate(self.model, tau=0):
            if self._kept is None:
                self._run(observer, name)
            else:
                self._replay(observer, name, only)

    def _run(self, observer: Observer, name: str) -> None:
        kept, left, complete, spill, lengths = {}, self.memory, True, None, []

        def keep(index: int, x: torch.Tensor) -> None:
            nonlocal left, spill
            left -= x.nbytes
            if left < 0 and spill is None:
                spill = self._spill()
                self._fits = spill is not None
            if not self._fits:
                kept.clear()
                return
            value = x.clone() if left >= 0 else None
            kept.setdefault(index, []).append(spill.write(x) if value is None else lambda: value)
            if not index:
                lengths.append(len(x))

        def call(index, layer, x, hidden, scores, run):
            nonlocal complete
            if self._fits:
                keep(index, x)
            try:
                observer(index, layer, x, hidden, scores, run)
            except EnoughSeen:
                complete = False
                raise

        # The observer is shown activations whatever it needs: which observer comes first (after --resume it is another
        # one) must not choose the kernels, whose rounding differs.
        run_observed(self.model, self.batches, call, name=name)
        if complete and self._fits:
            self._kept, self._lengths = kept, lengths

    def _spill(self) -> Spill | None:
        """A file for what does not stay in memory, where there is room for it."""
        if self.folder is None or not isinstance(self.batches, Batches):
            return None
        rows = sum(
            layer.block.d_model * layer.block.calls * layer.down_weight.element_size() for layer in layers(self.model)
        )
        return Spill.where_room(self.folder, self.batches.tokens * rows)

    def _replay(self, observer: Observer, name: str, only: Collection[int] | None) -> None:
        numbers = [index for index in sorted(self._kept) if only is None or index in only]
        converted = layers(self.model)
        steps = [(index, converted[index], read) for index in numbers for read in self._kept[index]]
        for index, layer, read in progress(steps, desc=name, disable=not name):
            x = read()
            hidden = layer.activations(x) if getattr(observer, "needs_hidden", True) else None
            with suppress(EnoughSeen):
                observer(index, layer, x, hidden, None, None)
