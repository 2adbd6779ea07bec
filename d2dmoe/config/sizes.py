"""From options to the numbers of one model: operating points, experts and ranks."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UserError
from .options import BudgetConfig, ConvertConfig, StandInConfig
from .record import Block, can_split

DEFAULT_ACTIVE = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Target:
    """One operating point asked for: `kind` is `active`, `flops`, `max-loss` or `speedup`."""

    kind: str
    value: float

    def __str__(self) -> str:
        return f"{self.kind}={self.value:g}"


def targets(config: BudgetConfig) -> list[Target]:
    """The operating points that a conversion stores, without repetitions; running everything needs no storing."""
    asked = {"active": config.active, "flops": config.flops, "max-loss": config.max_loss, "speedup": config.speedup}
    if not any(asked.values()):
        asked["active"] = list(DEFAULT_ACTIVE)
    return [
        Target(kind, v) for kind, values in asked.items() for v in sorted(set(values)) if (kind, v) != ("active", 1)
    ]


def shared_experts(config: ConvertConfig, blocks: list[Block]) -> int:
    """How many experts of every block always run.

    Raises:
        UserError: If that leaves none to choose from.
    """
    if config.split != "shared_experts":
        return 0
    fewest = min(block.experts for block in blocks)
    shared = config.shared_experts or max(1, fewest // 8)
    if shared >= fewest or 0 < config.max_experts <= shared:
        raise UserError(f"--shared-experts {shared}: must be below the number of experts that may run")
    return shared


def ranks(config: StandInConfig, blocks: list[Block]) -> dict[str, int]:
    """Ranks of the stand-ins, resolved for a model: `delta_rank` and `linear_rank` of `D2DMoEConfig`."""
    width = max(block.d_model for block in blocks)
    delta = (config.delta_rank or max(1, width // 4)) if config.stand_in in ("refit", "linear") else 0
    linear = (config.linear_rank or max(1, width // 8)) if config.stand_in == "linear" else 0
    return {"delta_rank": delta, "linear_rank": linear}


def divisors(width: int) -> list[int]:
    """All divisors of a width, ascending."""
    return [n for n in range(1, width + 1) if width % n == 0]


def choose_experts(block: Block, experts: int, expert_size: int) -> int:
    """Number of experts for a block.

    A number that does not divide the width makes the last expert smaller. By default experts have about 32 neurons, of
    a size that divides the width unless it has no divisor near that.

    Raises:
        UserError: If the width cannot be had in so many experts, or in experts of this size; names the nearest.
    """
    width = block.width
    if expert_size:
        if -(-width // -(-width // expert_size)) != expert_size:
            near = _nearest([s for s in range(1, width + 1) if -(-width // -(-width // s)) == s], expert_size)
            raise UserError(
                f"--expert-size {expert_size} does not fit the FFN width {width} of {block.name}: "
                f"{-(-width // expert_size)} experts would be smaller; nearest that do: {near}"
            )
        return -(-width // expert_size)
    if not experts:
        wanted = max(1, min(32, width // 16))
        size = min((s for s in divisors(width) if width // s >= 16), key=lambda s: abs(s - 32), default=1)
        return width // size if 4 * size > wanted else -(-width // wanted)
    if not can_split(width, experts):
        near = _nearest([n for n in range(1, width + 1) if can_split(width, n)], experts)
        raise UserError(
            f"--experts {experts} does not fit the FFN width {width} of {block.name}: with {-(-width // experts)} "
            f"neurons each, fewer would do; nearest that fit: {near}"
        )
    return experts


def _nearest(allowed: list[int], wanted: int) -> str:
    below = [n for n in allowed if n < wanted][-1:]
    above = [n for n in allowed if n > wanted][:1]
    return ", ".join(map(str, below + above))
