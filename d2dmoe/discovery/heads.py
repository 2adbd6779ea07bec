"""Find out which attention heads can be made narrower, by values.

Where queries and keys meet in nothing but a product, the same rotation of a query head and its key head changes no
output of attention; rotary positions and norms of heads do not allow it. Where values are only averaged, a rotation of
a value head rotates the output of that head. Both are tried on the noise with which projections answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config.projections import Projection, rows_of
from .trace import Call, Trace, run_traced

TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3}  # of the norm; other types
ROUGH = 0.05
NOTICED = 0.1  # what a wrong rotation has to change, else nothing is proved


@dataclass
class Around:
    """The names of the linear maps around one attention."""

    queries_keys: tuple[str, ...]
    values: str
    output: str


@dataclass
class _Side:
    """One section of a projection."""

    projection: Projection
    section: int

    @property
    def rows(self) -> slice:
        """Its place in the outputs."""
        return rows_of(self.projection.sections)[self.section]

    @property
    def width(self) -> int:
        """How many outputs that is."""
        return self.projection.sections[self.section]


@dataclass
class _Attention:
    """What a rotation is tried on."""

    q: _Side | None
    k: _Side | None
    v: _Side | None
    o: Projection


def find_heads(model: nn.Module, trace: Trace, found: Sequence[Projection], around: Sequence[Around]) -> None:
    """Note in the projections of which heads the width is free.

    Args:
        model: The traced model.
        trace: Its first run.
        found: Its projections, changed in place.
        around: What belongs together.
    """
    attentions = list(_attentions(found, around))
    left: dict[str, list[_Attention]] = {
        "qk": [a for a in attentions if a.q and a.k], "v": [a for a in attentions if a.v]
    }  # fmt: skip
    for heads in _candidates(model):
        for kind, waiting in left.items():
            tried = [a for a in waiting if _fits(a, kind, heads)]
            for attention in _proved(model, trace, tried, kind, heads) if tried else []:
                _note(attention, kind, heads)
                waiting.remove(attention)
    numbers: dict[int, int] = {}
    for n, attention in enumerate(attentions):
        for side in (attention.q, attention.k, attention.v):
            if side is not None:
                numbers[id(side.projection)] = n
        numbers[id(attention.o)] = n
    for projection in found:
        projection.attention = numbers.get(id(projection), 0) if projection.heads else 0


def _attentions(found: Sequence[Projection], around: Sequence[Around]) -> Iterator[_Attention]:
    """Those whose parts are all known, and around no other attention as well."""
    by_name = {p.name: p for p in found}
    uses: dict[str, set[int]] = {}
    different = list({(tuple(sorted(a.queries_keys)), a.values, a.output): a for a in around}.values())
    for n, a in enumerate(different):
        for name in (*a.queries_keys, a.values, a.output):
            uses.setdefault(name, set()).add(n)
    for a in different:
        names = {*a.queries_keys, a.values, a.output}
        if not names <= {*by_name} or any(len(uses[name]) > 1 for name in names):
            continue
        sides = {role: side for name in names for role, side in _sides(by_name[name])}
        yield _Attention(sides.get("q"), sides.get("k"), sides.get("v"), by_name[a.output])


def _sides(projection: Projection) -> Iterator[tuple[str, _Side]]:
    if len(projection.role) == len(projection.sections) and projection.role != "o":
        for section, role in enumerate(projection.role):
            yield role, _Side(projection, section)


def _candidates(model: nn.Module) -> list[int]:
    """Numbers of heads that the config knows, rising."""

    def numbers(values: Mapping[str, Any]) -> Iterator[int]:
        for key, value in values.items():
            if isinstance(value, dict):
                yield from numbers(value)
            elif "head" not in str(key) or "dim" in str(key) or "size" in str(key):
                continue
            elif type(value) is int and value > 0:
                yield value
            elif isinstance(value, list):
                yield from (n for n in value if type(n) is int and n > 0)

    return sorted({*numbers(model.config.to_dict())}) if hasattr(model, "config") else []


def _fits(a: _Attention, kind: str, heads: int) -> bool:
    """Can the widths be those of so many heads, and fewer for keys and values?"""
    if kind == "v":
        return a.o.inputs % heads == 0 and a.v.width % (a.o.inputs // heads) == 0 and heads % _of_values(a, heads) == 0
    return a.q.width % heads == 0 and a.k.width % (a.q.width // heads) == 0 and heads % _of_keys(a, heads) == 0


def _of_values(a: _Attention, heads: int) -> int:
    return a.v.width // (a.o.inputs // heads)


def _of_keys(a: _Attention, heads: int) -> int:
    return a.k.width // (a.q.width // heads)


def _proved(model: nn.Module, trace: Trace, tried: Sequence[_Attention], kind: str, heads: int) -> list[_Attention]:
    """Those of which the rotation does what it should, and another one something else."""
    limit = TOLERANCE.get(trace.linears[0].output.dtype, ROUGH)
    right = _changes(trace, _rotated(model, trace, tried, kind, heads), tried, kind, heads)
    kept = [a for a, error in zip(tried, right, strict=True) if error < limit]
    if not kept:
        return []
    wrong = _changes(trace, _rotated(model, trace, kept, kind, heads, control=True), kept, kind, heads)
    return [a for a, error in zip(kept, wrong, strict=True) if error > NOTICED]


def _turned(x: torch.Tensor, heads: int, rotations: int, seed: int) -> torch.Tensor:
    """Every head of ``(…, heads * width)`` by its random rotation; neighbours share one where there are fewer."""
    split = x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)
    width, generator = split.shape[-1], torch.Generator().manual_seed(seed)
    noise = torch.randn(rotations, width, width, generator=generator, dtype=torch.float64)
    turns = torch.linalg.qr(noise).Q.to(x).repeat_interleave(heads // rotations, 0)
    return torch.einsum("...hi,hij->...hj", split, turns).reshape(x.shape)


def _rotated(
    model: nn.Module, trace: Trace, tried: Sequence[_Attention], kind: str, heads: int, *, control: bool = False
) -> list[Call]:
    """The linear calls of another run, with some answers rotated; as a control by what does not belong together."""
    changes: dict[str, list[tuple[_Side, int, int, int]]] = {}  # by name: sides, heads, rotations, seed
    for a in tried:
        if kind == "v":
            count = _of_values(a, heads)
            changes.setdefault(a.v.projection.name, []).append((a.v, count, count, int(control)))
        else:
            count = _of_keys(a, heads)
            changes.setdefault(a.q.projection.name, []).append((a.q, heads, count, 0))
            changes.setdefault(a.k.projection.name, []).append((a.k, count, count, int(control)))

    def change(name: str, noise: torch.Tensor) -> torch.Tensor:
        for side, own, count, seed in changes.get(name, ()):
            noise[..., side.rows] = _turned(noise[..., side.rows], own, count, seed)
        return noise

    return run_traced(model, trace.inputs, change=change).linears


def _changes(trace: Trace, calls: Sequence[Call], tried: Sequence[_Attention], kind: str, heads: int) -> list[float]:
    """How far the outputs of attention are from what the right rotation gives, the most of all calls."""
    found = []
    for a in tried:
        errors = []
        for before, after in zip(trace.linears, calls, strict=True):
            if before.name != a.o.name:
                continue
            wanted = before.input.detach()
            if kind == "v":
                wanted = _turned(wanted, heads, _of_values(a, heads), 0)
            errors.append(float((after.input - wanted).norm() / wanted.norm().clamp_min(1e-12)))
        found.append(max(errors))
    return found


def _note(a: _Attention, kind: str, heads: int) -> None:
    """Write numbers of heads into the projections."""
    sides: list[tuple[_Side, int]] = [(a.v, _of_values(a, heads))] if kind == "v" else [
        (a.q, heads), (a.k, _of_keys(a, heads))
    ]  # fmt: skip
    for side, count in sides:
        own = side.projection
        own.heads = own.heads or [0] * len(own.sections)
        own.heads[side.section] = count
    if kind == "v":
        a.o.heads = [heads]
