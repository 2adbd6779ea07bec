"""A linear map with weights in int8, by the C++ library; `linear.cpp` has the schedule."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from ..quads import in_quads
from .native import Watch, by_rows, kernel_for, library

PANEL = 64  # outputs whose weights lie together


class _Linear(ctypes.Structure):
    """`D2dmoeLinear` of linear.cpp."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("bf16", "kernels", "rounds")),
        *((name, ctypes.c_int64) for name in ("inputs", "outputs", "panel", "width")),
        *((name, ctypes.c_void_p) for name in ("weight", "scale", "bias", "gather", "runs", "first_run", "samples")),
        ("sample_count", ctypes.c_int64),
        ("fingerprint", ctypes.c_uint64),
    )


def panels(weight: torch.Tensor, rotate: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """As the library reads weights ``(outputs, inputs)``: bytes ``(panels, ceil(inputs / 4), 64, 4)``, see
    `quads.in_quads`, and the scales of the outputs ``(panels, 64)``; zeros fill up the last panel."""
    padded = torch.nn.functional.pad(weight, (0, 0, 0, -len(weight) % PANEL))
    return in_quads(padded.view(-1, PANEL, weight.shape[1]).transpose(1, 2), "up_weight", rotate)


def runs_of(spread: torch.Tensor, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What lies in one piece in rows of `y`, panel by panel.

    Args:
        spread: ``(width,)``, for each column of `y` its place among the outputs, or -1 for zero.
        outputs: How many there are.

    Returns:
        ``(runs, 3)``, first output or -1, first column of `y` and their number; and ``(panels + 1,)``, the first run of
        each panel and the end. Zeros are with the panel of the outputs before them.
    """
    places, columns = spread.long(), torch.arange(len(spread), device="cpu")  # whatever the default device is
    zero, before = places < 0, torch.cat([places.new_tensor([-2]), places[:-1]])
    goes_on = torch.where(zero, before == -1, (before == places - 1) & (before >= 0) & (places % PANEL > 0))
    first = columns[~goes_on]
    counts = torch.diff(first, append=columns.new_tensor([len(spread)]))
    panel = (places.clamp_min(0).cummax(0).values // PANEL)[first]
    panel = torch.where(zero[first], panel, places[first] // PANEL)
    panel, order = panel.sort(stable=True)
    runs = torch.stack([places[first], first, counts], 1)[order].contiguous()
    return runs, torch.searchsorted(panel, torch.arange(-(-outputs // PANEL) + 1, device="cpu"))


class LinearPlan:
    """One linear map as the library wants it. Holds the tensors that it points to."""

    __slots__ = ("call", "dtype", "inputs", "keep", "linear", "outputs", "struct", "watch")

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, rounds: bool = False,
        gather: torch.Tensor | None = None, width: int | None = None, spread: torch.Tensor | None = None,
        sources: Sequence[torch.Tensor] | None = None, kernels: int | None = None,
    ):  # fmt: skip
        """``y = x W + b`` with weights as `quads.rounded` has them, a scale for each output.

        With `gather` it is ``x[:, gather] W + b``, and with `spread` its outputs lie apart in `y`.

        Args:
            weight: ``(outputs, inputs)``, in fp32 or bf16.
            bias: ``(outputs,)``, or `None`.
            rounds: Rotate and round tokens as well, each on a scale of its own (with `gather`, of what is read of it).
            gather: ``(inputs,)``, the columns of `x` that are read; then the `width` of `x`.
            spread: For each column of `y` its place among the outputs, none twice, or -1 for zero.
            sources: Compared at each call with what they were, see `Watch`; by default weight and bias.
            kernels: Forces an instruction set.

        Raises:
            RuntimeError: If a tensor is not in the memory of this machine.
        """
        for tensor in (weight, bias):
            if tensor is not None and (tensor.device.type != "cpu" or not tensor.data_ptr()):
                raise RuntimeError(f"a weight is on the device {tensor.device}; the CPU kernels need it in memory")
        self.dtype, (outputs, inputs) = weight.dtype, weight.shape
        self.inputs = inputs if width is None else width
        self.outputs = outputs if spread is None else len(spread)
        quads, scale = panels(weight.detach(), rotate=rounds)
        beside = None if bias is None else bias.detach().float().contiguous()
        columns = None if gather is None else gather.to(torch.int32).contiguous()
        runs, first_run = (None, None) if spread is None else runs_of(spread, outputs)
        self.keep = (quads, scale, beside, columns, runs, first_run)
        struct = _Linear(
            bf16=weight.dtype == torch.bfloat16, rounds=rounds, inputs=inputs, outputs=outputs, panel=PANEL,
            kernels=kernel_for(weight.dtype, int8=True) if kernels is None else kernels, weight=quads.data_ptr(),
            scale=scale.data_ptr(), width=self.outputs,
        )  # fmt: skip
        beside_them = (("bias", beside), ("gather", columns), ("runs", runs), ("first_run", first_run))
        for name, tensor in beside_them:
            setattr(struct, name, None if tensor is None else tensor.data_ptr())
        watched = (weight, bias) if sources is None else sources
        self.watch = Watch([t.detach() for t in watched if t is not None])
        self.watch.enter(struct)
        self.struct, self.call, self.linear = struct, ctypes.byref(struct), library()[0].d2dmoe_linear

    @property
    def nbytes(self) -> int:
        """Bytes of the weights in int8 and their scales."""
        return self.keep[0].nbytes + self.keep[1].nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``(…, outputs)`` of ``(…, inputs)``.

        Raises:
            StaleWeights: If the weights have changed.
            ValueError: If `x` is not of this width, dtype and device.
        """
        return by_rows(self.linear, self.call, x, self.inputs, self.outputs, self.dtype)
