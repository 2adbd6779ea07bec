"""Find the feed-forward blocks of any model by running it once, and prove each match by its values.

Every linear map is made to answer with fresh random numbers of the right shape instead of its product. If another
linear map then receives exactly `act(those numbers)`, nothing but that activation can stand between the two. Weights
play no part, so a skeleton without real weights (`skeleton`) is as good as the model, and no table of model classes is
needed.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from ..config.record import Block
from .inputs import NoInputsError, on_small_inputs
from .trace import Call, Trace, features, run_traced

WINDOW = 8  # how many linear calls may lie between the two ends of a block
TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-5}


@dataclass
class Discovery:
    """The blocks to convert, and all other linear maps with the reason why they stay dense."""

    blocks: list[Block]
    refused: list[tuple[Block, str]]
    other: list[tuple[str, int, int, str]]  # (linear, in features, out features, why)


def discover(
    model: nn.Module,
    inputs: Mapping[str, torch.Tensor] | None = None,
    sample: Callable[[], Mapping[str, torch.Tensor]] | None = None,
) -> Discovery:
    """Find every FFN and GLU block of `model`.

    Args:
        model: Any module in fp32 or fp64; Hugging Face models need no `inputs`.
        inputs: Keyword arguments of one small forward pass with at least two positions per sample.
        sample: Gives a batch of real data; asked for if the model does not run on inputs made from its config.

    Returns:
        Blocks in the order in which the model runs them, refusals with their reasons, and the linear maps that
        belong to no block.

    Raises:
        NoInputsError: If the model runs on no inputs that could be found.
    """
    trace = run_traced(model, dict(inputs)) if inputs is not None else traced(model, sample)
    found = _group(_matches(trace))
    blocks, refused = [], []
    most_rows = max((call.input.numel() // call.input.shape[-1] for call in trace.linears), default=0)
    for block, calls in found:
        why = _mount(model, trace, block, calls) or _objection(model, trace, block, calls, most_rows)
        if why:
            refused.append((block, why))
        else:
            blocks.append(block)
    elsewhere = [block for block in blocks if block.passed_through and _acts_elsewhere(model, trace, block, blocks)]
    refused += [(b, f"its activation {b.activation_module} also runs outside feed-forward blocks") for b in elsewhere]
    blocks = [block for block in blocks if block not in elsewhere]
    return Discovery(blocks, refused, _others(model, trace, blocks, refused))


def traced(model: nn.Module, sample: Callable[[], Mapping[str, torch.Tensor]] | None, *, follow: bool = False) -> Trace:
    """`run_traced` on inputs made from the config, or else on those of `sample`; arguments as of `discover`."""
    try:
        return on_small_inputs(model, lambda inputs: run_traced(model, inputs, follow=follow), None)
    except NoInputsError:
        if sample is None:
            raise
    return on_small_inputs(model, lambda inputs: run_traced(model, inputs, follow=follow), sample())


def _matches(trace: Trace) -> Iterator[tuple[Block, tuple[Call, ...]]]:
    """Every call of a linear map whose input is an activation of earlier ones: `(block, (up, gate or up, down))`."""
    for index, down in enumerate(trace.linears):
        u = down.input.reshape(-1, down.input.shape[-1])
        near = [
            c for c in trace.linears[max(0, index - WINDOW) : index] if c.output.numel() in (u.numel(), 2 * u.numel())
        ]
        names = trace.activations
        match = _match_plain(u, near, names) or _match_fused(u, near, names) or _match_glu(u, near, names)
        if match is None:
            continue
        activation, up, gate, fused = match
        block = Block(
            name="", kind="glu" if gate else "ffn", activation=activation, d_model=up.input.shape[-1],
            width=u.shape[-1], up=up.name, gate=gate.name if gate else None, down=down.name, fused=fused,
        )  # fmt: skip
        yield block, (up, gate or up, down)


def _fits(
    z: torch.Tensor, target: torch.Tensor, names: tuple[str, ...], factor: torch.Tensor | float = 1.0
) -> str | None:
    """Name of the activation with `act(z) * factor == target` up to rounding: the one with the smallest error."""
    best, name = TOLERANCE.get(target.dtype, 1e-2), None
    for candidate in names:
        act = ACT2FN[candidate]
        if (act(z[:1]) * (factor[:1] if isinstance(factor, torch.Tensor) else factor) - target[:1]).abs().max() > 0.1:
            continue
        error = (act(z) * factor - target).abs().max().item()
        if error < best:
            best, name = error, candidate
    return name


def _match_plain(u, near, names):
    for call in reversed(near):
        if call.output.numel() == u.numel() and (name := _fits(call.output.reshape(u.shape), u, names)):
            return name, call, None, ""
    return None


def _match_fused(u, near, names):
    for call in reversed(near):
        if call.output.shape[-1] == 2 * u.shape[-1] and call.output.numel() == 2 * u.numel():
            first, second = call.output.reshape(u.shape[0], -1).chunk(2, dim=-1)
            for gate, up, order in ((first, second, "gate_up"), (second, first, "up_gate")):
                if name := _fits(gate, u, names, up):
                    return name, call, call, order
    return None


def _match_glu(u, near, names):
    same = [c for c in near if c.output.numel() == u.numel() and c.output.shape[-1] == u.shape[-1]]
    for gate, up in itertools.permutations(same, 2):
        same_input = gate.input.data_ptr() == up.input.data_ptr() and gate.input.shape == up.input.shape
        if same_input and (name := _fits(gate.output.reshape(u.shape), u, names, up.output.reshape(u.shape))):
            return name, up, gate, ""
    return None


def _group(matches: Iterator[tuple[Block, tuple[Call, ...]]]) -> list[tuple[Block, list[tuple[Call, ...]]]]:
    """Merge calls of the same linear maps: one block that runs several times (ALBERT)."""
    grouped: dict[tuple, tuple[Block, list[tuple[Call, ...]]]] = {}
    for block, calls in matches:
        grouped.setdefault((block.up, block.gate, block.down), (block, []))[1].append(calls)
    for block, calls in grouped.values():
        block.calls = len(calls)
    return list(grouped.values())


def _objection(model: nn.Module, trace: Trace, block: Block, calls: list, most_rows: int) -> str | None:
    """The reason to leave a matched block dense, if there is one."""
    times = Counter(call.name for call in trace.linears)
    for name in {block.up, block.down, block.gate or block.up}:
        if times[name] != block.calls:
            return f"{name} also runs outside this block"
        weight = model.get_submodule(name).weight
        owners = [n for n, m in model.named_modules() if getattr(m, "weight", None) is weight]
        if len(owners) > 1:
            return f"its weight is tied to {next(o for o in owners if o != name)}"
    if features(model.get_submodule(block.down))[1] != block.d_model:
        return f"its output width {features(model.get_submodule(block.down))[1]} differs from its input width"
    if block.width < block.d_model:
        return f"a bottleneck: its width {block.width} is below its input width {block.d_model}"
    rows = calls[0][0].input.numel() // block.d_model
    if rows <= trace.samples < most_rows:
        return "a pooling head: it sees one position per sample, so there is nothing to gain"
    return None


def _mount(model: nn.Module, trace: Trace, block: Block, calls: list) -> str | None:
    """Choose where the experts go: one module, or two linear maps and their activation. Returns the objection."""
    up, gate, down = calls[0]
    names = {up.name, gate.name, down.name}
    ancestor = _common_ancestor(names)
    block.name = ancestor or block.up
    block.activation_module = _activation_module(model, trace, block, gate, ancestor)
    if _is_whole(model, trace, ancestor, names, up, down):
        return None
    block.name = block.up
    if block.kind == "glu":
        return f"no single module holds {block.gate}, {block.up} and {block.down} and nothing else"
    if block.activation_module is None:
        return f"the activation between {block.up} and {block.down} is not a module that could be passed through"
    block.passed_through = [block.activation_module, block.down]
    return None


def _common_ancestor(names: set[str]) -> str:
    parts = [name.split(".")[:-1] for name in names]
    return ".".join(p[0] for p in itertools.takewhile(lambda p: len(set(p)) == 1, zip(*parts, strict=False)))


def _is_whole(model: nn.Module, trace: Trace, ancestor: str, names: set[str], up: Call, down: Call) -> bool:
    """Whether this module has the input of `up`, the output of `down`, and no other parameter."""
    if not ancestor:
        return False
    owners = {
        f"{ancestor}.{n}" for n, m in model.get_submodule(ancestor).named_modules() if m._parameters or m._buffers
    }
    if not owners <= names:
        return False
    for first, output in trace.modules.get(ancestor, []):
        if not isinstance(output, torch.Tensor) or first is None or output.shape != down.output.shape:
            continue
        same_input = first.shape == up.input.shape and torch.equal(first, up.input)
        if same_input and torch.equal(output, down.output):
            return True
    return False


def _activation_module(model: nn.Module, trace: Trace, block: Block, gate: Call, ancestor: str) -> str | None:
    """Path of the module inside this block that computes the activation."""
    z = gate.output
    if block.fused:
        z = gate.output.chunk(2, dim=-1)[0 if block.fused == "gate_up" else 1]
    for name, calls in trace.modules.items():
        for first, output in calls:
            if (
                first is None
                or not isinstance(output, torch.Tensor)
                or first.shape != z.shape
                or first.shape != output.shape
            ):
                continue
            if list(model.get_submodule(name).children()) or not _acts(first, output, z, block.activation):
                continue
            module = model.get_submodule(name)
            paths = [n for n, m in model.named_modules(remove_duplicate=False) if m is module]
            inside = [p for p in paths if not ancestor or p.startswith(f"{ancestor}.")]
            return inside[0] if inside else None
    return None


def _acts(first: torch.Tensor, output: torch.Tensor, z: torch.Tensor, activation: str) -> bool:
    """Whether this call got `z` (an in-place activation overwrites it) and returned `act(z)`."""
    given = torch.equal(first, z) or first.data_ptr() == output.data_ptr()
    return given and (ACT2FN[activation](z) - output).abs().max().item() < TOLERANCE.get(z.dtype, 1e-2)


def _acts_elsewhere(model: nn.Module, trace: Trace, block: Block, blocks: list[Block]) -> bool:
    """Whether the module that would become an identity also runs outside these blocks."""
    module = model.get_submodule(block.activation_module)
    times = next(len(trace.modules.get(name, [])) for name, m in model.named_modules() if m is module)
    own = [b for b in blocks if b.activation_module and model.get_submodule(b.activation_module) is module]
    return times != sum(b.calls for b in own)


def _others(model: nn.Module, trace: Trace, blocks: list[Block], refused: list) -> list[tuple[str, int, int, str]]:
    """The linear maps outside every block, each with the reason."""
    used = {n for b in [*blocks, *(b for b, _ in refused)] for n in (b.up, b.down, b.gate)}
    called = {call.name for call in trace.linears}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    rows = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | Conv1D) or name in used:
            continue
        if module is head:
            why = "the language-model head"
        elif name not in called:
            why = "did not run in the trace"
        else:
            why = "no activation and second linear map follow it directly"
        rows.append((name, *features(module), why))
    return rows
