"""A projection around attention on few tokens, by the C++ library; `projection.cpp` has the arithmetic."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from .native import DTYPES, LIVE, Watch, by_rows, kernel_for, library

_TENSORS = ("weight", "norms", "first")
_PLACES = ("gather", "spread")


class _Section(ctypes.Structure):
    """`D2dmoeSection` of projection.cpp."""

    _fields_ = (
        ("second", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("first_output", "outputs", "first_rank", "rank")),
    )


class _Projection(ctypes.Structure):
    """`D2dmoeProjection` of projection.cpp."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("bf16", "kernels")),
        *((name, ctypes.c_int64) for name in ("inputs", "outputs", "rank", "section_count")),
        ("threshold", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in (*_TENSORS, "sections", "base", *_PLACES, "samples")),
        ("sample_count", ctypes.c_int64),
        ("fingerprint", ctypes.c_uint64),
    )


def supports(dtype: torch.dtype) -> bool:
    """Can the library compute projections on this machine in a dtype?"""
    return LIVE and dtype in DTYPES


class ProjectionPlan:
    """One projection at one setting, as the library wants it. Holds the tensors that it points to."""

    __slots__ = ("call", "dtype", "inputs", "keep", "outputs", "project", "struct", "watch")

    def __init__(
        self,
        first: torch.Tensor | None,
        seconds: Sequence[torch.Tensor],
        base: torch.Tensor | None,
        weight: torch.Tensor | None = None,
        norms: torch.Tensor | None = None,
        threshold: float = 0.0,
        *,
        gather: torch.Tensor | None = None,
        width: int | None = None,
        spread: torch.Tensor | None = None,
        sources: Sequence[torch.Tensor] = (),
        kernels: int | None = None,
    ):
        """``y = base + rest A Q``, and with `weight` ``+ (x * keep) W``.

        `rest` is `x` without `weight`, else the inputs that are not kept. `keep` marks those with
        ``|x_j| * norms_j >= threshold``, computed and compared in the dtype of the weights.

        Args:
            first: `A` transposed ``(sum of ranks, inputs)``, or `None`.
            seconds: `Q` transposed of each section of the outputs ``(width, rank)``; ranks may be 0. Empty without
                `first`.
            base: ``(outputs,)``, or `None` for zero.
            weight: `W` ``(inputs, outputs)``, or `None`.
            norms: ``(inputs,)``, with `weight`.
            threshold: The least score that runs.
            gather: ``(rank,)``, in place of `first`: the columns of `x` that `seconds` get; then the `width` of `x`.
            spread: ``(outputs,)``, in place of `seconds`: for each output its place in ``x A``, or -1 for zero.
            sources: Tensors that the others were made from; at each call they are compared with what they are now.
            kernels: Forces an instruction set.

        Raises:
            RuntimeError: If a tensor is not in the memory of this machine.
        """
        main = seconds[0] if gather is not None else first if weight is None else weight
        self.dtype, inputs = main.dtype, main.shape[1] if weight is None else main.shape[0]
        inputs = inputs if width is None else width
        given = {"first": first, "weight": weight, "norms": norms, "base": base,
                 **{f"second_{n}": t for n, t in enumerate(seconds)}}  # fmt: skip
        given = {name: tensor for name, tensor in given.items() if tensor is not None}
        for name, tensor in given.items():
            if tensor.device.type != "cpu" or (tensor.numel() and not tensor.data_ptr()):
                raise RuntimeError(f"{name} is on the device {tensor.device}; the CPU kernels need it in memory")
        given |= {n: t for n, t in (("gather", gather), ("spread", spread)) if t is not None}
        wanted = {"norms": torch.float32, "base": torch.float32, **dict.fromkeys(_PLACES, torch.int32)}
        held = {n: t.detach().to(wanted.get(n, self.dtype)).contiguous() for n, t in given.items()}
        copied = [given[n] for n, t in held.items() if t.data_ptr() != given[n].data_ptr()]
        struct = _Projection(
            bf16=self.dtype == torch.bfloat16, kernels=kernel_for(self.dtype) if kernels is None else kernels,
            inputs=inputs, outputs=self._outputs(seconds, weight, spread),
            rank=len(gather) if gather is not None else 0 if first is None else len(first),
            threshold=float(torch.tensor(threshold, dtype=self.dtype, device="cpu")),
        )  # fmt: skip
        for name in (*_TENSORS, "base", *_PLACES):
            setattr(struct, name, held[name].data_ptr() if name in held else None)
        sections = self._sections([held[f"second_{n}"] for n in range(len(seconds))], struct.outputs)
        struct.sections, struct.section_count = ctypes.addressof(sections), len(sections)
        self.watch = Watch([t.detach() for t in (*sources, *copied)])
        self.watch.enter(struct)
        self.struct, self.keep, self.call = struct, (held, sections), ctypes.byref(struct)
        self.inputs, self.outputs, self.project = inputs, struct.outputs, library()[0].d2dmoe_project

    @staticmethod
    def _outputs(seconds: Sequence[torch.Tensor], weight: torch.Tensor | None, spread: torch.Tensor | None) -> int:
        if spread is not None:
            return len(spread)
        return sum(map(len, seconds)) if weight is None else weight.shape[1]

    @staticmethod
    def _sections(seconds: list[torch.Tensor], outputs: int) -> ctypes.Array:
        if not seconds:
            return (_Section * 1)(_Section(outputs=outputs))
        sections, output, rank = [], 0, 0
        for second in seconds:
            sections.append(_Section(second.data_ptr(), output, len(second), rank, second.shape[1]))
            output, rank = output + len(second), rank + second.shape[1]
        return (_Section * len(sections))(*sections)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``(…, outputs)`` of ``(…, inputs)``.

        Raises:
            StaleWeights: If a source has changed.
            ValueError: If `x` is not of this width, dtype and device.
        """
        return by_rows(self.project, self.call, x, self.inputs, self.outputs, self.dtype)
