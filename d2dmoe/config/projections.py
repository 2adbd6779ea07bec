"""The projections around attention and the output head in the record, and what each budget does with them.

No torch here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from .validate import check_distinct, in_range, one_of, refuse

METHODS = ("dense", "low-rank", "channels", "heads", "svd-softmax")
ROLES = ("q", "k", "v", "o", "qk", "kv", "qv", "qkv")  # around attention
HEAD = "head"


@dataclass
class Projection:
    """A linear map around attention, or the output head; its weights are where the dense model has them.

    Attributes:
        name: Path of the linear map.
        role: What it makes of its input: queries `q`, keys `k`, values `v`, several of them where it is fused, or `o`
            for the one behind the heads; `head` for the one from the last hidden states to the vocabulary.
        group: Number of the tensor that it reads: projections of one group drop the same input channels.
        inputs, outputs: Its widths.
        sections: Widths of the parts of the output that have factors of their own: queries, keys and values where they
            are fused.
        calls: How often it runs in one forward pass.
        rank: Columns of its stored basis; a budget uses the first so many, of each section its own number.
        attention: Number of the attention that it is around, where that has heads which can be narrower.
        heads: Heads of each section (of `o`: of its inputs); 0 for a section whose heads have to keep their width.
            Empty if that holds for all.
        head_rank: Columns of the stored basis of each head; a budget uses the first so many, of each its own number.
        refits: Budgets that it is refitted for, all of them or none. Only output projections are.
        refit_rank: The most columns of what a refitted last product gets; a budget uses the first so many as it has.
    """

    name: str
    role: str
    group: int
    inputs: int
    outputs: int
    sections: list[int]
    calls: int = 1
    rank: int = 0
    attention: int = 0
    heads: list[int] = field(default_factory=list)
    head_rank: int = 0
    refits: int = 0
    refit_rank: int = 0

    @property
    def macs(self) -> int:
        """Multiply-accumulates per row of the dense map."""
        return self.inputs * self.outputs

    def factored_macs(self, ranks: Sequence[int], candidates: int = 0) -> int:
        """The same for two factors of these ranks, one for each section, and so many exact outputs."""
        factors = sum(rank * (self.inputs + width) for rank, width in zip(ranks, self.sections, strict=True))
        return factors + candidates * self.inputs

    @property
    def head_widths(self) -> list[int]:
        """Width of every head that can be narrower, section after section; of `o`, of its inputs."""
        widths = [self.inputs] if self.role == "o" else self.sections
        return [width // count for width, count in zip(widths, self.heads, strict=False) if count for _ in range(count)]

    def thin(self, method: str, ranks: Sequence[int]) -> int:
        """Columns of what the last thin product gets; 0 where there is none in the place of the dense one."""
        return sum(ranks) if method in ("low-rank", "heads") else 0

    def head_macs(self, widths: Sequence[int]) -> int:
        """Multiply-accumulates per row with heads of these widths."""
        spared = sum(self.head_widths) - sum(widths)
        return self.outputs * (self.inputs - spared) if self.role == "o" else self.inputs * (self.outputs - spared)

    def affordable_rank(self, share: float, candidates: int = 0) -> int:
        """The rank of factors of all outputs that this share of the dense work pays for beside exact outputs."""
        return int((share * self.macs - candidates * self.inputs) / (self.inputs + self.outputs))

    @property
    def added(self) -> int:
        """Parameters that are stored beside the dense ones."""
        if self.role == HEAD:
            return (2 * self.rank + 1) * self.inputs
        narrow = self.head_rank * (self.inputs + sum(self.heads) if self.role == "o" else self.outputs)
        refits = self.refits * (self.refit_rank + 1) * self.outputs
        return 2 * self.rank * self.outputs + self.inputs + self.outputs + narrow + refits

    @property
    def full_ranks(self) -> list[int]:
        """For each section the largest rank whose factors cost less than its dense map."""
        return [max((self.inputs * width - 1) // (self.inputs + width), 1) for width in self.sections]


def rows_of(sections: Sequence[int]) -> list[slice]:
    """The places of sections in the outputs, one after the other."""
    ends = [*accumulate(sections)]
    return [slice(end - width, end) for end, width in zip(ends, sections, strict=True)]


def sections_of(role: str, inputs: int, outputs: int) -> list[int]:
    """Output widths of a projection's sections. Keys and values may be narrower than queries (grouped queries)."""
    narrow, rest = divmod(outputs - inputs, 2)
    return [inputs, narrow, narrow] if role == "qkv" and not rest and 0 < narrow <= inputs else [outputs]


@dataclass(frozen=True)
class ProjectionState:
    """What a projection does.

    Attributes:
        method: `dense`; `low-rank`, two factors; `channels`, the input channels whose score reaches the threshold;
            `heads`, heads of less width; or, for the head of the model, `svd-softmax`: two factors for all outputs,
            then the exact values of the largest.
        ranks: Columns of the basis in use for each section: of the factors, or of what stands in for skipped channels
            (none: nothing does). With `heads` the width of each head, full for one as in the dense model.
        threshold: For `channels`. A channel's score is ``|x_j| * ||W_j||``.
        candidates: For `svd-softmax`: outputs of each row that get their exact values.
        refit: Number of the budget whose refit of the projection it takes; -1 for none.
    """

    method: str = "dense"
    ranks: tuple[int, ...] = ()
    threshold: float = 0.0
    candidates: int = 0
    refit: int = -1


def check_projections(projections: Sequence[Projection], budgets: Sequence[Any]) -> None:
    """Ranges, choices and lengths.

    Args:
        projections: Of the record.
        budgets: `Budget`s of the record.

    Raises:
        UserError: Naming the field and its value.
    """
    for number, projection in enumerate(projections):
        where = f"projections[{number}]"
        one_of(f"{where}.role", projection.role, (*ROLES, HEAD))
        if not projection.name:
            refuse(f"{where}.name", projection.name, "a name")
        if not projection.sections or min(projection.sections) < 1 or sum(projection.sections) != projection.outputs:
            refuse(f"{where}.sections", projection.sections, f"widths that add up to outputs, {projection.outputs}")
        for name in ("inputs", "outputs", "calls"):
            in_range(f"{where}.{name}", getattr(projection, name), 1)
        in_range(f"{where}.group", projection.group, 0)
        widest = projection.inputs if projection.role == HEAD else projection.outputs
        in_range(f"{where}.rank", projection.rank, 0, widest)
        _check_heads(projection, where)
        _check_refits(projection, number, budgets)
    check_distinct(projections, "name", "projections")
    for number, budget in enumerate(budgets):
        _check_settings(projections, budget, f"budgets[{number}]")


def check_networks(blocks: Sequence[Any]) -> None:
    """Blocks in the places of projections.

    Args:
        blocks: `Block`s of the record.

    Raises:
        UserError: Naming the field and its value.
    """
    for number, block in enumerate(blocks):
        one_of(f"blocks[{number}].role", block.role, ("", *ROLES))
        for name, wanted in (("kind", "ffn"), ("up", block.name), ("down", f"{block.name}.down")):
            if block.role and getattr(block, name) != wanted:
                refuse(f"blocks[{number}].{name}", getattr(block, name), f"{wanted}, as its role is {block.role}")


def _check_settings(projections: Sequence[Projection], budget: Any, where: str) -> None:
    for name in ("methods", "ranks", "channel_thresholds", "candidates"):
        if len(getattr(budget, name)) != len(projections) and (name != "candidates" or budget.candidates):
            refuse(f"{where}.{name}", getattr(budget, name), f"a list of {len(projections)}, one per projection")
    for n, projection in enumerate(projections):
        one_of(
            f"{where}.methods[{n}]",
            budget.methods[n],
            ("dense", METHODS[-1]) if projection.role == HEAD else METHODS[:-1],
        )
        _check_ranks(projection, budget.methods[n], budget.ranks[n], f"{where}.ranks[{n}]")
        in_range(f"{where}.channel_thresholds[{n}]", budget.channel_thresholds[n], 0)
        if budget.candidates:
            in_range(f"{where}.candidates[{n}]", budget.candidates[n], 0, projection.outputs)


def _check_ranks(projection: Projection, method: str, ranks: Sequence[int], where: str) -> None:
    if method == "heads":
        widths = projection.head_widths
        if not widths or len(ranks) != len(widths):
            refuse(where, ranks, f"a list of {len(widths)}, one per head")
        for place, (rank, full) in enumerate(zip(ranks, widths, strict=True)):
            if rank != full or projection.role == "o":
                in_range(f"{where}[{place}]", rank, 0, min(projection.head_rank, full))
        return
    count = {"dense": (0,), "low-rank": (len(projection.sections),), "channels": (0, len(projection.sections)),
             "svd-softmax": (1,)}  # fmt: skip
    if len(ranks) not in count[method]:
        refuse(where, ranks, f"a list of {len(projection.sections)}, one per section")
    for place, rank in enumerate(ranks):
        in_range(f"{where}[{place}]", rank, 0, projection.rank)


def _check_heads(projection: Projection, where: str) -> None:
    widths = [projection.inputs] if projection.role == "o" else projection.sections
    in_range(f"{where}.attention", projection.attention, 0)
    if projection.heads and len(projection.heads) != len(widths):
        refuse(f"{where}.heads", projection.heads, f"a list of {len(widths)}, one per section")
    for place, (count, width) in enumerate(zip(projection.heads, widths, strict=False)):
        in_range(f"{where}.heads[{place}]", count, 0, width)
        if count and width % count:
            refuse(f"{where}.heads[{place}]", count, f"a divisor of {width}")
    in_range(f"{where}.head_rank", projection.head_rank, 0, max(projection.head_widths, default=0))


def _check_refits(projection: Projection, number: int, budgets: Sequence[Any]) -> None:
    where, counted = f"projections[{number}]", budgets if projection.refits else []
    if projection.refits and projection.role != "o":
        refuse(f"{where}.refits", projection.refits, "0, as it is no output projection")
    if projection.refits not in (0, len(budgets)):
        refuse(f"{where}.refits", projection.refits, f"0 or {len(budgets)}, the number of budgets")
    used = (projection.thin(budget.methods[number], budget.ranks[number]) for budget in counted)
    in_range(f"{where}.refit_rank", projection.refit_rank, max(used, default=0), projection.inputs)
