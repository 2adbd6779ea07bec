"""Choose how much of a converted model runs, at run time and without reloading."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from numbers import Integral
from types import TracebackType
from typing import Any

from torch import nn

from ..config.checks import check_active, check_tau
from ..config.projections import ProjectionState
from ..config.record import D2DMoEConfig
from ..errors import UserError
from .gate import Gates, GateState, gates_here, set_gates
from .layer import DynamicFFN, layers
from .projection import DynamicProjection, projections

SAID = 64  # notes that a model remembers having given


NOT_CONVERTED = "this model was not converted by d2dmoe; run `d2dmoe convert --model …` first"


def converted_model(model: Any) -> nn.Module:
    """The converted model itself, out of a wrapper (DDP, peft, `torch.compile`), a pipeline or a Trainer.

    Raises:
        UserError: If there is none in it.
    """
    inner = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    for module in inner.modules() if isinstance(inner, nn.Module) else ():
        stored = getattr(getattr(module, "config", None), "quantization_config", None)
        if hasattr(stored, "d2dmoe"):
            return module
    if isinstance(inner, nn.Module):
        raise UserError(NOT_CONVERTED)
    raise UserError(f"a {type(model).__name__} is not a model; give the model, or a pipeline or Trainer that holds it")


def stored_config(model: Any) -> D2DMoEConfig:
    """The conversion's own record.

    Raises:
        UserError: If the model is not a converted one.
    """
    return converted_model(model).config.quantization_config.d2dmoe


class set_gate:
    """Set the compute budget of a converted model; as a context manager, for the length of a block only.

        d2dmoe.set_gate(model, active=0.25)          # from now on, for everybody
        with d2dmoe.set_gate(model, tau=0.1): ...    # here only: in this thread or task

    A server whose requests have budgets of their own uses `use_gate`, which never touches what others see.

    Args:
        model: Converted model, also wrapped or in a pipeline; other models, copies included, are not touched.
        active: Active fraction. 1 runs everything (exactly the dense model); a stored budget brings its own
            thresholds and stand-ins; any other fraction takes thresholds between those of its neighbours and the
            stand-ins of one of them, see `Budgets.stand_ins`, and warns once.
        tau: Threshold instead; 0 runs everything, larger runs less. Projections around attention then run dense.
        budget: Number of a stored budget instead, 0 for the one that runs least.
        layers: Numbers of the converted layers with experts to set, in the order in which they run, or names of
            converted layers and projections, or one of them; all by default.
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
        layers: Sequence[int | str] | int | str | None = None,
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
        states: dict[nn.Module, Gates] = {**_states(model, active, tau, budget, None, False)}
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
    layers: Sequence[int | str] | int | str | None,
    oracle: bool,
) -> dict[nn.Module, GateState | ProjectionState]:
    """The gate of each layer that is to be set."""
    _one_of(active, tau, budget)
    model = converted_model(model)
    config = stored_config(model)
    active, tau = (
        None if value is None else _number(name, value) for name, value in (("active", active), ("tau", tau))
    )
    projected = projections(model)
    if layers is not None:
        wanted = {layers} if isinstance(layers, Integral | str) else {*layers}
        projected = [layer for layer in projected if layer.projection.name in wanted]
        layers = [item for item in wanted if item not in {layer.projection.name for layer in projected}]
    chosen = _choose(model, layers)
    if any(layer.merged for layer in (*projected, *(layer for _, layer in chosen))):
        raise UserError("this model was merged at one budget; load it again to choose another")
    if budget is not None:
        states = _states_of_budget(config, budget)
    else:
        states = _states_for_active(config, active) if active is not None else _states_for_tau(config, tau, chosen)
    target = ("root" if config.router_target == "root" else "norm") if oracle else ""
    found: dict[nn.Module, GateState | ProjectionState] = {
        layer: replace(states[index], oracle=target) for index, layer in chosen
    }
    return found | _states_of_projections(config, projected, active, budget)


def _states_of_projections(
    config: D2DMoEConfig, projected: list[DynamicProjection], active: float | None, budget: int | None
) -> dict[nn.Module, ProjectionState]:
    """What each projection does: as stored, at the next stored budget above, or everything."""
    number = config.budgets.of_projections(active) if budget is None and active is not None else budget
    states = config.projection_states(number)
    places = {number: place for place, number in enumerate(sorted({layer.number for layer in projected}))}
    if len(places) < len(states):  # some of them only: a place is the number in the record
        places = {number: number for number in places}
    return {layer: states[places[layer.number]] for layer in projected}


def _number(name: str, value: Any) -> float | None:
    """A number, also where it is one of numpy or torch, or text such as `0.25` or `25%`."""
    if value is None:
        return None
    try:
        if isinstance(value, bool):
            raise ValueError
        if isinstance(value, str) and value.rstrip().endswith("%"):
            return float(value.rstrip()[:-1]) / 100
        return float(value)
    except (TypeError, ValueError):
        raise UserError(f"{name}={value!r}: give a number, for instance 0.25") from None


def _choose(model: nn.Module, wanted: Any) -> list[tuple[int, DynamicFFN]]:
    """The layers to set, each with its place among the blocks of the record.

    An adapter that trains a copy of a block (`modules_to_save`) makes two layers of one place.
    """
    found = layers(model)
    places = {number: place for place, number in enumerate(sorted({layer.number for layer in found}))}
    if wanted is None:
        return [(places[layer.number], layer) for layer in found]
    chosen = []
    for item in (wanted,) if isinstance(wanted, Integral | str) else wanted:
        place = item % len(places) if isinstance(item, Integral) and -len(places) <= item < len(places) else None
        here = [x for x in found if x.block.name == item or (places[x.number] == place and not isinstance(item, bool))]
        if not here:
            raise UserError(f"no converted layer {item!r}; there are {len(places)}, from {found[0].block.name} on")
        chosen += [(places[layer.number], layer) for layer in here]
    return chosen


def gate_state(config: D2DMoEConfig, tau: float, stand_in: int | None = None, fade: float = 1.0) -> GateState:
    """The checkpoint's gate at a threshold, with the stand-ins of a stored budget or none, scaled by `fade`."""
    bounds = (config.min_experts, config.max_experts, config.shared_experts)
    return GateState(config.gate, tau, stand_in, *bounds, fade=fade)


def _states_of_budget(config: D2DMoEConfig, number: int) -> list[GateState]:
    if isinstance(number, bool) or not isinstance(number, Integral) or not 0 <= number < len(config.budgets):
        raise UserError(f"budget={number!r}: this checkpoint holds {len(config.budgets)} budgets, counted from 0")
    return [gate_state(config, tau, number) for tau in config.budgets[number].taus]


def _states_for_active(config: D2DMoEConfig, active: float) -> list[GateState]:
    check_active(active, "active=")
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
    check_tau(tau, config.gate, "tau=")
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
    if len(said) >= SAID:
        said.clear()
    said.add(asked)
    warnings.warn(
        f"{asked} is not a stored budget ({', '.join(f'{a:g}' for a in config.budgets.actives)}): "
        f"using the stand-ins fitted for active={active:g}",
        stacklevel=5,
    )
