"""From options to the numbers of one model: operating points, experts and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UserError
from .options import AttentionConfig, BudgetConfig, ConvertConfig, HeadConfig, StandInConfig
from .projections import HEAD, Projection
from .record import Block, can_split

DEFAULT_ACTIVE = (0.25, 0.5, 0.75)
ATTENTION = ("none", "auto", "low-rank", "channels", "heads", "mlp")


def attention_way(attention: str) -> tuple[str, str]:
    """The way and the roles of `--attention auto:q,k,v`.

    Raises:
        UserError: If there is no such way or role.
    """
    way, _, roles = attention.partition(":")
    if way not in ATTENTION:
        one = "; a conversion takes one of them" if {*way.split(",")} <= {*ATTENTION} else ""
        raise UserError(f"--attention {attention}: {way!r} is none of {', '.join(ATTENTION)}{one}")
    if way == "none" and roles:
        raise UserError(f"--attention {attention}: none of the projections has no roles; give none alone, or a way")
    wanted = [role.strip() for role in roles.split(",")] if roles else list("qkvo")
    if not {*wanted} <= {*"qkvo"}:
        raise UserError(f"--attention {attention}: after the colon come some of q,k,v,o")
    return way, "".join(wanted)


def choose_projections(
    config: AttentionConfig, projections: list[Projection], refused: Sequence[tuple[str, str]] = ()
) -> list[Projection]:
    """Those projections of a model that are to be converted, with as much room for factors as they can use.

    Args:
        config: The ways and layers asked for.
        projections: What `find_projections` found.
        refused: What it refused, with the reasons, for the message.

    Raises:
        UserError: If there is none of them, or no such layer.
    """
    way, roles = attention_way(config.attention)
    if way == "none":
        return []
    if not projections:
        reasons = "; ".join(f"{name}: {why}" for name, why in refused[:3])
        found = "no projection around attention found in this model" + (f" ({reasons})" if reasons else "")
        raise UserError(f"--attention {config.attention}: {found}; d2dmoe list shows what is in it")
    ends = [n for n, p in enumerate(projections) if "o" in p.role]  # each attention ends with one
    wanted = numbers(config.attention_layers, len(ends))
    found = []
    for place, projection in enumerate(projections):
        layer = next((n for n, end in enumerate(ends) if place <= end), len(ends) - 1)
        if layer in wanted and {*projection.role} <= {*roles}:
            found.append(projection)
    named = ":" in config.attention
    left_out = [role for role in roles if named and not any(role in p.role for p in found)]
    if not found or left_out:
        alone = f"no projection of this model does {','.join(left_out) or 'that'} alone"
        raise UserError(
            f"--attention {config.attention}: {alone}; there are {', '.join(sorted({p.role for p in projections}))} "
            f"(a fused one is converted with all its roles)"
        )
    groups = {group: number for number, group in enumerate(dict.fromkeys(p.group for p in found))}
    for projection in found:
        projection.rank, projection.group = max(projection.full_ranks), groups[projection.group]
    _make_room_for_heads(found if way in ("auto", "heads") else [], found)
    return found


def _make_room_for_heads(wanted: Sequence[Projection], everything: Sequence[Projection]) -> None:
    """Heads become narrower on both sides, or keep their width."""
    there = {(p.attention, role) for p in wanted for role, count in zip(p.role, p.heads, strict=False) if count}
    partner = {"q": "k", "k": "q", "v": "o", "o": "v"}
    for p in everything:
        p.heads = [
            count if count and {(p.attention, role), (p.attention, partner[role])} <= there else 0
            for role, count in zip(p.role, p.heads, strict=False)
        ]
        p.heads = p.heads if any(p.heads) else []
        p.attention, p.head_rank = p.attention if p.heads else 0, max(p.head_widths, default=0)


def head_projection(config: HeadConfig, name: str, inputs: int, outputs: int, group: int) -> Projection:
    """The record of the head, with room for the factors that `head_active` of its work would pay for.

    Args:
        config: How much of the head runs.
        name: Path of the head.
        inputs, outputs: Its widths; the latter is the vocabulary.
        group: Its number as a reader of a tensor of its own.
    """
    head = Projection(name, HEAD, group, inputs, outputs, [outputs])
    head.rank = max(1, min(head.affordable_rank(config.head_active), inputs))
    return head


def network_block(config: ConvertConfig, projection: Projection) -> Block:
    """The block that takes the place of a projection with `--attention mlp`: a network `inputs -> width -> outputs`.

    Its width gives the projection's multiply-accumulates times `attention_factor`, rounded up to whole experts. It is
    never the number of outputs: stored tensors must not have the shapes of the dense model.
    """
    p = projection
    width = max(1, round(config.attention_factor * p.macs / (p.inputs + p.outputs)))
    size = config.expert_size or max(1, min(32, width // 16))
    experts = config.attention_experts or -(-width // size)
    if config.attention_experts:
        size = -(-width // experts)
        size += experts * size == p.outputs
    else:
        experts += experts * size == p.outputs
    return Block(
        name=p.name, kind="ffn", activation="relu", d_model=p.inputs, width=experts * size, up=p.name, gate=None,
        down=f"{p.name}.down", calls=p.calls, experts=experts, role=p.role,
    )  # fmt: skip


def numbers(text: str, count: int) -> set[int]:
    """The layers that `2-5` or `0,3` names; all for an empty text.

    Raises:
        UserError: If the text is no such list, or names a layer that is not there.
    """
    if not text:
        return set(range(count))
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdecimal() or (last and not last.isdecimal()):
            raise UserError(f"--attention-layers {text}: give numbers and ranges, for instance 0,2-5")
        found |= set(range(int(first), int(last or first) + 1))
    if not found or max(found) >= count:
        raise UserError(f"--attention-layers {text}: this model has {count} attention layers, counted from 0")
    return found


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
