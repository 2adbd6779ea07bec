"""Find the projections around attention by what the outputs of linear maps flow into.

While the model runs once, every linear map answers with fresh noise that autograd follows. Noise cuts all older
connections, so a tensor depends on exactly those linear maps from whose answers it was computed without another linear
map in between. The output of attention is then a tensor that depends on keys and queries through a softmax, and on
values past it; the linear map that reads it, and nothing else, is the output projection.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..config.projections import ROLES, Projection, sections_of
from ..moe.packing import is_plain
from .blocks import traced
from .heads import Around, find_heads
from .trace import Call, features, run_traced


@dataclass
class Projections:
    """The projections to convert, and those that stay dense with the reason."""

    found: list[Projection] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class _Attention:
    """The numbers, in the trace, of the linear calls around one attention."""

    queries_keys: frozenset[int]
    values: frozenset[int]
    output: int

    def named(self, calls: list[Call]) -> Around:
        """The same with names in the places of numbers."""
        queries_keys = tuple(calls[n].name for n in sorted(self.queries_keys))
        return Around(queries_keys, *(calls[n].name for n in (*self.values, self.output)))


def find_projections(
    model: nn.Module,
    inputs: Mapping[str, torch.Tensor] | None = None,
    sample: Callable[[], Mapping[str, torch.Tensor]] | None = None,
) -> Projections:
    """Find the query, key, value and output projections of `model`.

    Args:
        model: Any module, a skeleton without weights as well; Hugging Face models need no `inputs`.
        inputs: Keyword arguments of one small forward pass.
        sample: Gives a batch of real data; asked for if the model does not run on inputs made from its config.

    Returns:
        The projections in the order in which the model runs them. Attention in which more than one linear map makes
        the values, or more than two the queries and keys (multi-head latent attention), is none of this form.
    """
    trace = run_traced(model, dict(inputs), follow=True) if inputs is not None else traced(model, sample, follow=True)
    leaves = {id(call.leaf): number for number, call in enumerate(trace.linears)}
    attentions = [a for n, call in enumerate(trace.linears) if (a := _attention(n, call, leaves)) is not None]
    roles: dict[str, set[str]] = {}
    calls: dict[str, list[Call]] = {}
    for attention in attentions:
        for number, role in _roles(attention, trace.linears, leaves).items():
            call = trace.linears[number]
            roles.setdefault(call.name, set()).update(role)
            calls.setdefault(call.name, []).append(call)
    times = Counter(call.name for call in trace.linears)
    result, groups = Projections(), {}
    for name in (name for name in times if name in calls):  # in the order of their first calls
        if why := _objection(model, name, roles[name], times[name] - len(calls[name])):
            result.refused.append((name, why))
            continue
        x = calls[name][0].input
        group = groups.setdefault((x.data_ptr(), tuple(x.shape)), len(groups))
        role = "".join(sorted(roles[name], key="qkvo".index))
        sizes = features(model.get_submodule(name))
        result.found.append(Projection(name, role, group, *sizes, sections_of(role, *sizes), calls=times[name]))
    find_heads(model, trace, result.found, [attention.named(trace.linears) for attention in attentions])
    return result


def _attention(number: int, call: Call, leaves: dict[int, int]) -> _Attention | None:
    """The attention whose output this call of a linear map reads."""
    through, past = _sources(call.input, leaves)
    if not through or len(through) > 2 or len(past) != 1 or (len(through) == 1 and through != past):
        return None
    return _Attention(frozenset(through), frozenset(past), number)


def _roles(attention: _Attention, calls: list[Call], leaves: dict[int, int]) -> dict[int, set[str]]:
    """What each call is for. Queries are those of the two whose rows are the output's; keys come with the values."""
    roles: dict[int, set[str]] = {attention.output: {"o"}}
    for number in attention.values:
        roles.setdefault(number, set()).add("v")
    others = sorted(attention.queries_keys)
    if len(others) == 1:
        roles.setdefault(others[0], set()).update("qk")
    else:
        reads_like_values = [n for n in others if n in attention.values]
        key = reads_like_values[0] if reads_like_values else others[-1]
        for number in others:
            roles.setdefault(number, set()).add("k" if number == key else "q")
    return roles


def _sources(tensor: torch.Tensor, leaves: dict[int, int]) -> tuple[set[int], set[int]]:
    """Linear calls that a tensor depends on through a softmax, and past every softmax."""
    through: set[int] = set()
    past: set[int] = set()
    stack, seen = [(tensor.grad_fn, False)], set()
    while stack:
        node, below = stack.pop()
        if node is None or (node, below) in seen:
            continue
        seen.add((node, below))
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) in leaves:
            (through if below else past).add(leaves[id(leaf)])
        fused = "ScaledDotProduct" in type(node).__name__
        softmax = "Softmax" in type(node).__name__ and "Log" not in type(node).__name__
        for place, (inner, _) in enumerate(node.next_functions):
            stack.append((inner, below or softmax or (fused and place != 2)))
    return through, past


def _objection(model: nn.Module, name: str, roles: set[str], elsewhere: int) -> str | None:
    """The reason to leave a projection dense, if there is one."""
    module: Any = model.get_submodule(name)
    if not is_plain(module):
        return f"a {type(module).__name__}, which does more than a linear map"
    if elsewhere:
        return "also runs outside attention"
    if "".join(sorted(roles, key="qkvo".index)) not in ROLES:
        return "serves as input and as output of attention"
    owners = [n for n, m in model.named_modules() if getattr(m, "weight", None) is module.weight]
    if len(owners) > 1:
        return f"its weight is tied to {next(o for o in owners if o != name)}"
    return None
