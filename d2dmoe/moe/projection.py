"""Linear maps around attention that can do less than all of their work. Their weights stay as the dense model has them.

With `P` ``(outputs, rank)`` and `Q` ``(rank, outputs)`` the stored basis of a section of the outputs, `m` the mean
output and `W` the weights:

* `dense`: ``x W + b``;
* `low-rank`: ``(x A) Q + b + m - (m P) Q`` with ``A = W P``, so that the mean output is exact;
* `heads`: heads of less width, see `heads`;
* `channels`: ``(x * keep) W + ((x - x * keep) A) Q + b``, where `keep` marks the input channels whose score
  ``|x_j| * ||W_j||`` reaches the threshold.

`A` is derived: whoever changes `W` changes what is computed from it.

An output projection may be refitted for each budget, see `stages.compensate`: its last thin product is then by ``Q +
refit_out`` (of narrow heads ``Q W + refit_out``) in the place of `Q`, and `refit_constant` is added to its bias.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..config.projections import HEAD, Projection, ProjectionState, rows_of
from ..kernels import Watch, identity, native
from ..tensors import BASES, HEADS
from .few_tokens import FewTokens
from .gate import Gate, Gated
from .heads import Factors, head_shapes, narrow, run_narrow, used_rank
from .int8_plans import Plans
from .prepared import offloaded
from .refits import Refitted, refit_shapes

linear = nn.functional.linear
KEPT = 8  # ranks of a layer whose factors are kept
FOLDED = 2**21  # weights up to which factors in int8 are multiplied out: one product is faster than several small ones


class _Samples:
    """`kernels.Watch` where the native library cannot look: on other devices, or where it was not built."""

    def __init__(self, tensors: list[torch.Tensor]):
        self.tensors = tensors
        self.seen = self.now()

    def now(self) -> list[torch.Tensor]:
        """Some of the values of each tensor."""
        return [t.reshape(-1)[:: max(t.numel() // 32, 1)].clone() for t in self.tensors]

    def changed(self) -> bool:
        """Do the tensors hold other values than before?"""
        return not all(torch.equal(a, b) for a, b in zip(self.now(), self.seen, strict=True))


def by_factors(x: torch.Tensor, factors: Factors, ranks: tuple[int, ...], constant: bool = True) -> torch.Tensor:
    """``(…, inputs)`` to ``(…, outputs)``, each section by its own factors, with or without the constants."""
    first, second, constants = factors
    constants = constants if constant else [None] * len(second)
    if len(second) == 1:
        return linear(linear(x, first), second[0], constants[0])
    thin = linear(x, first).split(ranks, -1)
    return torch.cat([linear(t, s, c) for t, s, c in zip(thin, second, constants, strict=True)], -1)


class DynamicProjection(Refitted, Gated, nn.Module):
    """What `DynamicLinear` and `DynamicConv1D` have in common.

    Parameters beside the dense map's own `weight` and `bias`: the basis `low_rank_in` ``(outputs, rank)`` and
    `low_rank_out` ``(rank, outputs)``, of whose rows (columns) for each section of the outputs a budget uses the first
    columns (rows); `output_mean` ``(outputs,)``, without the bias; `channel_norms` ``(inputs,)``, the norm of each
    input channel's weights over the group; where heads can be narrower, those of `heads`; where it is refitted,
    `refit_out` ``(budgets, refit_rank, outputs)`` and `refit_constant` ``(budgets, outputs)``.

    Attributes:
        projection: Its record.
        number: Its place among the projections of the checkpoint's record.
        gate: Its settings, the model's own and those of threads or tasks; `gate_state` is the one in force.
        observer: Called as `observer(layer, x, keep)` at every forward pass, with `x` ``(rows, inputs)`` and the
            channels that run, or `None` where there is no such choice.
        merged: Does it hold one budget only (`merge`)?
        few_tokens: What the native library needs to compute it on few tokens.
        linear_dtype: `int8` or `int8-dynamic` where weights and factors are rounded (`set_linear_dtype`), else `None`.
        plans: What the native library needs for that.
        ADDED: Names of the parameters beside the dense ones. OWN: names of all parameters.
    """

    ADDED: tuple[str, ...]
    OWN: frozenset[str]

    projection: Projection
    number: int
    gate: Gate
    observer: Callable | None
    merged: bool
    few_tokens: FewTokens
    linear_dtype: str | None
    plans: Plans

    def extend(self, projection: Projection, number: int) -> None:
        """Add what the dense map does not have; parameters without values."""
        self.projection, self.number, self.gate = projection, number, Gate(ProjectionState())
        self.observer, self.merged, self.few_tokens = None, False, FewTokens()
        self.linear_dtype, self.plans = None, Plans()
        self._factors: dict[tuple[str, tuple[int, ...], int], tuple[tuple, Watch | _Samples, Factors]] = {}
        like, shapes = {"device": self.weight.device, "dtype": self.weight.dtype}, self.added_shapes()
        self._note_names()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, **like), requires_grad=False))

    def added_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the parameters beside the dense ones."""
        p = self.projection
        shapes = (p.outputs, p.rank), (p.rank, p.outputs), (p.outputs,), (p.inputs,)
        return {**dict(zip(BASES, shapes, strict=True)), **head_shapes(p), **refit_shapes(p)}

    def matrix(self) -> torch.Tensor:
        """The weights as ``(outputs, inputs)``."""
        raise NotImplementedError

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``(…, inputs)`` to ``(…, outputs)``."""
        state = self.gate.in_force(self)
        if isinstance(state, tuple):
            return self.by_rows(input, state)
        if state.method == "dense" and self.observer is None and self.linear_dtype is None:
            return super().forward(input)
        few = state.method != "dense" and self.linear_dtype is None and not torch.compiler.is_compiling()
        y = self.few_tokens.run(self, state, input) if few else None
        return self._readable(input, state) if y is None else y

    def _readable(self, input: torch.Tensor, state: ProjectionState) -> torch.Tensor:
        """The same in steps that can be watched, with gradients."""
        keep = self.channels(input, state) if state.method == "channels" else None
        if self.observer is not None:
            rows = input.reshape(-1, input.shape[-1])
            self.observer(self, rows, None if keep is None else keep.reshape(rows.shape))
        if keep is not None:
            return self._channels(input, keep, state)
        if state.method == "low-rank":
            return self._low_rank(input, state)
        if state.method == "heads":
            return self._narrow(input, state)
        if self.linear_dtype is None:
            return super().forward(input)
        return self._by_weights(input, self.matrix(), self.bias)

    def channels(self, x: torch.Tensor, state: ProjectionState) -> torch.Tensor:
        """Which input channels run, booleans of the shape of `x` ``(…, inputs)``."""
        return x.abs() * self.channel_norms >= state.threshold

    def _channels(self, x: torch.Tensor, keep: torch.Tensor, state: ProjectionState) -> torch.Tensor:
        kept, learns = x * keep, self._learns()
        if not any(state.ranks) and state.refit < 0:
            return self._by_weights(kept, self.matrix(), self.bias)
        factors = self._derive(state) if learns else self.factors(state)
        y = self._by_weights(kept, self.matrix(), (*factors[2], None)[0])
        if not any(state.ranks):
            return y
        if learns:
            return y + by_factors(x - kept, factors, state.ranks, constant=False)
        return y + self._factored(x - kept, factors, state.ranks, constant=False)

    def _low_rank(self, x: torch.Tensor, state: ProjectionState) -> torch.Tensor:
        if self._learns():
            return by_factors(x, self._derive(state), state.ranks)
        if self.linear_dtype is not None and self.projection.macs <= FOLDED:
            return self.plans.single(self, x, state, self.linear_dtype)
        return self._factored(x, self.factors(state), state.ranks)

    def _narrow(self, x: torch.Tensor, state: ProjectionState) -> torch.Tensor:
        learns = self._learns()
        if self.linear_dtype is not None and not learns:
            return self.plans.single(self, x, state, self.linear_dtype)
        return run_narrow(x, self._derive(state) if learns else self.factors(state), self._by_weights)

    def _by_weights(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """A dense map, rounded where that is asked for."""
        if self.linear_dtype is None:
            return linear(x, weight, bias)
        return self.plans.linear(self, x, weight, bias, self.linear_dtype)

    def _factored(
        self, x: torch.Tensor, factors: Factors, ranks: tuple[int, ...], constant: bool = True
    ) -> torch.Tensor:
        """The same, with the bias and the mean, by factors that were derived beforehand."""
        if self.linear_dtype is not None:
            return self._factored_int8(x, factors, ranks, constant)
        return by_factors(x, factors, ranks, constant)

    def _factored_int8(self, x: torch.Tensor, factors: Factors, ranks: tuple[int, ...], constant: bool) -> torch.Tensor:
        first, second, constants = factors
        thin, parts = self.plans.linear(self, x, first, None, self.linear_dtype).split(ranks, -1), []
        constants = constants if constant else [None] * len(second)
        for t, s, c in zip(thin, second, constants, strict=True):
            if t.shape[-1]:
                parts.append(self.plans.linear(self, t, s, c, self.linear_dtype))
            else:
                parts.append((s.new_zeros(len(s)) if c is None else c).expand(*t.shape[:-1], -1))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def _learns(self) -> bool:
        """Do gradients have to reach weights or basis? Then factors are derived anew at every call."""
        return torch.is_grad_enabled() and any(p.requires_grad for p in self._parameters.values() if p is not None)

    @torch.no_grad()
    def factors(self, state: ProjectionState) -> Factors:
        """`A` transposed ``(sum of ranks, inputs)``; by section `Q` transposed ``(width, rank)`` and the constant.

        With the method `heads` what `heads.narrow` returns; with `channels` the only constant is the bias, if any.
        """
        if self._holds_factors():
            return self._merged_factors()
        compiling, key = torch.compiler.is_compiling(), (state.method, state.ranks, state.refit)
        if compiling and key in self._factors:  # cannot ask for versions
            return self._factors[key][2]
        sources = self.factor_sources()
        keep = not compiling and not offloaded(self) and all(type(t) is torch.Tensor for t in sources)
        versions = tuple(map(identity, sources)) if keep else ()
        known = self._factors.get(key) if keep else None
        if known is not None and known[0] == versions and not known[1].changed():
            return known[2]
        found = self._derive(state)
        if keep:
            fast = native.live()[0] and all(t.device.type == "cpu" for t in sources)
            watch = (Watch if fast else _Samples)(sources)
            others = [(k, entry) for k, entry in self._factors.items() if k != key][-KEPT + 1 :]
            self._factors = {**dict(others), key: (versions, watch, found)}
        return found

    def factor_sources(self) -> list[torch.Tensor]:
        """What the factors are made of."""
        sources = (self.weight, self.bias, *(getattr(self, name) for name in self.ADDED if name != "channel_norms"))
        if self._holds_factors():
            first, second, constants = self._merged_factors()
            sources = (first, *second, *constants)
        return [t.detach() for t in sources if t is not None]

    def _holds_factors(self) -> bool:
        """Is there nothing but the factors of one setting (`merge`)?"""
        return self.merged and self.gate_state.method in ("low-rank", "heads")

    def _derive(self, state: ProjectionState) -> Factors:
        dtype = self.weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        refit, constant = self.refit(state, wide)
        if state.method == "heads":
            names = ("bias", "head_basis", "output_mean", "head_mean")
            others = [getattr(self, name, None) for name in names]
            others = [None if t is None else t.to(wide) for t in others]
            thin, places, biases = narrow(self.projection, state.ranks, self.matrix().to(wide), *others)
            places = [p.to(dtype) if p.is_floating_point() else p for p in places]
            return (thin + refit).to(dtype).contiguous(), places, [(b + constant).to(dtype) for b in biases]
        first, second, constants = self._low_rank_factors(state.ranks, wide)
        if state.method == "channels":
            bias = constant if self.bias is None else self.bias.to(wide) + constant
            constants = [bias] if isinstance(bias, torch.Tensor) else []
        else:
            second, constants = [s + refit for s in second], [c + constant for c in constants]
        parts = [[t.to(dtype).contiguous() for t in ts] for ts in (second, constants)]
        return torch.cat(first).to(dtype) if first else self.weight.new_empty(0, self.projection.inputs), *parts

    def _low_rank_factors(self, ranks: tuple[int, ...], dtype: torch.dtype) -> tuple[list[torch.Tensor], ...]:
        """`A` transposed, `Q` transposed and the constant of each section; nothing without ranks."""
        weight, found = self.matrix().to(dtype), []
        for rank, rows in zip(ranks, rows_of(self.projection.sections), strict=False):
            basis, back = self.low_rank_in[rows, :rank].to(dtype), self.low_rank_out[:rank, rows].to(dtype)
            mean = self.output_mean[rows].to(dtype)
            constant = mean - (mean @ basis) @ back
            constant = constant if self.bias is None else constant + self.bias[rows].to(dtype)
            found.append((basis.T @ weight[rows], back.T, constant))
        return tuple(map(list, zip(*found, strict=True))) if found else ([], [], [])

    def thin(self, x: torch.Tensor, state: ProjectionState) -> torch.Tensor:
        """What the last thin product of an output projection gets, ``(rows, thin)`` of ``(rows, inputs)``."""
        if state.method == "low-rank":
            return linear(x, self.factors(state)[0])
        if state.method == "heads":
            return x.index_select(-1, self.factors(state)[1][0])[:, : sum(state.ranks)]
        return x.new_zeros(len(x), 0)

    @torch.no_grad()
    def merge(self) -> None:
        """Keep what the setting in force needs, and nothing that others would."""
        state = self.gate_state
        if state.method in ("low-rank", "heads"):
            first, second, constants = self.factors(state)
            for name, tensor in (("merged_first", first), *((f"merged_second_{n}", t) for n, t in enumerate(second)),
                                 *((f"merged_constant_{n}", t) for n, t in enumerate(constants))):  # fmt: skip
                self.register_buffer(name, tensor, persistent=False)
            self.weight = nn.Parameter(self.weight.new_empty(0), requires_grad=False)
        if state.method != "channels":
            for name in self.ADDED:
                setattr(self, name, nn.Parameter(self.weight.new_empty(0), requires_grad=False))
        self._factors, self.plans, self.merged = {}, Plans(), True
        self.few_tokens.invalidate()

    def trim_heads(self, states: Sequence[ProjectionState]) -> None:
        """Keep no more columns of the heads' basis than these settings use."""
        p, kept = self.projection, {name: getattr(self, name) for name in HEADS if name in self.ADDED}
        p.head_rank = used_rank(p, states)
        for name, tensor in kept.items():
            delattr(self, name)
            if p.head_rank:
                self.register_parameter(name, nn.Parameter(tensor[:, : p.head_rank].clone(), requires_grad=False))
        if not p.head_rank:
            p.heads, p.attention = [], 0
        self._note_names()

    def _note_names(self) -> None:
        self.ADDED = tuple(self.added_shapes())
        self.OWN = frozenset(("weight", "bias", *self.ADDED))

    def _merged_factors(self) -> Factors:
        lists = [[t for n, t in self._buffers.items() if n.startswith(f"merged_{x}")] for x in ("second", "constant")]
        return self.merged_first, *lists

    def _apply(self, *args, **kwargs) -> nn.Module:
        """Moves and casts: what was derived from the tensors goes with them."""
        self._factors, self.plans = {}, Plans()
        self.few_tokens.invalidate()
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict:
        """Copies derive their own factors."""
        return {**self.__dict__, "_factors": {}, "observer": None}

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        p = self.projection
        return f"{p.inputs}->{p.outputs}, {p.role}, rank={p.rank}"


class DynamicLinear(DynamicProjection, nn.Linear):
    """A `Linear` around attention, see `DynamicProjection`."""

    def matrix(self) -> torch.Tensor:
        """The weights as ``(outputs, inputs)``."""
        return self.weight


class DynamicConv1D(DynamicProjection, Conv1D):
    """GPT-2's `Conv1D` around attention, see `DynamicProjection`."""

    def matrix(self) -> torch.Tensor:
        """The weights as ``(outputs, inputs)``."""
        return self.weight.T


def projections(model: nn.Module) -> list[DynamicProjection]:
    """The converted projections of a model and its converted head, in the order of its record."""
    return sorted((m for m in model.modules() if isinstance(m, DynamicProjection)), key=lambda layer: layer.number)


def around_attention(model: nn.Module) -> list[DynamicProjection]:
    """The same without the head."""
    return [layer for layer in projections(model) if layer.projection.role != HEAD]


def head_of(model: nn.Module) -> DynamicProjection | None:
    """The converted head of a model, if it has one."""
    return next((layer for layer in projections(model) if layer.projection.role == HEAD), None)
