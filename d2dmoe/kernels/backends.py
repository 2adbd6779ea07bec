"""Which backend computes what: the choice, its forced override, and what is live on this machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from .cpu import native, projection

ON_CPU = "; fp32 and bf16 on the CPU, without gradients"


class Backend(Protocol):
    """Computes a layer in one go, and only the experts that run. A new one is a file, and a line in `FUSED`."""

    def supports(self, x: torch.Tensor, activation: str | None, gate: str) -> bool:
        """Can it do a layer of tensors like `x`, with this activation and gate?"""

    def prepare(
        self,
        tensors: dict[str, torch.Tensor | None],
        activation: str,
        gate: str,
        tau: float,
        min_experts: int = 0,
        max_experts: int = 0,
        shared: int = 0,
        *,
        sources: Sequence[torch.Tensor] = (),
        tiles: dict | None = None,
        expert_dtype: str | None = None,
    ) -> Callable[..., torch.Tensor]:
        """A function of ``x (tokens, d_model)`` and ``run (tokens, experts)`` or `None` to ``(tokens, d_out)``.

        The arguments are those of `operator.reference`, and `expert_dtype` one of `quads.EXPERT_DTYPES`. The function
        raises `StaleWeights` when it finds a change of `sources`, from which `tensors` were made. Its method `check`
        does only that.
        """

    def synchronize(self) -> None:
        """Wait for what was begun on its device."""

    def live(self) -> tuple[bool, str]:
        """Does it work on this machine, and why or why not?"""


FUSED: dict[str, Any] = {"native": native}
BACKENDS = ("reference", *FUSED)
_forced: str | None = os.environ.get("D2DMOE_BACKEND") or None


def fused_backend(x: torch.Tensor, activation: str | None, gate: str) -> Any:
    """The `Backend` for these tokens; `None` where only the reference can do the layer.

    Raises:
        RuntimeError: If a backend is forced that cannot.
    """
    if _forced == "reference":
        return None
    for name, backend in FUSED.items():
        if _forced in (None, name) and backend.supports(x, activation, gate):
            return backend
    if _forced is not None:
        _, why = FUSED[_forced].live()
        raise RuntimeError(f"backend {_forced} was forced, but not for {x.dtype} on {x.device}, {activation}: {why}")
    return None


def projects(dtype: torch.dtype) -> bool:
    """May the native library compute projections in this dtype, of tensors in the memory of this machine?"""
    return _forced != "reference" and projection.supports(dtype)


def chosen(x: torch.Tensor, activation: str | None, gate: str) -> str:
    """The name of the backend for these tokens; see `fused_backend`."""
    backend = fused_backend(x, activation, gate)
    return next((name for name, fused in FUSED.items() if fused is backend), "reference")


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force a backend; `None` goes back to choosing. `D2DMOE_BACKEND` in the environment forces one from the start."""
    global _forced
    if name not in (None, *BACKENDS):
        raise ValueError(f"no backend {name!r}; there are {', '.join(BACKENDS)}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def backends() -> list[tuple[str, bool, str]]:
    """`(name, live, why)` of every backend on this machine."""
    rows = []
    for name, fused in FUSED.items():
        live, why = fused.live()
        rows.append((name, live and _forced != "reference", why + ON_CPU * live))
    rows.append(("reference", True, "plain PyTorch: any device and dtype, gradients; computes all experts and masks"))
    return rows if _forced is None else [(n, live, f"{w}; D2DMOE_BACKEND={_forced}") for n, live, w in rows]
