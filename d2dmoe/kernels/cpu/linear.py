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
        *((name, ctypes.c_int64) for name in ("inputs", "outputs", "panel")),
        *((name, ctypes.c_void_p) for name in ("weight", "scale", "bias", "samples")),
        ("sample_count", ctypes.c_int64),
        ("fingerprint", ctypes.c_uint64),
    )


def panels(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As the library reads weights ``(outputs, inputs)``: bytes ``(panels, ceil(inputs / 4), 64, 4)``, see
    `quads.in_quads`, and the scales of the outputs ``(panels, 64)``; zeros fill up the last panel."""
    padded = torch.nn.functional.pad(weight, (0, 0, 0, -len(weight) % PANEL))
    return in_quads(padded.view(-1, PANEL, weight.shape[1]).transpose(1, 2), "up_weight")


class LinearPlan:
    """One linear map as the library wants it. Holds the tensors that it points to."""

    __slots__ = ("call", "dtype", "inputs", "keep", "linear", "outputs", "struct", "watch")

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, rounds: bool = False,
        sources: Sequence[torch.Tensor] | None = None, kernels: int | None = None,
    ):  # fmt: skip
        """``y = x W + b`` with weights as `quads.rounded` has them, a scale for each output.

        Args:
            weight: ``(outputs, inputs)``, in fp32 or bf16.
            bias: ``(outputs,)``, or `None`.
            rounds: Round tokens as well, each on a scale of its own.
            sources: Compared at each call with what they were, see `Watch`; by default weight and bias.
            kernels: Forces an instruction set.

        Raises:
            RuntimeError: If a tensor is not in the memory of this machine.
        """
        for tensor in (weight, bias):
            if tensor is not None and (tensor.device.type != "cpu" or not tensor.data_ptr()):
                raise RuntimeError(f"a weight is on the device {tensor.device}; the CPU kernels need it in memory")
        self.dtype, (self.outputs, self.inputs) = weight.dtype, weight.shape
        quads, scale = panels(weight.detach())
        beside = None if bias is None else bias.detach().float().contiguous()
        self.keep = (quads, scale, beside)
        struct = _Linear(
            bf16=weight.dtype == torch.bfloat16, rounds=rounds, inputs=self.inputs, outputs=self.outputs, panel=PANEL,
            kernels=kernel_for(weight.dtype, int8=True) if kernels is None else kernels, weight=quads.data_ptr(),
            scale=scale.data_ptr(), bias=None if beside is None else beside.data_ptr(),
        )  # fmt: skip
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
