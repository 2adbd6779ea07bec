"""Checks of the record that `config.json` stores, before anything is built from it. No torch here."""

from __future__ import annotations

import json
import math
import types
import typing
import zlib
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import cache
from typing import Any, NoReturn

from ..errors import UserError

WHERE = "quantization_config"
MEND = "copy config.json again from where the checkpoint came from, or convert the model again"
KINDS, FUSED = ("ffn", "glu"), ("", "gate_up", "up_gate")
GATES = ("max", "share", "topk", "topp", "absolute")
STAND_INS = ("zero", "mean", "constants", "refit", "linear")
TARGETS = ("norm", "root", "centred", "nonlinear", "activation")
LAYOUTS = (("up_linear", "up_conv1d"), ("down_linear", "down_conv1d"))  # of the up and of the down projection
NAMES = {list: "a list", dict: "a mapping", str: "a text", int: "an integer", float: "a number",
         bool: "true or false", type(None): "null"}  # fmt: skip


def refuse(field: str, value: Any, wanted: str) -> NoReturn:
    """Raise the one error for a field of the record."""
    shown = json.dumps(value, default=str)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    raise UserError(f"quantization_config.{field} is {shown}, and must be {wanted}; {MEND}")


def typed(kind: type, values: Any, where: str) -> dict[str, Any]:
    """The fields of a stored dataclass, each of the type that its annotation gives. Unknown keys are left out.

    Args:
        kind: The dataclass.
        values: Its stored form.
        where: Its place in the record, for errors; empty at the top.

    Raises:
        UserError: Naming the field and its value.
    """
    if not isinstance(values, dict):
        refuse(where, values, "a mapping")
    prefix, found = where + "." if where else "", {}
    for f in fields(kind):
        if f.name in values:
            found[f.name] = _typed(_hints(kind)[f.name], values[f.name], prefix + f.name)
        elif f.default is f.default_factory:  # both missing: the field has no default
            raise UserError(f"{WHERE}.{prefix}{f.name} is missing; {MEND}")
    return found


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _typed(hint: Any, value: Any, where: str) -> Any:
    """A value of this type: integers are taken for floats, nothing else is converted."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _typed(next(a for a in typing.get_args(hint) if a is not type(None)), value,
                                                  where)  # fmt: skip
    if origin is list:
        if not isinstance(value, list):
            refuse(where, value, "a list")
        (inner,) = typing.get_args(hint)
        return [_typed(inner, v, f"{where}[{n}]") for n, v in enumerate(value)]
    if hint is float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            refuse(where, value, NAMES[float])
        try:
            return float(value)
        except OverflowError:
            refuse(where, value, NAMES[float])
    if hint in (int, str, bool):
        if type(value) is not hint:
            refuse(where, value, NAMES[hint])
        return value
    return value  # read by its own class


def points(values: Any, where: str = "curve") -> list[list[Any]]:
    """The points of a calibration curve, `[[active, [tau per block]], …]`, as numbers.

    Raises:
        UserError: Naming the point and its value.
    """
    found = []
    for number, point in enumerate(_typed(list[typing.Any], values, where)):
        place = f"{where}[{number}]"
        if not isinstance(point, list) or len(point) != 2:
            refuse(place, point, "an active fraction and a list of thresholds")
        found.append([_typed(float, point[0], f"{place}[0]"), _typed(list[float], point[1], f"{place}[1]")])
    return found


def validate(config: Any) -> None:
    """Ranges, choices, lengths and references between the fields of a `D2DMoEConfig`.

    Raises:
        UserError: Naming the field and its value.
    """
    blocks = config.blocks
    one_of("gate", config.gate, GATES)
    one_of("stand_in", config.stand_in, STAND_INS)
    one_of("router_target", config.router_target, TARGETS)
    if not blocks:
        refuse("blocks", [], "a list with one entry or more")
    for number, block in enumerate(blocks):
        _check_block(block, f"blocks[{number}]")
    check_distinct(blocks, "name")
    fewest = min(block.experts for block in blocks)
    for name, most in (("delta_rank", None), ("linear_rank", None), ("router_width", None), ("max_experts", None),
                       ("min_experts", fewest), ("shared_experts", fewest - 1)):  # fmt: skip
        in_range(name, getattr(config, name), 0, most)
    if 0 < config.max_experts < config.min_experts:
        refuse("max_experts", config.max_experts, f"0 or at least min_experts, {config.min_experts}")
    if not 0 < config.default_active <= 1:
        refuse("default_active", config.default_active, "above 0 and at most 1")
    for number, budget in enumerate(config.budgets):
        _check_budget(budget, len(blocks), f"budgets[{number}]")
    _check_curve(config.curve, len(blocks))


def _check_block(block: Any, where: str) -> None:
    one_of(f"{where}.kind", block.kind, KINDS)
    one_of(f"{where}.fused", block.fused, FUSED)
    for name in ("name", "activation", "up", "down"):
        if not getattr(block, name):
            refuse(f"{where}.{name}", getattr(block, name), "a name")
    if (block.gate is not None) != (block.kind == "glu"):
        refuse(f"{where}.gate", block.gate, "the path of a module" if block.kind == "glu" else "null for kind ffn")
    if bool(block.fused) != (block.gate == block.up):
        refuse(f"{where}.fused", block.fused, "gate_up or up_gate where gate and up are one module, else empty")
    for name in ("d_model", "width", "calls", "experts"):
        in_range(f"{where}.{name}", getattr(block, name), 1)
    if block.experts > block.width or block.slots - block.width >= block.size:
        refuse(f"{where}.experts", block.experts, f"a number of experts that the width {block.width} can be split in")
    if block.layouts and [v in known for v, known in zip(block.layouts, LAYOUTS, strict=False)] != [True] * 2:
        refuse(f"{where}.layouts", block.layouts, "one of up_linear, up_conv1d and one of down_linear, down_conv1d")


def _check_budget(budget: Any, blocks: int, where: str) -> None:
    if not 0 < budget.active <= 1:
        refuse(f"{where}.active", budget.active, "above 0 and at most 1")
    _check_taus(budget.taus, blocks, f"{where}.taus")
    for name in ("stand_ins", "residuals"):
        if len(getattr(budget, name)) not in (0, blocks):
            refuse(f"{where}.{name}", getattr(budget, name), f"empty or a list of {blocks}, one per block")
    for number, kind in enumerate(budget.stand_ins):
        one_of(f"{where}.stand_ins[{number}]", kind, STAND_INS)


def _check_curve(curve: Sequence, blocks: int) -> None:
    before = -1.0
    for number, (active, taus) in enumerate(curve):
        if not before < active <= 1 or active < 0:
            refuse(f"curve[{number}][0]", active, "an active fraction above the one before it and at most 1")
        _check_taus(taus, blocks, f"curve[{number}][1]")
        before = active


def _check_taus(taus: Sequence[float], blocks: int, where: str) -> None:
    if len(taus) != blocks:
        refuse(where, taus, f"a list of {blocks} thresholds, one per block")
    for number, tau in enumerate(taus):
        in_range(f"{where}[{number}]", tau, 0)


def check_distinct(entries: Sequence, field: str, of: str = "blocks") -> None:
    """Raises `UserError` if two entries of a list have the same module in a field."""
    names = [getattr(entry, field) for entry in entries]
    for number, name in enumerate(names):
        if name in names[:number]:
            refuse(f"{of}[{number}].{field}", name, f"another module than in the {of} before it")


def one_of(where: str, value: str, known: Sequence[str]) -> None:
    """Raises `UserError` unless a field of the record has one of these values."""
    if value not in known:
        refuse(
            where, value, f"one of {', '.join(known) if all(known) else ', '.join(filter(None, known)) + ' or empty'}"
        )


def in_range(where: str, value: float, least: float, most: float | None = None) -> None:
    """Raises `UserError` unless a field of the record is a number in this range."""
    if not math.isfinite(value) or value < least or (most is not None and value > most):
        refuse(where, value, f"at least {least}" + ("" if most is None else f" and at most {most}"))


def checksums(values: dict[str, Any]) -> dict[str, str]:
    """CRC-32 of every field of the record, in hexadecimal, over its JSON form.

    Fields that a later release adds under the same format version stay out of those that exist now: an older reader
    computes the same ones.
    """
    return {key: _crc(value) for key, value in values.items()}


def _crc(value: Any) -> str:
    return f"{zlib.crc32(json.dumps(_as_floats(value), sort_keys=True).encode()):08x}"


def _as_floats(value: Any) -> Any:
    """With integers as floats: 1 and 1.0 are one threshold."""
    if isinstance(value, dict):
        return {key: _as_floats(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_as_floats(v) for v in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def compare_checksums(stored: Any, values: dict[str, Any], *, shown: Callable[[str], Any]) -> None:
    """Compare the record, as it was understood, with the checksums that were written with it.

    Args:
        stored: Of every field; fields without one are not checked.
        values: The record as `to_dict` gives it.
        shown: The stored value of a field, for the error.

    Raises:
        UserError: Naming the field and its value.
    """
    if not isinstance(stored, dict):
        refuse("checksums", stored, "a mapping")
    for key, value in checksums(values).items():
        if key in stored and stored[key] != value:
            text = json.dumps(shown(key), default=str)
            raise UserError(
                f"{WHERE}.{key} is {text if len(text) <= 60 else text[:57] + '...'}, which is not what d2dmoe wrote; "
                f"{MEND}; if the change is meant, delete {WHERE}.checksums"
            )
