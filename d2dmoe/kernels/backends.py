"""Which backend computes what: the choice, its forced override, and what is live on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .cpu import native

ON_CPU = "; fp32 and bf16 on the CPU, without gradients"
BACKENDS = ("reference", "native")
_forced: str | None = os.environ.get("D2DMOE_BACKEND") or None


def chosen(x: torch.Tensor, activation: str | None, gate: str) -> str:
    """The backend for these tokens: `native` where it can do the layer, else `reference`.

    Raises:
        RuntimeError: If a backend is forced that cannot.
    """
    if _forced == "reference":
        return "reference"
    if native.supports(x, activation, gate):
        return "native"
    if _forced == "native":
        _, why = native.library()
        raise RuntimeError(f"backend native was forced, but not for {x.dtype} on {x.device}, {activation}: {why}")
    return "reference"


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
    lib, why = native.library()
    rows = [
        ("native", lib is not None and _forced != "reference", why + ON_CPU * (lib is not None)),
        ("reference", True, "plain PyTorch: any device and dtype, gradients; computes all experts and masks"),
    ]
    return rows if _forced is None else [(n, live, f"{w}; D2DMOE_BACKEND={_forced}") for n, live, w in rows]
