"""Everything that is derived from the parameters of a layer, kept while they stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch

from ..kernels import INPUTS, StaleWeights, Tiles, Watch, automatic, choose_way, identity, rounded
from .gate import GateState
from .packing import unpack
from .padding import padding, without_padding_rows

KEPT = 16  # gate settings of a layer whose derived tensors are kept
Way = Callable[..., torch.Tensor]
Layer = Any  # a `DynamicFFN`, which imports this
PARAMETERS = frozenset((
    "up_weight", "up_bias", "gate_weight", "gate_bias", "down_weight", "down_bias", "constants", "delta_in",
    "delta_out", "linear_in", "linear_out",
))  # fmt: skip
ROUTER_PARAMETERS = frozenset(("hidden", "score"))
Versions = tuple[tuple[int, int], ...]


def versions_of(layer: Layer) -> Versions | None:
    """Address and version counter of every parameter; `None` if the layer computes with other tensors.

    Those of a parametrised, pruned or adapted layer are made anew for every call, and those of an offloaded one are
    there for the length of a call only.
    """
    own, router = layer._parameters, layer.router._parameters
    if own.keys() != PARAMETERS or router.keys() != ROUTER_PARAMETERS or offloaded(layer) or offloaded(layer.router):
        return None
    return tuple([identity(t) for t in (*own.values(), *router.values()) if t is not None])


def offloaded(module: torch.nn.Module) -> bool:
    """Does a hook of accelerate bring the module's tensors for each call of the module?"""
    hook = module.__dict__.get("_hf_hook")
    return hook is not None and any(getattr(h, "offload", False) for h in getattr(hook, "hooks", (hook,)))


class Fold:
    """The refitted down projection of a budget, and a watch on what it was made from."""

    def __init__(self, down_weight: torch.Tensor, watch: Watch):
        self.down_weight, self.watch = down_weight, watch


class Entry:
    """One gate setting: the ways of computing the layer, which all give the same up to rounding."""

    def __init__(self, versions: Versions, sparse: Way, tensors: dict[str, torch.Tensor | None], fold: Fold | None):
        self.versions, self.sparse, self.tensors, self.fold = versions, sparse, tensors, fold
        self.dense: Way | None = None


class Prepared:
    """Entries by gate setting.

    The key of an entry is the identity of all parameters (`versions_of`): in-place writes, `load_state_dict`, moves,
    casts and replaced parameters are seen. A write through `.data` counts no version; for tensors that a derived copy
    was made from, every call compares samples of their values (`native.Plan`), so a change of most of a tensor, as
    averaging or swapping of weights makes it, is seen, and one of a few elements may not be.
    """

    def __init__(self) -> None:
        self.invalidate()

    def __reduce__(self) -> tuple:
        """Copies derive their own."""
        return Prepared, ()

    def invalidate(self) -> None:
        """Drop everything."""
        self.entries: dict[GateState, Entry] = {}
        self.tiles: Tiles = {}
        self._folded: WeakValueDictionary[tuple, Fold] = WeakValueDictionary()
        # Stays until it is stored with an entry; compiled code reads it as well.
        self.last_folded: tuple[tuple | None, Fold | None] = (None, None)

    def run(self, layer: Layer, state: GateState, x: torch.Tensor, run: torch.Tensor | None) -> torch.Tensor:
        """The layer's output ``(tokens, d_out)``, computed as is fastest; `run` replaces router and gate."""
        versions = versions_of(layer)
        if versions is None:
            return self._once(layer, state, x, run)
        try:
            return self._run(layer, state, versions, x, run)
        except StaleWeights:
            self.invalidate()
            return self._run(layer, state, versions, x, run)

    def _run(
        self, layer: Layer, state: GateState, versions: Versions, x: torch.Tensor, run: torch.Tensor | None
    ) -> torch.Tensor:
        entry = self.entries.get(state)
        if entry is None or entry.versions != versions:
            entry = self._add(layer, state, versions)
        if run is None and layer.keep_dense and layer.expert_dtype != "int8-dynamic" and automatic():
            if entry.dense is None:
                entry.dense = dense_way(layer, state, as_computed(layer, entry.tensors))
            if choose_way(self.place(layer, state), {"sparse": entry.sparse, "dense": entry.dense}, x) == "dense":
                entry.sparse.check()
                return entry.dense(x)
        return entry.sparse(x, run)

    @staticmethod
    def place(layer: Layer, state: GateState) -> tuple:
        """What decides, besides the number of tokens, which way is faster: layers alike share the decision."""
        block = layer.block
        shape = (block.kind, block.d_model, block.width, block.experts, layer.down_weight.shape[-1])
        dtypes = (layer.up_weight.dtype, layer.expert_dtype) if layer.expert_dtype else (layer.up_weight.dtype,)
        return (*shape, *dtypes, state)

    def _add(self, layer: Layer, state: GateState, versions: Versions) -> Entry:
        tensors = self.tensors(layer, state, versions)
        sparse = layer.backend.prepare(
            tensors, layer.activation, *settings(state), sources=sources(layer, state), tiles=self.tiles,
            expert_dtype=layer.expert_dtype,
        )  # fmt: skip
        entry = Entry(versions, sparse, tensors, self._folded.get((_fold_of(state), versions)))
        entries = {s: e for s, e in self.entries.items() if e.versions == versions and s != state}
        for oldest in list(entries)[: max(len(entries) - KEPT + 1, 0)]:
            del entries[oldest]
        self.entries = {**entries, state: entry}
        self._drop_tiles(layer)
        return entry

    def _once(self, layer: Layer, state: GateState, x: torch.Tensor, run: torch.Tensor | None) -> torch.Tensor:
        """With tensors that are there for this call only."""
        if run is None and state.tau > 0 and offloaded(layer.router):
            run = state.select(layer.scores(x))  # a call, so that its hook brings the router's tensors
        tensors = self.tensors(layer, state, None)
        if run is not None or state.tau <= 0:
            tensors["router_hidden"] = tensors["router_score"] = None
        options = {"expert_dtype": layer.expert_dtype}
        return layer.backend.prepare(tensors, layer.activation, *settings(state), **options)(x, run)

    def _drop_tiles(self, layer: Layer) -> None:
        """Let go of tiles of weights that no entry uses."""
        used = {identity(t) for e in self.entries.values() for t in e.tensors.values() if t is not None}
        for key in [key for key in self.tiles if key not in used]:
            self.tiles.pop(key, None)  # in place: plans put theirs into this very mapping later on

    def tensors(self, layer: Layer, state: GateState, versions: Versions | None) -> dict[str, torch.Tensor | None]:
        """The operator's tensors at a gate setting."""
        tensors: dict[str, torch.Tensor | None] = {
            "router_hidden": layer.router.hidden, "router_score": layer.router.score, "up_weight": layer.up_weight,
            "up_bias": layer.up_bias, "gate_weight": layer.gate_weight, "gate_bias": layer.gate_bias,
            "down_weight": layer.down_weight, "down_bias": layer.down_bias, "constants": None, "linear_in": None,
            "linear_out": None,
        }  # fmt: skip
        stand_in = layer.stand_in_of(state)
        if stand_in is not None:
            tensors["constants"] = state.faded(layer.constants[stand_in])
            if layer.delta_in is not None:
                tensors["down_weight"] = self._fold(layer, state, versions)
            if layer.linear_in is not None:
                tensors["linear_in"] = layer.linear_in[stand_in]
                tensors["linear_out"] = state.faded(layer.linear_out[stand_in])
        tensors["down_weight"] = without_padding_rows(tensors["down_weight"], layer.block)
        return {name: None if t is None else t.detach() for name, t in tensors.items()}

    def _fold(self, layer: Layer, state: GateState, versions: Versions | None) -> torch.Tensor:
        """The down projection of a budget; settings that share its stand-ins at one scale share it."""
        stand_in, setting = state.stand_in, _fold_of(state)
        if torch.compiler.is_compiling() and self.last_folded[0] == setting:  # cannot ask for versions
            return self.last_folded[1].down_weight
        fold = None if versions is None else self._folded.get((setting, versions))
        if fold is None or fold.watch.changed():
            sources = (layer.down_weight, layer.delta_in[stand_in], layer.delta_out[stand_in])
            down, delta_in, delta_out = (tensor.detach() for tensor in sources)
            folded = down + delta_in @ state.faded(delta_out)
            if versions is None:
                return folded
            fold = self._folded[setting, versions] = Fold(folded, Watch((down, delta_in, delta_out)))
            self.last_folded = (setting, fold)
        return fold.down_weight


def _fold_of(state: GateState) -> tuple[int | None, float]:
    """What a folded down projection depends on besides the parameters."""
    return state.stand_in, state.fade


def settings(state: GateState) -> tuple[str, float, int, int, int]:
    """The operator's arguments of a gate."""
    return state.name, state.tau, state.min_experts, state.max_experts, state.shared


def sources(layer: Layer, state: GateState) -> list[torch.Tensor]:
    """The parameters that derived copies are made from."""
    stand_in = layer.stand_in_of(state)
    found = [layer.down_bias]
    if stand_in is not None:
        found.append(layer.constants[stand_in])
        if layer.delta_in is not None:
            found += [layer.down_weight, layer.delta_in[stand_in], layer.delta_out[stand_in]]
    if padding(layer.block):  # the zero neurons' rows may have been cleared in a copy
        found.append(layer.down_weight)
    # bf16 may be kept a second time, in tiles
    if layer.keep_dense or layer.expert_dtype or layer.up_weight.dtype == torch.bfloat16:
        found += [layer.up_weight, layer.gate_weight, layer.up_bias, layer.gate_bias, layer.down_weight]
    return [t.detach() for t in found if t is not None]


def as_computed(layer: Layer, tensors: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
    """The operator's tensors with the experts' weights as they count, which are other ones where these are in int8."""
    if layer.expert_dtype is None:
        return tensors
    return {n: rounded(t, n) if n in INPUTS and t is not None else t for n, t in tensors.items()}


def dense_way(layer: Layer, state: GateState, tensors: dict[str, torch.Tensor | None]) -> Way:
    """All hidden units by torch's products, those of skipped experts zeroed, and the stand-ins.

    The weights are held as those products want them, ``(width, d_model)`` and ``(d_out, width)``.
    """
    linear, act, block = torch.nn.functional.linear, layer.act, layer.block

    def dense(name: str, layout: str) -> torch.Tensor | None:
        return None if tensors[name] is None else unpack(tensors[name], layout, block.width)

    up, up_bias = dense("up_weight", "up_linear"), dense("up_bias", "bias")
    gate, gate_bias = dense("gate_weight", "up_linear"), dense("gate_bias", "bias")
    down, down_bias = dense("down_weight", "down_linear"), tensors["down_bias"]
    constants, linear_in, linear_out = tensors["constants"], tensors["linear_in"], tensors["linear_out"]

    def forward(x: torch.Tensor) -> torch.Tensor:
        hidden = linear(x, up, up_bias)
        hidden = act(hidden) if gate is None else act(linear(x, gate, gate_bias)) * hidden
        if state.tau <= 0:
            return linear(hidden, down, down_bias)
        run = state.select(layer.router(x))
        skipped = (~run).repeat_interleave(block.size, dim=1)[:, : block.width]
        y = linear(hidden.masked_fill(skipped, 0), down, down_bias)
        if constants is not None:
            y = y + (~run).to(y.dtype) @ constants
        return y if linear_in is None else y + x @ linear_in @ linear_out

    return forward
