"""Choose how much of a converted model runs, at run time and without reloading."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from types import TracebackType

from torch import nn

from ..config.checks import check_active, check_tau
from ..config.record import D2DMoEConfig
from ..errors import UserError
from .gate import Gates, GateState, gates_here, set_gates
from .layer import DynamicFFN, layers


def stored_config(model: nn.Module) -> D2DMoEConfig:
    """The conversion's own record.

    Raises:
        UserError: If the model is not a converted one.
    """
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    stored = getattr(config, "d2dmoe", None)
    if stored is None:
        raise UserError("this model was not converted by d2dmoe; run `d2dmoe convert --model …` first")
    return stored


class set_gate:
    """Set the compute budget of a converted model; as a context manager, for the length of a block only.

        d2dmoe.set_gate(model, active=0.25)          # from now on, for everybody
        with d2dmoe.set_gate(model, tau=0.1): ...    # here only: in this thread or task

    A server whose requests have budgets of their own uses `use_gate`, which never touches what others see.

    Args:
        model: Converted model; other models, copies included, are not touched.
        active: Active fraction. 1 runs everything (exactly the dense model); a stored budget brings its own
            thresholds and stand-ins; any other fraction takes thresholds between those of its neighbours and the
            stand-ins of one of them, see `Budgets.stand_ins`, and warns once.
        tau: Threshold instead; 0 runs everything, larger runs less.
        budget: Number of a stored budget instead, 0 for the one that runs least.
        layers: Numbers or names of the converted layers to set; all of them by default.
        oracle: Select by the true expert norms instead of the router (for analysis; saves nothing).

    Raises:
        UserError: If the model is not converted, a value is out of range, or a layer does not exist.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        active: float | None = None,
        tau: float | None = None,
        budget: int | None = None,
        layers: Sequence[int | str] | None = None,
        oracle: bool = False,
    ):
        self._states = _states(model, active, tau, budget, layers, oracle)
        self._here: list[AbstractContextManager] = []
        self._undo = set_gates(self._states)

    def __enter__(self) -> set_gate:
        self._undo()
        here = gates_here(self._states)
        here.__enter__()
        self._here.append(here)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._here.pop().__exit__(kind, error, trace)
        for layer in self._states:
            layer.gate.leave()


@contextmanager
def use_gate(
    model: nn.Module,
    *,
    active: float | Sequence[float] | None = None,
    tau: float | Sequence[float] | None = None,
    budget: int | Sequence[int] | None = None,
) -> Iterator[None]:
    """Put a compute budget in force in this thread or task only, for the length of a block.

        with d2dmoe.use_gate(model, active=0.25): ...            # one request
        with d2dmoe.use_gate(model, active=[0.25, 0.5, 1]): ...  # one budget for each row of the batch

    Threads that are started inside do not inherit it (`contextvars.copy_context().run` makes them). Code compiled by
    `torch.compile` does not see it: there, use `set_gate`.

    Args:
        model: Converted model.
        active, tau, budget: As of `set_gate`, or a sequence with one value for each row of the batch.

    Raises:
        UserError: As `set_gate`.
    """
    given = {"active": active, "tau": tau, "budget": budget}
    rows = {name: value for name, value in given.items() if isinstance(value, Sequence) and not isinstance(value, str)}
    if not rows:
        states: dict[DynamicFFN, Gates] = {**_states(model, active, tau, budget, None, False)}
    else:
        _one_of(active, tau, budget)
        ((name, values),) = rows.items()
        if not values:
            raise UserError(f"{name}=[]: give one value for each row of the batch")
        each = [_states(model, *({**given, name: v}[n] for n in given), None, False) for v in values]
        states = {layer: tuple(found[layer] for found in each) for layer in each[0]}
    with gates_here(states):
        yield


def _one_of(active: object, tau: object, budget: object) -> None:
    if sum(value is not None for value in (active, tau, budget)) != 1:
        raise UserError("give set_gate one of active=…, tau=… or budget=…")


def _states(
    model: nn.Module,
    active: float | None,
    tau: float | None,
    budget: int | None,
    layers: Sequence[int | str] | None,
    oracle: bool,
) -> dict[DynamicFFN, GateState]:
    """The gate of each layer that is to be set."""
    _one_of(active, tau, budget)
    config = stored_config(model)
    chosen = _choose(model, layers)
    if any(layer.merged for _, layer in chosen):
        raise UserError("this model was merged at one budget; load it again to choose another")
    if budget is not None:
        states = _states_of_budget(config, budget)
    else:
        states = _states_for_active(config, active) if active is not None else _states_for_tau(config, tau, chosen)
    target = ("root" if config.router_target == "root" else "norm") if oracle else ""
    return {layer: replace(states[index], oracle=target) for index, layer in chosen}


def _choose(model: nn.Module, wanted: Sequence[int | str] | None) -> list[tuple[int, DynamicFFN]]:
    every = list(enumerate(layers(model)))
    if wanted is None:
        return every
    by_name = {layer.block.name: (index, layer) for index, layer in every}
    chosen = []
    for item in wanted:
        if item in by_name:
            chosen.append(by_name[item])
        elif isinstance(item, int) and -len(every) <= item < len(every):
            chosen.append(every[item])
        else:
            raise UserError(f"no converted layer {item!r}; there are {len(every)}, from {every[0][1].block.name} on")
    return chosen


def gate_state(config: D2DMoEConfig, tau: float, stand_in: int | None = None, fade: float = 1.0) -> GateState:
    """The checkpoint's gate at a threshold, with the stand-ins of a stored budget or none, scaled by `fade`."""
    bounds = (config.min_experts, config.max_experts, config.shared_experts)
    return GateState(config.gate, tau, stand_in, *bounds, fade=fade)


def _states_of_budget(config: D2DMoEConfig, number: int) -> list[GateState]:
    if not 0 <= number < len(config.budgets):
        raise UserError(f"budget={number}: this checkpoint holds {len(config.budgets)} budgets, counted from 0")
    return [gate_state(config, tau, number) for tau in config.budgets[number].taus]


def _states_for_active(config: D2DMoEConfig, active: float) -> list[GateState]:
    check_active(active)
    if active == 1:
        return [gate_state(config, 0.0, None) for _ in config.blocks]
    stored = config.budgets.find(active)
    if stored is not None:
        return _states_of_budget(config, stored)
    taus = config.thresholds(active)
    number, fade = config.budgets.stand_ins(active)
    if number is not None and config.stand_in != "zero":
        _say_once(config, f"active={active:g}", config.budgets[number].active)
    return [gate_state(config, tau, number, fade) for tau in taus]


def _states_for_tau(config: D2DMoEConfig, tau: float, chosen: list) -> list[GateState]:
    check_tau(tau, config.gate)
    if tau == 0:
        return [gate_state(config, 0.0, None) for _ in config.blocks]
    states = [gate_state(config, tau, config.budgets.nearest_tau(i, tau)) for i in range(len(config.blocks))]
    exact = all(any(abs(b.taus[i] - tau) < 1e-9 for b in config.budgets) for i, _ in chosen)
    if config.budgets and config.stand_in != "zero" and not exact:
        _say_once(config, f"tau={tau:g}", config.budgets[states[chosen[0][0]].stand_in].active)
    return states


def _say_once(config: D2DMoEConfig, asked: str, active: float) -> None:
    """Warn, once for each setting of each model."""
    said = config.__dict__.setdefault("_said", set())
    if asked in said:
        return
    said.add(asked)
    warnings.warn(
        f"{asked} is not a stored budget ({', '.join(f'{a:g}' for a in config.budgets.actives)}): "
        f"using the stand-ins fitted for active={active:g}",
        stacklevel=5,
    )
