"""What projections do at a share of their work, and what that costs the output."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import nn

from ...config.projections import ProjectionState
from ...data.batches import Batches
from ...measure.observe import run_groups
from ...moe.gating import set_gate
from ...moe.projection import DynamicProjection

LEVELS = (0.15, 0.3, 0.5, 0.75)  # shares of a group's work at which its cost is measured
SCORE_ROWS = 2048
STEPS = 64  # parts in which the work of a group is given out
DENSE_FROM = 0.97  # share of the work from which a group runs dense
STAND_IN = 0.3  # share of the work that the low-rank term for skipped channels takes


class Receiver:
    """Whoever shares work out among projections."""

    members: Iterable[int]
    layers: list[DynamicProjection]

    @property
    def macs(self) -> int:
        """Multiply-accumulates per row, dense, of all calls."""
        return sum(self.macs_of().values())

    def macs_of(self) -> dict[int, int]:
        """The same by member."""
        own = zip(self.members, (x.projection for x in self.layers), strict=True)
        return {number: p.macs * p.calls for number, p in own}

    def left_out(self, share: float) -> float:
        """What columns save that are left out at a share of the work."""
        raise NotImplementedError

    @cached_property
    def _logs_left_out(self) -> np.ndarray:
        """Logarithms of `left_out` at `LEVELS`."""
        return np.log([self.left_out(level) for level in LEVELS])

    def scaled(self, measured: Sequence[float], share: float) -> float:
        """What is left out at a share of the work, times what the costs measured at `LEVELS` around it are of that."""
        offsets = np.log(np.maximum(measured, 1e-12)) - self._logs_left_out
        return self.left_out(share) * math.exp(float(np.interp(share, LEVELS, offsets)))


@dataclass
class Group(Receiver):
    """Projections that read one tensor, and share their work out among them.

    Attributes:
        members: Their numbers in the record.
        layers: The projections themselves.
        spectra: For each, what every further column of its sections' bases saves, see `Basis`.
        scores: Channel scores of some rows, falling.
        kinds: Ways that may be taken, `low-rank`, `channels` or `channels+` (with the low-rank term).
        costs: For each way, what it costs the output at `LEVELS`, falling.
    """

    members: list[int]
    layers: list[DynamicProjection]
    spectra: list[list[torch.Tensor]]
    scores: torch.Tensor
    kinds: tuple[str, ...] = ("low-rank", "channels", "channels+")
    costs: dict[str, list[float]] = field(default_factory=dict)
    _sorted: list[tuple[float, int, int, int]] = field(default_factory=list, repr=False)

    def settings(self, share: float) -> dict[int, ProjectionState]:
        """The settings of the members, by number, with which they lose least at this share of their work."""
        return dict(zip(self.members, self.states(share, self.best(share)), strict=True))

    def states(self, share: float, kind: str) -> list[ProjectionState]:
        """The settings of the members with which they take this share of their work."""
        if share >= DENSE_FROM:
            return [ProjectionState() for _ in self.layers]
        if kind == "low-rank":
            return self._low_rank(share)
        low_rank = self._low_rank(STAND_IN * share) if kind == "channels+" else None
        spent = self.work(low_rank) if low_rank else 0.0
        place = min(max(round((share - spent) * len(self.scores)) - 1, 0), len(self.scores) - 2)
        threshold = float(self.scores[place : place + 2].mean().clamp_min(1e-12))
        ranks = [state.ranks for state in low_rank] if low_rank else [()] * len(self.layers)
        return [ProjectionState("channels", r, threshold) for r in ranks]

    def work(self, states: Sequence[ProjectionState]) -> float:
        """Share of the dense work that factors of these ranks take."""
        costs = [x.projection.factored_macs(state.ranks) for x, state in zip(self.layers, states, strict=True)]
        return sum(costs) / sum(x.projection.macs for x in self.layers)

    def _low_rank(self, share: float) -> list[ProjectionState]:
        """Columns go where each saves most per multiply-accumulate; a section never costs more than dense."""
        room = share * sum(layer.projection.macs for layer in self.layers)
        ranks = [[1] * len(layer.projection.sections) for layer in self.layers]
        room -= sum(x.projection.factored_macs(r) for x, r in zip(self.layers, ranks, strict=True))
        for _, n, section, price in self._columns():
            if price <= room:
                ranks[n][section] += 1
                room -= price
        return [ProjectionState("low-rank", tuple(rank)) for rank in ranks]

    def _columns(self) -> list[tuple[float, int, int, int]]:
        """`(saved per multiply-accumulate, member, section, price)` of all columns but each first, best ones first."""
        if not self._sorted:
            for n, (layer, spectra) in enumerate(zip(self.layers, self.spectra, strict=True)):
                p = layer.projection
                for place, (spectrum, most) in enumerate(zip(spectra, p.full_ranks, strict=True)):
                    price = p.inputs + p.sections[place]
                    self._sorted += [(v / price, n, place, price) for v in spectrum[1 : min(most, p.rank)].tolist()]
            self._sorted.sort(key=lambda column: -column[0])
        return self._sorted

    def cost(self, kind: str, share: float) -> float:
        """What one way is taken to cost the output at a share of the work.

        Low rank has the sum of the eigenvalues left out, times what the measured costs are of it at the levels around;
        other ways are interpolated, log-linear between and beyond the levels.
        """
        if share >= DENSE_FROM:
            return 0.0
        if kind == "low-rank":
            return self.scaled(self.costs[kind], share)
        measured = np.log(np.maximum(self.costs[kind], 1e-12))
        if share <= LEVELS[0]:
            slope = (measured[1] - measured[0]) / (LEVELS[1] - LEVELS[0])
            return math.exp(measured[0] + min(slope, 0.0) * (share - LEVELS[0]))
        if share > LEVELS[-1]:  # from the last level to nothing at 1
            return math.exp(measured[-1]) * ((1 - share) / (1 - LEVELS[-1])) ** 1.5
        return math.exp(float(np.interp(share, LEVELS, measured)))

    def left_out(self, share: float) -> float:
        """Eigenvalues that low rank leaves out at a share of the work."""
        total = 0.0
        for spectra, state in zip(self.spectra, self._low_rank(share), strict=True):
            total += sum(float(values[rank:].sum()) for values, rank in zip(spectra, state.ranks, strict=True))
        return max(total, 1e-12)

    def best(self, share: float) -> str:
        """The way that costs least at a share of the work."""
        return min(self.kinds, key=lambda kind: self.cost(kind, share))

    def curve(self) -> list[float]:
        """The least cost at 0, 1 / STEPS, …, 1 of the work, falling."""
        costs = [min(self.cost(kind, step / STEPS) for kind in self.kinds) for step in range(STEPS + 1)]
        return falling(costs)


def falling(costs: Sequence[float]) -> list[float]:
    """Costs by rising share of the work, none below a later one: less work never costs less."""
    return np.maximum.accumulate(costs[::-1])[::-1].tolist()


@torch.no_grad()
def channel_scores(model: nn.Module, batches: Batches) -> dict[int, torch.Tensor]:
    """Scores of the input channels of each group, all rows and channels together, falling."""
    pools: dict[int, list[torch.Tensor]] = {}
    stride = max(1, batches.tokens // SCORE_ROWS)

    def collect(layer: DynamicProjection, x: torch.Tensor) -> None:
        rows = (x[::stride].abs() * layer.channel_norms).float().cpu()
        pools.setdefault(layer.projection.group, []).append(rows)

    with set_gate(model, active=1):
        run_groups(model, batches, collect)
    return {group: torch.cat(rows).flatten().sort(descending=True).values for group, rows in pools.items()}
