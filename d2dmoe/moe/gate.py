"""The gate in force in a layer: that of the calling thread or task where it has one, else the model's own."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import UserError
from ..kernels.gates import select


@dataclass(frozen=True)
class GateState:
    """A setting of the gate.

    Attributes:
        name: A key of `gates.GATES`.
        tau: Threshold; 0 runs every expert.
        stand_in: Row of the stored stand-ins to use, or `None` for zero.
        min_experts, max_experts: Bounds per token (`max_experts` 0: none).
        shared: The first so many experts always run.
        soft: Let gradients reach the router, and nothing before it, through the gate (`gates.straight_through`).
        oracle: Select by the true values of this router target, `norm` or `root`, instead of the router's scores (for
            analysis only).
        fade: Scale of the stand-ins in [0, 1]; below 1 above the budget that they were fitted for.
    """

    name: str = "topk"
    tau: float = 0.0
    stand_in: int | None = None
    min_experts: int = 0
    max_experts: int = 0
    shared: int = 0
    soft: bool = False
    oracle: str = ""
    fade: float = 1.0

    def faded(self, stand_in: torch.Tensor) -> torch.Tensor:
        """A stand-in at the scale in force."""
        return stand_in if self.fade == 1 else stand_in * self.fade

    def select(self, scores: torch.Tensor) -> torch.Tensor:
        """Which experts run, boolean ``(tokens, experts)``, for scores of that shape; see `gates.select`."""
        return select(scores, self.name, self.tau, self.min_experts, self.max_experts, self.shared)


Gates = GateState | tuple[GateState, ...]  # a tuple: one for each row of the batch
_HERE: ContextVar[Mapping[Any, Gates] | None] = ContextVar("d2dmoe_gates", default=None)
_LOCK = threading.Lock()


@contextmanager
def gates_here(gates: Mapping[Any, Gates]) -> Iterator[None]:
    """Put gates in force, by layer, in this thread or task only; other layers keep theirs."""
    before = _HERE.set({**(_HERE.get() or {}), **gates})
    try:
        yield
    finally:
        _HERE.reset(before)


class _Owner:
    """Of a setting that can still be taken back."""


def set_gates(gates: Mapping[Any, GateState]) -> Callable[[], None]:
    """Set gates, by layer, until further notice; returns how to undo it, for as long as somebody holds that.

    Where the caller is in the block of a `gates_here` that has the layer, then for the rest of that block, else for
    everybody.
    """
    outer, owner = _HERE.get() or {}, _Owner()
    inside = {layer: state for layer, state in gates.items() if layer in outer}
    if inside:
        _HERE.set({**outer, **inside})
    outside = [layer for layer in gates if layer not in outer]
    for layer in outside:
        layer.gate.set(gates[layer], owner)

    def undo() -> None:
        if inside:
            _HERE.set(outer)
        for layer in outside:
            layer.gate.take_back(owner)

    return undo


class Gate:
    """The gate of one layer.

    `with set_gate(…)` sets it twice: for everybody when it is constructed, as the statement without `with` does, and
    for its own thread or task when it is entered. Entering takes back what construction set for everybody, whatever
    others have set since. Hence a pile of settings, each with its owner; those whose owner is gone are there to stay.
    """

    def __init__(self, state: GateState | None = None):
        self.own = self.latest = state or GateState()
        self._pile: list[tuple[Callable[[], Any], GateState]] = [(_nobody, self.own)]

    def __reduce__(self) -> tuple:
        """Copies start with the setting for everybody."""
        return Gate, (self.own,)

    def in_force(self, layer: Any) -> Gates:
        """The gate of this layer for the caller, or one for each row of the batch."""
        if torch.compiler.is_compiling():  # knows no contexts: the last setting that anybody has made
            return self.latest
        here = _HERE.get()
        return self.own if here is None else here.get(layer, self.own)

    def set(self, state: GateState, owner: _Owner) -> None:
        """Set it for everybody; its owner, while there is one, can take it back."""
        with _LOCK:
            stays = max(n for n, (ref, _) in enumerate(self._pile) if ref() is None)
            self._pile = [*self._pile[stays:], (weakref.ref(owner), state)]
            self.own = self.latest = state

    def take_back(self, owner: _Owner) -> None:
        """Undo what this owner has set for everybody."""
        with _LOCK:
            self._pile = [entry for entry in self._pile if entry[0]() is not owner]
            self.own = self._pile[-1][1]

    def leave(self) -> None:
        """The context of a setting has ended: compiled code goes back to the setting for everybody."""
        self.latest = self.own


class Gated:
    """What all layers with a gate have in common.

    Attributes:
        gate: The settings, the model's own and those of threads or tasks.
    """

    gate: Gate

    @property
    def gate_state(self) -> Any:
        """The gate in force for the caller, of several rows the first one's."""
        here = self.gate.in_force(self)
        return here[0] if isinstance(here, tuple) else here

    @gate_state.setter
    def gate_state(self, state: Any) -> None:
        set_gates({self: state})

    def by_rows(self, inputs: torch.Tensor, states: tuple) -> torch.Tensor:
        """Each row of the batch by its own gate; a row may have become several, one after the other (beams, tokens)."""
        times, rest = divmod(len(inputs), len(states))
        if rest:
            raise UserError(f"{len(states)} budgets were given for a batch that reaches this layer as {len(inputs)}")
        y = None
        for state in dict.fromkeys(states):
            rows = [n for n, s in enumerate(states) for n in range(n * times, (n + 1) * times) if s == state]
            with gates_here({self: state}):
                part = self(inputs[rows])
            y = part.new_empty(len(inputs), *part.shape[1:]) if y is None else y
            y[rows] = part
        return y


def _nobody() -> None:
    return None
