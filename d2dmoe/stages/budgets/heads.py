"""Narrower heads at a share of their work, and the best mixture of ways around one attention."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations

import numpy as np
import torch

from ...attention.heads import heads_of
from ...config.projections import ProjectionState
from ...moe.projection import DynamicProjection
from .allocate import savings
from .projections import DENSE_FROM, STEPS, Group, Receiver, falling

MOST_PAIRS = 2  # that are mixed freely; around several attentions that share inputs it is all heads or none


@dataclass
class Heads(Receiver):
    """Heads of one pair, queries and keys or values and outputs, that become narrower together.

    Attributes:
        roles: What each does.
        members: Numbers in the record; one number twice where roles are fused.
        layers: The projections.
        spectra: What every further column of each head (of the one with fewer heads) saves ``(heads, width)``, falling.
        kinds: `heads`.
        costs: What it costs the output at `LEVELS`, falling.
    """

    roles: list[str]
    members: list[int]
    layers: list[DynamicProjection]
    spectra: torch.Tensor
    kinds: tuple[str, ...] = ("heads",)
    costs: dict[str, list[float]] = field(default_factory=dict)

    def macs_of(self) -> dict[int, int]:
        """Those of these roles alone, where others are fused with them."""
        found: dict[int, int] = {}
        for role, number, layer in zip(self.roles, self.members, self.layers, strict=True):
            p = layer.projection
            width = p.outputs if role == "o" else p.sections[p.role.index(role)]
            found[number] = found.get(number, 0) + p.inputs * width * p.calls
        return found

    @cached_property
    def _order(self) -> torch.Tensor:
        """Columns by what they save, of all heads."""
        return self.spectra.flatten().argsort(descending=True, stable=True)

    def widths(self, share: float) -> list[int]:
        """Columns of each head at a share of the work: they go where each saves most."""
        heads, width = self.spectra.shape
        if share >= DENSE_FROM:
            return [width] * heads
        kept = self._order[: int(share * heads * width)] // width
        return torch.bincount(kept, minlength=heads).tolist()

    def left_out(self, share: float) -> float:
        """What the columns save that are left out at a share of the work."""
        kept = [values[n:].sum() for values, n in zip(self.spectra, self.widths(share), strict=True)]
        return max(float(sum(kept)), 1e-12)

    def widths_by_role(self, share: float) -> dict[tuple[int, str], list[int]]:
        """Widths of the heads of each member's role."""
        widths, found = self.widths(share), {}
        for role, number, layer in zip(self.roles, self.members, self.layers, strict=True):
            count = layer.projection.heads[layer.projection.role.index(role)]
            found[number, role] = [w for w in widths for _ in range(count // len(widths))]
        return found

    def states(self, share: float, kind: str = "heads") -> list[ProjectionState]:
        """Settings of the members, all other roles of theirs dense."""
        found = settings_of(self.widths_by_role(share), dict(zip(self.members, self.layers, strict=True)))
        return [found[number] for number in self.members]

    def cost(self, share: float) -> float:
        """What it is taken to cost the output at a share of the work: as what is left out, scaled."""
        return 0.0 if share >= DENSE_FROM else self.scaled(self.costs["heads"], share)

    def curve(self) -> list[float]:
        """The cost at 0, 1 / STEPS, …, 1 of the work, falling."""
        return falling([self.cost(step / STEPS) for step in range(STEPS + 1)])


def settings_of(
    widths: Mapping[tuple[int, str], Sequence[int]], layers: Mapping[int, DynamicProjection]
) -> dict[int, ProjectionState]:
    """Settings of projections whose roles have heads of these widths; those of other roles keep theirs.

    Args:
        widths: Of heads, by member and role.
        layers: By member.
    """
    found = {}
    for number in dict.fromkeys(n for n, _ in widths):
        p, kept = layers[number].projection, []
        for role, count in zip(p.role, p.heads, strict=True):
            full = p.head_widths[len(kept) : len(kept) + count]
            kept += widths.get((number, role), full)
        found[number] = ProjectionState() if kept == p.head_widths else ProjectionState("heads", tuple(kept))
    return found


@dataclass
class Attention(Receiver):
    """Everything around one attention, or around several that read one tensor, by the best of several mixtures.

    Attributes:
        members: Numbers in the record.
        layers: The projections.
        mixtures: Each a list of receivers that share the work out; what none of them has stays dense.
    """

    members: list[int]
    layers: list[DynamicProjection]
    mixtures: list[list[Group | Heads]]

    @cached_property
    def _given(self) -> list[list[tuple[float, list[int]]]]:
        """For each mixture and step of the work: the cost, and the steps of each receiver."""
        return [[*self._share_out(mixture)] for mixture in self.mixtures]

    def _share_out(self, mixture: Sequence[Group | Heads]) -> Iterator[tuple[float, list[int]]]:
        """Give steps, one to each and then to whom it saves most; yields costs and counts at every step of all."""
        curves, sizes = [x.curve() for x in mixture], [x.macs / STEPS for x in mixture]
        room = self.macs - sum(x.macs for x in mixture)  # work that stays dense
        steps = [
            (-saved / size, place, n)
            for place, (curve, size) in enumerate(zip(curves, sizes, strict=True))
            for n, saved in enumerate(savings(curve[1:]))
        ]
        left = iter(sorted(steps))
        counts, spent = [1] * len(mixture), room + sum(sizes)
        waiting = next(left, None)
        for step in range(STEPS + 1):
            while waiting is not None and spent + sizes[waiting[1]] <= step / STEPS * self.macs * (1 + 1e-9):
                counts[waiting[1]] += 1
                spent += sizes[waiting[1]]
                waiting = next(left, None)
            enough = spent <= step / STEPS * self.macs * (1 + 1e-9)
            cost = sum(curve[n] for curve, n in zip(curves, counts, strict=True)) if enough else math.inf
            yield cost, list(counts)

    def curve(self) -> list[float]:
        """The least cost at 0, 1 / STEPS, …, 1 of the work, falling."""
        costs = np.min([[cost for cost, _ in given] for given in self._given], axis=0)
        costs[np.isinf(costs)] = costs[~np.isinf(costs)].max() * 4
        return falling(costs)

    def settings(self, share: float) -> dict[int, ProjectionState]:
        """What each member does with this share of the work."""
        step = min(round(share * STEPS), STEPS)
        costs = [given[step][0] for given in self._given]
        if share >= DENSE_FROM:
            return {number: ProjectionState() for number in self.members}
        if min(costs) == math.inf:  # less than any mixture can do with
            step = next(n for n in range(STEPS + 1) if any(given[n][0] < math.inf for given in self._given))
            costs = [given[step][0] for given in self._given]
        best = int(np.argmin(costs))
        found = {number: ProjectionState() for number in self.members}
        widths: dict[tuple[int, str], list[int]] = {}
        for receiver, count in zip(self.mixtures[best], self._given[best][step][1], strict=True):
            if isinstance(receiver, Heads):
                widths |= receiver.widths_by_role(count / STEPS)
            else:
                found |= receiver.settings(count / STEPS)
        return found | settings_of(widths, dict(zip(self.members, self.layers, strict=True)))


def mixtures_of(
    layers: Sequence[DynamicProjection], scores: Mapping[int, torch.Tensor], spectra: Sequence[list[torch.Tensor]],
    heads: Mapping[str, torch.Tensor],
) -> tuple[list[Group | Heads], list[tuple[list[int], list[list[Group | Heads]]]]]:  # fmt: skip
    """What there is to measure, and the mixtures of it around every attention.

    Args:
        layers: All projections around attention.
        scores: Of the input channels, by group.
        spectra: Of the bases of `layers`.
        heads: Of their heads, see `attention.heads.fit_heads`.

    Returns:
        Receivers without costs; and for each set of projections that belong together their numbers and mixtures.
    """
    known: dict[tuple, Group | Heads] = {}

    def group(members: Sequence[int]) -> Group:
        key = ("group", *members)
        if key not in known:
            own = [layers[n] for n in members]
            known[key] = Group([*members], own, [spectra[n] for n in members], scores[own[0].projection.group])
        return known[key]

    def pair(name: str) -> Heads:
        if ("heads", name) not in known:
            roles, members = [*pairs[name]], [*pairs[name].values()]
            known["heads", name] = Heads(roles, members, [layers[n] for n in members], heads[name])
        return known["heads", name]

    pairs, found = heads_of(layers), []
    for members in together(layers, pairs.values()):
        own = [name for name, pair_members in pairs.items() if {*pair_members.values()} <= {*members}]
        counts = range(len(own) + 1) if len(own) <= MOST_PAIRS else (0, len(own))
        mixtures = []
        for chosen in (c for count in counts for c in combinations(own, count)):
            taken = {n for name in chosen for n in pairs[name].values()}
            rest: dict[int, list[int]] = {}
            for n in members:
                if n not in taken:
                    rest.setdefault(layers[n].projection.group, []).append(n)
            mixtures.append([*map(pair, chosen), *map(group, rest.values())])
        found.append((members, mixtures))
    return [*known.values()], found


def together(layers: Sequence[DynamicProjection], pairs: Iterator[Mapping[str, int]]) -> list[list[int]]:
    """Projections that read one tensor or are of one pair, and so on: numbers, in their order."""
    owner = list(range(len(layers)))

    def find(n: int) -> int:
        while owner[n] != n:
            n = owner[n]
        return n

    first: dict[int, int] = {}
    for n, layer in enumerate(layers):
        owner[find(n)] = find(first.setdefault(layer.projection.group, n))
    for members in pairs:
        one, *others = members.values()
        for other in others:
            owner[find(other)] = find(one)
    found: dict[int, list[int]] = {}
    for n in range(len(layers)):
        found.setdefault(find(n), []).append(n)
    return list(found.values())
