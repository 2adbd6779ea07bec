"""The CPU kernels: a C++ library behind a C interface, called through ctypes. It knows nothing of torch."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from ..gates import topk_priority
from ..quads import INPUTS, in_quads

ABI = 13
LIBRARY = Path(os.environ.get("D2DMOE_LIBRARY") or Path(__file__).with_name("libd2dmoe.so"))
ACTIVATIONS = {"relu": 0, "gelu": 1, "gelu_tanh": 2, "quick_gelu": 3, "silu": 4}
GATES = {"max": 0, "share": 1, "topk": 2, "topp": 3, "absolute": 4}
DTYPES = (torch.float32, torch.bfloat16)
TILES_FROM = 32  # tokens of a call for which weights are put into tiles: with fewer, few experts have enough of them
STALE = 2  # what the library returns when a source of a plan has changed
SAMPLES = 32  # of a tensor, at most
FEW = 64  # up to so many tokens the experts are shared out over the threads, above it the tokens
_NUMBERS = ("bf16", "activation", "gate", "kernels", "rounds")
_SIZES = ("d", "size", "d_out", "experts", "router_width", "linear_rank", "top", "min_experts", "max_experts", "shared")
_TENSORS = {  # field of the struct -> argument of the operator
    "router_hidden": "router_hidden", "router_score": "router_score", "up": "up_weight", "up_bias": "up_bias",
    "gate_weight": "gate_weight", "gate_bias": "gate_bias", "down": "down_weight", "constants": "constants",
    "base": "base", "linear_in": "linear_in", "linear_out": "linear_out",
}  # fmt: skip
_SCALES = {"up_weight": "up_scale", "gate_weight": "gate_scale", "down_weight": "down_scale"}
_BY_TOKENS = frozenset(("up_weight", "gate_weight"))  # what tokens are multiplied by: rotated with them
_ROUNDED = {  # of `int8-dynamic` also in int8 -> field of the scales, as which weight of an expert
    "router_hidden": ("router_scale", "up_weight"), "linear_in": ("linear_in_scale", "up_weight"),
    "linear_out": ("linear_out_scale", "down_weight"),
}  # fmt: skip
_SCALE_FIELDS = (*_SCALES.values(), *(field for field, _ in _ROUNDED.values()))
FIELDS = {**_TENSORS, **{field: field for field in _SCALE_FIELDS}}  # field of the struct -> key of `Plan.keep`
_BESIDE = frozenset(("up_bias", "gate_bias", "down_bias", "constants"))  # of experts in int8: fp32
_TURNED = {"router_up": "router_hidden", "router_down": "router_score"}
_TILED = {"up_tiles": "up_weight", "gate_tiles": "gate_weight", "down_tiles": "down_weight"}


class _Sample(ctypes.Structure):
    """`D2dmoeSample` of library.h."""

    _fields_ = (("at", ctypes.c_void_p), ("halves", ctypes.c_int64))


class _Layer(ctypes.Structure):
    """`D2dmoeLayer` of forward.cpp."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in _NUMBERS),
        *((name, ctypes.c_int64) for name in _SIZES),
        ("tau", ctypes.c_float),
        ("few", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in (*_TENSORS, *_TILED, *_SCALE_FIELDS, *_TURNED)),
        ("samples", ctypes.c_void_p),
        ("sample_count", ctypes.c_int64),
        ("fingerprint", ctypes.c_uint64),
    )


def _load() -> tuple[ctypes.CDLL | None, str]:
    if not LIBRARY.exists():
        return None, "not built; install again where there is a C++ compiler (`pip install -v` says what went wrong)"
    try:
        lib = ctypes.CDLL(str(LIBRARY))
        built = lib.d2dmoe_abi()
    except (OSError, AttributeError) as error:
        return None, f"{LIBRARY.name} cannot be loaded ({error}); install again"
    if built != ABI:
        return None, f"{LIBRARY.name} is of another version; install again"
    lib.d2dmoe_kernels_name.restype = ctypes.c_char_p
    lib.d2dmoe_use_openmp.argtypes = [ctypes.c_void_p] * 3
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    lib.d2dmoe_forward.argtypes = [pointer, pointer, size, pointer, size, pointer, ctypes.c_int]
    lib.d2dmoe_project.argtypes = [pointer, pointer, size, size, pointer, ctypes.c_int]
    lib.d2dmoe_linear.argtypes = [pointer, pointer, size, size, pointer, ctypes.c_int]
    lib.d2dmoe_samples.argtypes, lib.d2dmoe_samples.restype = [pointer, size, pointer], size
    lib.d2dmoe_fingerprint.argtypes, lib.d2dmoe_fingerprint.restype = [pointer, size], ctypes.c_uint64
    lib.d2dmoe_choose.argtypes = [pointer, pointer, size, pointer]
    threads = _share_threads(lib)
    names = [lib.d2dmoe_kernels_name(number).decode() for number in kernel_numbers(lib)]
    return lib, f"{', '.join(names)}; {threads}"


def kernel_numbers(lib: ctypes.CDLL) -> list[int]:
    """The instruction sets that this processor has, the best last."""
    return [number for number in range(lib.d2dmoe_kernels()) if lib.d2dmoe_kernels_supported(number)]


@cache
def kernel_for(dtype: torch.dtype, int8: bool = False) -> int:
    """The number of the kernels used for a dtype, or for experts in int8 beside it; `D2DMOE_ISA` names others."""
    lib, _ = library()
    narrow = dtype == torch.bfloat16 and not int8
    numbers = [n for n in kernel_numbers(lib) if narrow or not lib.d2dmoe_kernels_bf16(n)]
    named = [n for n in numbers if lib.d2dmoe_kernels_name(n).decode() == os.environ.get("D2DMOE_ISA")]
    return (named or numbers)[-1]


def _share_threads(lib: ctypes.CDLL) -> str:
    """Have the library use torch's own OpenMP threads, which otherwise would spin on the cores it needs."""
    try:
        mapped = set(re.findall(r"/\S*lib[gi]?omp\d*\S*\.so\S*", Path("/proc/self/maps").read_text()))
        found = sorted(mapped, key=lambda path: "torch" not in path)
        openmp = ctypes.CDLL(found[0])
        names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        lib.d2dmoe_use_openmp(*(ctypes.cast(getattr(openmp, name), ctypes.c_void_p) for name in names))
    except (OSError, IndexError, AttributeError):
        return "threads of its own"
    return "torch's threads"


LOADED = _load()
LIVE = LOADED[0] is not None


def library() -> tuple[ctypes.CDLL | None, str]:
    """The library, or `None`; and what it is or why it is not there."""
    return LOADED


def supports(x: torch.Tensor, activation: str | None, gate: str) -> bool:
    """Can the library do a layer of these?"""
    return x.device.type == "cpu" and x.dtype in DTYPES and activation in ACTIVATIONS and gate in GATES and LIVE


def live() -> tuple[bool, str]:
    """Is the library there, and what it is or why it is not."""
    return LIVE, LOADED[1]


def synchronize() -> None:
    """Nothing runs on after a call."""


class StaleWeights(Exception):
    """A tensor has changed that a plan holds a derived copy of."""


def in_tiles(weight: torch.Tensor) -> torch.Tensor:
    """``(experts, k, n)`` to what AMX multiplies from the right, ``(experts, n/32, k/32, 2, 16, 16, 2)``.

    For every 32 columns and 32 rows two tiles of 16 columns, in which two rows at a time are interleaved. Zeros fill up
    `k` and `n`.
    """
    experts, k, n = weight.shape
    weight = torch.nn.functional.pad(weight, (0, -n % 32, 0, -k % 32))
    return weight.view(experts, -(-k // 32), 16, 2, -(-n // 32), 2, 16).permute(0, 4, 1, 5, 2, 6, 3).contiguous()


class Watch:
    """A fingerprint of tensors, by which a change shows that leaves no other trace: a write through `.data`.

    It is made of 32 words of each tensor, at places that look random, and takes about a microsecond for a layer.
    """

    __slots__ = ("count", "fingerprint", "samples", "start", "tensors")

    def __init__(self, tensors: Sequence[torch.Tensor]):
        self.tensors = list(tensors)  # stay alive, so that nothing else can lie at their addresses
        wholes = [(t.untyped_storage(), t) for t in tensors]
        parts = [(t, t.nbytes) if t.is_contiguous() else (whole, whole.nbytes()) for whole, t in wholes]
        self.samples = (_Sample * (SAMPLES * len(parts)))()
        self.start, self.count = ctypes.addressof(self.samples), 0
        for part, size in parts:
            place = self.start + self.count * ctypes.sizeof(_Sample)
            self.count += library()[0].d2dmoe_samples(part.data_ptr(), size, place)
        self.fingerprint = self.now()

    def now(self) -> int:
        """The fingerprint that the tensors have now."""
        return library()[0].d2dmoe_fingerprint(self.start, self.count)

    def changed(self) -> bool:
        """Do the tensors hold other values than before?"""
        return self.now() != self.fingerprint

    def enter(self, struct: ctypes.Structure) -> None:
        """Have the library look at every call with this struct, which must not outlive the watch."""
        struct.samples, struct.sample_count, struct.fingerprint = self.start, self.count, self.fingerprint


# Identity of a weight -> the weight, what was made of it (tiles, or quads and their scales), and a watch on it.
Tiles = dict[tuple[int, int], tuple[torch.Tensor, Any, Watch]]


def identity(weight: torch.Tensor) -> tuple[int, int]:
    """Where a tensor lies and how often it was changed there, which is not counted of one made in inference mode."""
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version


def made_of(weight: torch.Tensor, make: Callable[[torch.Tensor], Any], known: Tiles | None) -> Any:
    """`make(weight)`, or that of an earlier call with a weight that has not changed since."""
    if known is None:
        return make(weight)
    found = known.get(identity(weight))  # another thread may be here as well
    if found is None or found[2].changed():
        found = known[identity(weight)] = (weight, make(weight), Watch([weight]))
    return found[1]


def by_rows(
    function: Callable, call: Any, x: torch.Tensor, inputs: int, outputs: int, dtype: torch.dtype
) -> torch.Tensor:
    """``(…, outputs)`` of ``(…, inputs)`` by a function of the library.

    Args:
        function: Takes the struct, tokens, elements from token to token, their number, outputs and threads.
        call: The struct, by reference.
        x: Tokens.
        inputs, outputs: Widths.
        dtype: Of tokens and outputs.

    Raises:
        StaleWeights: If a source of the struct has changed.
        ValueError: If `x` is not of this width, dtype and device.
    """
    shape = x.shape
    if shape[-1] != inputs or x.dtype != dtype or not x.is_cpu:
        raise ValueError(f"tokens of {shape[-1]} x {x.dtype} on {x.device} for a map of {inputs} x {dtype}")
    if not x.is_contiguous():
        x = x.contiguous()
    y = x.new_empty((*shape[:-1], outputs))
    tokens = x.numel() // inputs
    failed = function(call, x.data_ptr(), inputs, tokens, y.data_ptr(), torch.get_num_threads())
    if failed:
        raise StaleWeights if failed == STALE else MemoryError(f"no memory for {tokens} tokens")
    return y


def _top(experts: int, tau: float) -> int:
    """How many experts `topk` runs."""
    return int((topk_priority(torch.arange(experts, 0.0, -1, device="cpu")) >= tau).sum())


def _as_read(
    given: dict[str, torch.Tensor | None], expert_dtype: str | None, known: Tiles | None
) -> tuple[dict[str, torch.Tensor | None], dict[str, torch.Tensor]]:
    """The operator's tensors as the library reads them, and the scales of weights in int8 by field of the struct."""
    int8, dtypes, scales = expert_dtype is not None, dict.fromkeys(given, given["up_weight"].dtype), {}
    dynamic = expert_dtype == "int8-dynamic"
    if int8:
        dtypes |= dict.fromkeys(_BESIDE, torch.float32)
    tensors = {name: None if t is None else t.to(dtypes[name]).contiguous() for name, t in given.items()}
    for name in INPUTS if int8 else ():
        weight = tensors[name]
        if weight is not None:
            make = partial(in_quads, name=name, rotate=dynamic and name in _BY_TOKENS)
            tensors[name], scales[_SCALES[name]] = made_of(weight, make, known)
    for name, (field, like) in _ROUNDED.items() if dynamic else ():
        weight = tensors[name]
        if weight is not None:
            make = partial(_as_one_expert, name=like, turned=name == "router_hidden")
            tensors[name], scales[field] = made_of(weight, make, known)
    return tensors, scales


def _as_one_expert(weight: torch.Tensor, name: str, turned: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`in_quads` of one matrix, which is stored the other way round if `turned`."""
    return in_quads((weight.T if turned else weight)[None], name, rotate=name in _BY_TOKENS)


class Plan:
    """One layer at one setting of its gate, as the library wants it. Holds the tensors it points to.

    Attributes:
        extra_bytes: Memory of the weights that are kept a second time: the router's in fp32; in bf16 the experts' for
            AMX, 0 until a call has enough tokens.
    """

    __slots__ = ("call", "d_out", "dtype", "extra_bytes", "forward", "keep", "layer", "tiles", "watch")

    def __init__(
        self,
        tensors: dict[str, torch.Tensor | None],
        activation: str,
        gate: str,
        tau: float,
        min_experts: int = 0,
        max_experts: int = 0,
        shared: int = 0,
        kernels: int | None = None,
        tiles: Tiles | None = None,
        sources: Sequence[torch.Tensor] = (),
        expert_dtype: str | None = None,
    ):
        """See `operator.reference`; `kernels` forces an instruction set.

        With an `expert_dtype` the experts' weights are rounded as `quads.rounded` has it, and kept in that form; with
        `int8-dynamic` tokens and hidden values are as well, and the linear term and the router's first product.

        At each call, `sources` are compared with what they are now, see `Watch`.

        With `tiles` the plan may keep bf16 weights a second time, in tiles, where the instruction set gains by that;
        plans of one layer share them through it, and weights in int8. It pays for a plan that is used again.
        """
        up, int8, dynamic = tensors["up_weight"], expert_dtype is not None, expert_dtype == "int8-dynamic"
        for name, tensor in tensors.items():
            if tensor is not None and (tensor.device.type != "cpu" or (tensor.numel() and not tensor.data_ptr())):
                raise RuntimeError(f"{name} is on the device {tensor.device}; the CPU kernels need it in memory")
        given = tensors
        tensors, scales = _as_read(given, expert_dtype, tiles)
        copied = {t.data_ptr(): t for n, t in given.items() if t is not None and t.data_ptr() != tensors[n].data_ptr()}
        experts, d, size = up.shape
        self.dtype, self.d_out = up.dtype, given["down_weight"].shape[-1]
        base, constants = tensors["down_bias"], tensors["constants"]
        if constants is not None:
            total = constants.float().sum(0)
            base = total if base is None else total + base.float()
        elif base is not None:
            base = base.float()
        self.keep = {**tensors, **scales, "base": base}
        layer = _Layer(
            bf16=up.dtype == torch.bfloat16, activation=ACTIVATIONS[activation], gate=GATES[gate],
            kernels=kernel_for(up.dtype, int8) if kernels is None else kernels, d=d, size=size, d_out=self.d_out,
            experts=experts, min_experts=max(min_experts - shared, 0), shared=shared, tau=tau, few=FEW,
            rounds=dynamic,
            max_experts=max(max_experts - shared, 1) if max_experts else 0,  # among those that the gate chooses from
            top=_top(experts - shared, tau) if gate == "topk" else 0,
        )  # fmt: skip
        if given["router_hidden"] is not None:
            layer.router_width = given["router_hidden"].shape[0]
        if given["linear_in"] is not None:
            layer.linear_rank = given["linear_in"].shape[-1]
        for field, name in _TENSORS.items():
            tensor = self.keep[name]
            setattr(layer, field, None if tensor is None else tensor.data_ptr())
        for field, scale in scales.items():
            setattr(layer, field, scale.data_ptr())
        self.layer = layer
        turned = self._turn(given, tiles)
        self.extra_bytes = sum(given[name].nbytes for name in turned)
        wanted = tiles is not None and layer.bf16 and not int8 and library()[0].d2dmoe_kernels_tiles(layer.kernels)
        self.tiles = tiles if wanted else None
        self.call = ctypes.byref(layer)
        self.forward: Callable = library()[0].d2dmoe_forward
        watched = {t.data_ptr(): t for t in sources} | copied | {given[n].data_ptr(): given[n] for n in turned}
        self.watch = Watch([*watched.values()])
        self.watch.enter(layer)

    def _turn(self, given: dict[str, torch.Tensor | None], known: Tiles | None) -> list[str]:
        """Lay out the router's weights by input as well, which is faster for many tokens; returns what was copied."""
        layer = self.layer
        if known is None or layer.bf16 or not layer.router_width:
            return []
        turned = {field: name for field, name in _TURNED.items() if not (layer.rounds and name in _ROUNDED)}
        for field, name in turned.items():
            self.keep[field] = made_of(given[name], lambda weight: weight.T.contiguous(), known)
            setattr(layer, field, self.keep[field].data_ptr())
        return list(turned.values())

    def __call__(self, x: torch.Tensor, run: torch.Tensor | None = None) -> torch.Tensor:
        """``(tokens, d_out)`` of ``(tokens, d_model)``; `run` ``(tokens, experts)`` replaces router and gate."""
        if x.shape[1] != self.layer.d or x.dtype != self.dtype:
            raise ValueError(f"tokens of {x.shape[1]} x {x.dtype} for a layer of {self.layer.d} x {self.dtype}")
        if x.stride(1) != 1:
            x = x.contiguous()
        if run is not None:
            run = run.contiguous()
        tokens = x.shape[0]
        if self.tiles is not None and tokens >= TILES_FROM:
            self._keep_tiles()
        y = torch.empty((tokens, self.d_out), dtype=x.dtype, device=x.device)
        mask = None if run is None else run.data_ptr()
        failed = self.forward(self.call, x.data_ptr(), x.stride(0), mask, tokens, y.data_ptr(), torch.get_num_threads())
        if failed:
            raise StaleWeights if failed == STALE else MemoryError(f"no memory for {tokens} tokens")
        return y

    def check(self) -> None:
        """Raise `StaleWeights` if a source has changed."""
        if self.watch.changed():
            raise StaleWeights

    def _keep_tiles(self) -> None:
        tiles = self.tiles
        for field, name in _TILED.items():
            weight = self.keep[name]
            if weight is not None and tiles is not None:  # another thread may have been here
                self.keep[field] = tiled = made_of(weight, in_tiles, tiles)
                setattr(self.layer, field, tiled.data_ptr())
        self.extra_bytes = sum(self.keep[field].nbytes for field in _TILED if field in self.keep)
        self.tiles = None

    def choose(self, scores: torch.Tensor) -> torch.Tensor:
        """The library's own gate on given scores ``(tokens, experts)``, as `gates.select`; for tests."""
        scores = scores.contiguous()
        run = torch.empty(scores.shape, dtype=torch.bool)
        library()[0].d2dmoe_choose(self.call, scores.data_ptr(), len(scores), run.data_ptr())
        return run


prepare = Plan
