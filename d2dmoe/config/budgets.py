"""The budgets of a checkpoint: stored operating points, and thresholds between and beyond them. No torch here."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import compress, pairwise
from typing import Any

from .projections import ProjectionState

LEAST_ACTIVE = 0.01  # where calibration curves begin
HAND_OVER, FADE = 1 / 3, 2  # of the way between two budgets; a power. Measured: LAB.md, 2026-11-26


@dataclass
class Budget:
    """One stored operating point.

    Attributes:
        active: Active fraction asked for, or found for the objective.
        taus: Threshold of each block.
        measured: Active fraction on the calibration tokens.
        stand_ins: Kind of stand-in chosen for each block, where they are fitted by regression.
        residuals: Residual error of each block's fit on held-out calibration tokens, relative to dropping the skipped
            experts.
        objective: Goal of the user other than an active fraction, for instance `max-loss=0.01`.
        achieved: Figure of the objective at this budget.
        ffn_active: Active fraction of the feed-forward blocks where the projections around attention have a share of
            the budget of their own; 0 where it is `active`.
        methods, ranks, channel_thresholds, candidates: What each of those projections and the head do, see
            `ProjectionState`; no candidates where there is no head.
    """

    active: float
    taus: list[float]
    measured: float = 0.0
    stand_ins: list[str] = field(default_factory=list)
    residuals: list[float] = field(default_factory=list)
    objective: str = ""
    achieved: float = 0.0
    ffn_active: float = 0.0
    methods: list[str] = field(default_factory=list)
    ranks: list[list[int]] = field(default_factory=list)
    channel_thresholds: list[float] = field(default_factory=list)
    candidates: list[int] = field(default_factory=list)

    @property
    def projection_states(self) -> list[ProjectionState]:
        """What each projection does at this budget."""
        candidates = self.candidates or [0] * len(self.methods)
        settings = zip(self.methods, self.ranks, self.channel_thresholds, candidates, strict=True)
        return [ProjectionState(method, tuple(ranks), *others) for method, ranks, *others in settings]

    @projection_states.setter
    def projection_states(self, states: Sequence[ProjectionState]) -> None:
        self.methods, self.ranks = [s.method for s in states], [list(s.ranks) for s in states]
        self.channel_thresholds = [s.threshold for s in states]
        self.candidates = [s.candidates for s in states] if any(s.candidates for s in states) else []

    def keep_projections(self, keep: Sequence[bool]) -> None:
        """Drop the settings of the projections for which `keep` is false."""
        self.projection_states = list(compress(self.projection_states, keep))

    def forget_fits(self) -> None:
        """No stand-in is fitted in any block."""
        self.stand_ins, self.residuals = ["zero"] * len(self.taus), [1.0] * len(self.taus)

    def note_fit(self, index: int, kind: str, residual: float) -> None:
        """Record the stand-in fitted for one block."""
        self.stand_ins[index], self.residuals[index] = kind, residual

    def keep_blocks(self, keep: Sequence[bool]) -> None:
        """Drop the figures of the blocks for which `keep` is false."""
        self.taus = list(compress(self.taus, keep))
        self.stand_ins, self.residuals = list(compress(self.stand_ins, keep)), list(compress(self.residuals, keep))


@dataclass
class Curve(Sequence):
    """Threshold of each block against the active fraction of that block, linear between its points.

    The curve ends with threshold 0 at active fraction 1, which is no point of its own.

    Attributes:
        points: `[[active, [tau per block]], …]` by rising active fraction, as `config.json` stores them.
    """

    points: list[list[Any]] = field(default_factory=list)

    @classmethod
    def of_ranks(cls, experts: Sequence[int], shared: int = 0) -> Curve:
        """The curve of the gate `topk`, known without calibration.

        Args:
            experts: Experts of each block.
            shared: Experts of each block that always run.
        """
        bends = sorted({0.0, *(shared / count for count in experts)})
        return cls([[a, [1.0 - max((a * n - shared) / (n - shared), 0.0) for n in experts]] for a in bends])

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, number: Any) -> Any:
        return self.points[number]

    def keep_blocks(self, keep: Sequence[bool]) -> None:
        """Drop the thresholds of the blocks for which `keep` is false."""
        self.points = [[active, list(compress(taus, keep))] for active, taus in self.points]

    def tau(self, index: int, active: float) -> float:
        """Threshold of one block for an active fraction of that block; fractions below the curve get its beginning."""
        points = self._of_block(index)
        active = max(active, points[0][0])
        right = min(max(bisect_left([a for a, _ in points], active), 1), len(points) - 1)
        (less, high), (more, low) = points[right - 1], points[right]
        return high + (active - less) / (more - less) * (low - high)

    def active(self, index: int, tau: float) -> float:
        """Active fraction at which one block's curve has this threshold."""
        points = self._of_block(index)
        for (less, high), (more, low) in pairwise(points):
            if low <= tau <= high:
                return less + (more - less) * ((high - tau) / (high - low) if high > low else 1.0)
        return points[0][0] if tau > points[0][1] else 1.0

    def thresholds(self, active: float) -> list[float]:
        """Thresholds that give every block the same active fraction."""
        return self.thresholds_by_block([active] * len(self.points[0][1]))

    def thresholds_by_block(self, actives: Sequence[float]) -> list[float]:
        """Thresholds that give every block an active fraction of its own."""
        return [self.tau(index, active) for index, active in enumerate(actives)]

    def _of_block(self, index: int) -> list[tuple[float, float]]:
        return [*((active, taus[index]) for active, taus in self.points), (1.0, 0.0)]


@dataclass
class Budgets(Sequence):
    """The stored operating points of a checkpoint. A number is a place in the list and in the stand-in tensors.

    Attributes:
        stored: By rising active fraction once calibration has ended.
    """

    stored: list[Budget] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, number: Any) -> Any:
        return self.stored[number]

    @property
    def actives(self) -> list[float]:
        """Active fraction of each budget."""
        return [budget.active for budget in self.stored]

    def replace(self, budgets: Sequence[Budget]) -> None:
        """Store these budgets and no others."""
        self.stored = list(budgets)

    def find(self, active: float) -> int | None:
        """Number of the budget stored for this active fraction."""
        return next((number for number, a in enumerate(self.actives) if abs(a - active) < 1e-6), None)

    def nearest_tau(self, index: int, tau: float) -> int | None:
        """Number of the budget whose threshold in one block is nearest; `None` without any."""
        return min(range(len(self.stored)), key=lambda n: abs(self.stored[n].taus[index] - tau), default=None)

    def sort(self) -> list[int]:
        """Order the budgets by rising active fraction; returns their former numbers."""
        order = sorted(range(len(self.stored)), key=self.actives.__getitem__)
        self.stored = [self.stored[number] for number in order]
        return order

    def keep_blocks(self, keep: Sequence[bool]) -> None:
        """Drop the figures of the blocks for which `keep` is false."""
        for budget in self.stored:
            budget.keep_blocks(keep)

    def of_projections(self, active: float) -> int | None:
        """Number of the budget as at which projections work at an active fraction, the next above; `None`: dense."""
        above = [n for n, budget in enumerate(self.stored) if active < 1 and budget.active >= active - 1e-6]
        return min(above, key=self.actives.__getitem__, default=None)

    def thresholds(self, active: float, curve: Curve) -> list[float]:
        """Threshold of each block for an active fraction of the model.

        A stored budget has its own thresholds. Between two budgets, and between the last one and everything on, the
        active fraction of each block moves linearly from one to the other. Below the first budget all blocks shrink in
        proportion. Thresholds are continuous and fall with the active fraction wherever those of the budgets fall.

        Args:
            active: Active fraction of the model, above 0.
            curve: Turns the active fraction of a block into its threshold; an empty one interpolates the thresholds.
        """
        number = self.find(active)
        if number is not None:
            return list(self.stored[number].taus)
        points = sorted(((b.active, b.taus) for b in self.stored), key=lambda point: point[0])
        points.append((1.0, [0.0] * len(points[0][1])))
        right = bisect_left([a for a, _ in points], active)
        high, more = points[right]
        if right == 0:
            return [_shrunk(curve, index, tau, active / high) for index, tau in enumerate(more)]
        low, less = points[right - 1]
        weight = (active - low) / (high - low)
        return [_between(curve, index, taus, weight) for index, taus in enumerate(zip(less, more, strict=True))]

    def stand_ins(self, active: float) -> tuple[int | None, float]:
        """Number of the budget whose stand-ins serve an active fraction, and their scale in [0, 1].

        Stand-ins of a budget fade out above it: with everything on there are none. Those of the next budget
        take over, at full scale, where they lose less.
        """
        order = sorted(range(len(self.stored)), key=self.actives.__getitem__)
        if not order:
            return None, 1.0
        right = bisect_left([self.actives[number] for number in order], active)
        if right == 0:
            return order[0], 1.0
        low = self.actives[order[right - 1]]
        if right < len(order) and active - low > HAND_OVER * (self.actives[order[right]] - low):
            return order[right], 1.0
        return order[right - 1], ((1 - active) / (1 - low)) ** FADE


def _mix(ends: Sequence[float], weight: float) -> float:
    """Linear interpolation, exact at both ends."""
    return (1 - weight) * ends[0] + weight * ends[1]


def _between(curve: Curve, index: int, taus: Sequence[float], weight: float) -> float:
    """Threshold between two thresholds of one block. An offset makes up for ends that lie off the curve."""
    if not curve:
        return _mix(taus, weight)
    actives = [curve.active(index, tau) for tau in taus]
    offsets = [tau - curve.tau(index, active) for tau, active in zip(taus, actives, strict=True)]
    return max(curve.tau(index, _mix(actives, weight)) + _mix(offsets, weight), 0.0)


def _shrunk(curve: Curve, index: int, tau: float, scale: float) -> float:
    """Threshold that scales the active fraction of one block."""
    active = curve.active(index, tau)
    return curve.tau(index, active * scale) + tau - curve.tau(index, active)
