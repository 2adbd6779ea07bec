"""Named starting points, and how defaults, preset, recipe and flags become one set of options."""

from __future__ import annotations

import difflib
import types
import typing
from dataclasses import fields
from typing import Any

from ..errors import UserError
from .checks import check

# The paper's method to the letter (Szatkowski et al. 2024, sec. 3), whatever the defaults above become.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "split": "weights",
        "gate": "max",
        "stand_in": "zero",
        "thresholds": "global",
        "router_width": 128,
        "router_fit": "trained",
        "router_learning_rate": 3e-3,
        "router_target": "norm",
        "router_loss": "mse",
        "allocation": "uniform",
        "compensate": False,
    },
    # MoEfication (Zhang et al. 2022, arXiv 2110.01786): parameter clustering, an MLP router told which experts are
    # active, a fixed number of experts. Made for ReLU models; on others it is what that recipe gives without a swap.
    "moefication": {
        "split": "weights",
        "gate": "topk",
        "stand_in": "zero",
        "thresholds": "per-layer",
        "router_width": 128,
        "router_fit": "trained",
        "router_learning_rate": 3e-3,
        "router_target": "activation",
        "router_loss": "bce",
        "allocation": "uniform",
        "compensate": False,
    },
    # The default without gradient descent.
    "training-free": {"router_fit": "closed-form"},
}


def resolve(config_class: type, *layers: dict[str, Any]) -> Any:
    """Defaults < preset < recipe < flags. Later layers win; the preset named by the last layer that names one applies.

    Raises:
        UserError: If a key is unknown or a value is not allowed.
    """
    allowed = {f.name: f for f in fields(config_class)}
    if "sparsify_options" in allowed:
        layers = _sparsify_keys_gathered(layers, allowed)
    for layer in layers:
        for key in layer:
            if key not in allowed:
                close = difflib.get_close_matches(key, allowed, n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise UserError(f"unknown recipe key {key!r}{hint}; the keys are the flags of d2dmoe convert --help")
    merged: dict[str, Any] = {}
    preset = next((layer["preset"] for layer in reversed(layers) if layer.get("preset")), "default")
    if "preset" in allowed and preset in PRESETS:
        merged.update(PRESETS[preset])
    hints = typing.get_type_hints(config_class)
    for layer in layers:
        merged.update({key: _typed(key, value, hints[key]) for key, value in layer.items()})
    config = config_class(**merged)
    check(config)
    return config


def _sparsify_keys_gathered(layers: tuple[dict[str, Any], ...], allowed: Any) -> tuple[dict[str, Any], ...]:
    """Keys such as `sparsify_alpha`, whose names and values another stage knows, as one mapping."""
    gathered: dict[str, Any] = {}
    rest = []
    for layer in layers:
        given = layer.get("sparsify_options") or {}
        if not isinstance(given, dict):
            raise UserError(f"sparsify_options {given}: must be a mapping of keys of d2dmoe sparsify")
        gathered.update(given)
        flat = {k for k in layer if k.startswith("sparsify_") and k not in allowed}
        gathered.update({key.removeprefix("sparsify_"): layer[key] for key in flat})
        rest.append({k: v for k, v in layer.items() if k not in flat and k != "sparsify_options"})
    return (*rest, {"sparsify_options": gathered}) if gathered else tuple(rest)


def _typed(key: str, value: Any, hint: Any) -> Any:
    """The value as its key's type. YAML reads 3e-3 as text, and one number where a list may stand.

    Raises:
        UserError: If it cannot be.
    """
    if hint == list[float]:
        many = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
        return [_typed(key, item, float) for item in many]
    union = isinstance(hint, types.UnionType)
    if union and value is None:
        return None
    kind = next(a for a in typing.get_args(hint) if a is not types.NoneType) if union else hint
    if kind is float and isinstance(value, str) and value.strip().endswith("%"):
        return _typed(key, value.strip()[:-1], kind) / 100
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    fits = value is not None and isinstance(value, bool) == (kind is bool) and not isinstance(value, list | dict)
    try:
        if kind is int and fits and not isinstance(value, int):
            fits = float(value) == int(float(value))
            value = int(float(value)) if fits else value
        elif kind in (float, str) and fits:
            value = kind(value)
    except (ValueError, OverflowError):
        fits = False
    if kind in names and not fits:
        raise UserError(f"--{key.replace('_', '-')} {value}: must be {names[kind]}")
    return value
