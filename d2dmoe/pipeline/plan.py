"""The plan of a conversion, from the config alone: no weights are read or allocated."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from ..config.options import ConvertConfig
from ..config.projections import Projection
from ..config.record import Block, router_width
from ..config.sizes import (
    attention_way,
    choose_experts,
    choose_projections,
    divisors,
    head_projection,
    network_block,
    ranks,
    targets,
)
from ..discovery.blocks import Discovery, discover
from ..discovery.head import find_head
from ..discovery.inputs import NoInputsError, corner, dummy_inputs, model_inputs
from ..discovery.projections import Projections, find_projections
from ..discovery.skeleton import skeleton
from ..discovery.trace import runs_on
from ..errors import UserError, first_line
from ..hub import is_converted, model_class, refuse_quantised
from ..measure.layer_inputs import KEPT
from ..measure.observe import TOKENS_AT_ONCE
from ..stages.budgets.fit import REGRESSED
from ..stages.routers.training import ROWS_HELD
from ..stages.standins import MEMORY
from .estimate import predicted_seconds

TEXT_OR_IMAGES = "convert can feed a model that runs on text or token ids alone, or on images alone"
Batch = dict[str, torch.Tensor]
EXPERTS = re.compile(r"(n|num)(_local|_routed)?_experts|moe_num_experts")  # keys of configs
BASE_MEMORY = 700 * 2**20  # Python with torch and transformers imported


@dataclass
class ConversionPlan:
    """The blocks with their experts, and the cost of the conversion."""

    model_class: type[nn.Module]
    discovery: Discovery
    dense_parameters: int
    added_parameters: int
    peak_memory_bytes: int
    disk_bytes: int
    skeleton: nn.Module
    projections: list[Projection] = field(default_factory=list)
    networks: list[Block] = field(default_factory=list)  # in the places of these, with `--attention mlp`
    stages: list[str] = field(default_factory=list)
    seconds: Callable[[], float] = lambda: 0.0  # predicted; it times some products

    @property
    def blocks(self) -> list[Block]:
        """The blocks to convert."""
        return self.discovery.blocks

    def summary(self) -> dict[str, Any]:
        """Plain figures for reports."""
        return {
            "blocks": len(self.blocks),
            "projections": len(self.projections),
            "dense_parameters": self.dense_parameters,
            "added_parameters": self.added_parameters,
            "networks": len(self.networks),
            "padded_neurons": sum(block.slots - block.width for block in self.blocks),
            "peak_memory_bytes": self.peak_memory_bytes,
            "disk_bytes": self.disk_bytes,
            "stages": self.stages,
        }


def survey(model_config: Any, name: str, sample: Callable[[], Batch] | None = None) -> tuple[nn.Module, Discovery]:
    """A skeleton of the model, and the blocks in it.

    Args:
        model_config: The model's config.
        name: The model's name, for messages.
        sample: Gives a batch of the data, asked for if the model does not run on inputs made from its config.

    Raises:
        UserError: If the model is converted or quantised, cannot be built, or runs on no inputs that could be found.
    """
    if is_converted(model_config):
        raise UserError(f"--model {name} is already a converted checkpoint; give the dense model it came from")
    refuse_quantised(name, model_config)
    kind = model_class(model_config, name)
    try:
        model = skeleton(kind, model_config)
        model.tie_weights()
    except Exception as error:
        raise UserError(
            f"--model {name}: a {kind.__name__} cannot be built from its config ({first_line(error)}); mend its "
            f"config.json, install what it asks for, or give another model"
        ) from None
    try:
        return model, discover(model, sample=sample)
    except NoInputsError as error:
        way = (
            "give another model or other data" if sample else "only convert itself tries a batch of its --data as well"
        )
        raise UserError(f"--model {name}: {error}; {way}") from None


def make_plan(model_config: Any, config: ConvertConfig, sample: Callable[[], Batch] | None = None) -> ConversionPlan:
    """Discover the blocks on a skeleton of the model, choose their experts and count.

    Args:
        model_config: The model's config.
        config: What to convert and how.
        sample: As for `survey`.

    Raises:
        UserError: As `survey`, or if no block is found, or the experts do not divide a width.
    """
    model, discovery = survey(model_config, config.model, sample)
    if not discovery.blocks:
        raise UserError(f"--model {config.model}: {none_found(model, discovery)}; d2dmoe list shows what is in it")
    for block in discovery.blocks:
        block.experts = choose_experts(block, config.experts, config.expert_size)
    projections, networks = [], []
    if config.attention != "none":
        around = find_projections(model, sample=sample)
        projections = choose_projections(config, around.found, around.refused)
    if attention_way(config.attention)[0] == "mlp":
        networks = [network_block(config, projection) for projection in projections]
    head = choose_head(config, model, projections)
    everything = [*discovery.blocks, *networks]
    for block in everything:
        if config.min_experts > block.experts:
            raise UserError(f"--min-experts {config.min_experts}: {block.name} has {block.experts} experts in all")
    dense = sum(p.numel() for p in model.parameters())
    if networks:
        added = sum(_replaced(*pair) for pair in zip(projections, networks, strict=True))
    else:
        added = sum(p.added for p in projections)
    added += sum(p.added for p in head)
    added += sum(_added(block, config, everything) for block in everything)
    stored = (stored_dtype(model_config) if config.dtype == "auto" else getattr(torch, config.dtype)).itemsize
    held = stored_dtype(model_config).itemsize if config.low_memory else 4
    peak = BASE_MEMORY + held * (dense + added) + _largest_stage(model_config, config, everything, held)
    disk = stored * (dense + added)
    seconds = partial(predicted_seconds, model, everything, config)
    return ConversionPlan(
        type(model), discovery, dense, added, peak, disk, model, [*projections, *head], networks,
        _stages(config, projections, networks), seconds,
    )  # fmt: skip


def none_found(model: nn.Module, discovery: Discovery) -> str:
    """That there is no feed-forward block to convert, and why."""
    stored = vars(model.config.get_text_config())
    experts = next((f"{k} {n}" for k, n in stored.items() if EXPERTS.fullmatch(k) and isinstance(n, int) and n > 1), "")
    reasons = [f"by its config it is a mixture of experts already: {experts}"] if experts else []
    reasons += [f"{block.up}: {why}" for block, why in discovery.refused[:3]]
    return "no feed-forward block found" + (f" ({'; '.join(reasons)})" if reasons else "")


def _stages(config: ConvertConfig, projections: list[Projection], networks: list[Block]) -> list[str]:
    """What a conversion does, in order."""
    asked = {
        "sparsify": config.sparsify != "skip", "networks": networks, "split": True, "routers": True,
        "projections": projections and not networks, "head": config.head != "none", "calibrate": True,
        "heal": config.heal, "evaluate": config.eval_tokens, "save": True,
    }  # fmt: skip
    return [name for name, wanted in asked.items() if wanted]


def stored_dtype(model_config: Any) -> torch.dtype:
    """The dtype of a model's files, as its config has it."""
    stored = getattr(model_config, "dtype", None) or torch.float32
    return stored if isinstance(stored, torch.dtype) else getattr(torch, str(stored).removeprefix("torch."))


def choose_head(config: ConvertConfig, model: nn.Module, projections: list[Projection]) -> list[Projection]:
    """The head, where it is to be converted.

    Args:
        config: Whether it is.
        model: Skeleton or model.
        projections: Those around attention that are converted; the head's number follows theirs.

    Raises:
        UserError: If there is no such head.
    """
    if config.head == "none":
        return []
    return [head_projection(config, *find_head(model), 1 + max((p.group for p in projections), default=-1))]


def fit_to_data(plan: ConversionPlan, batch: dict[str, torch.Tensor], source: str) -> list[Block]:
    """Exclude blocks that this data never reaches, before any weights are read; returns them.

    Args:
        plan: Its `discovery` is changed.
        batch: One batch of the data; a corner of it is enough.
        source: Name of the data, for messages.

    Raises:
        UserError: If the data cannot feed the model, or reaches no block.
    """
    name, main = plan.model_class.__name__, getattr(plan.model_class, "main_input_name", "input_ids")
    feeds = f"--data {source} gives {', '.join(batch)}"
    if main not in batch:
        raise UserError(f"{feeds}, and {name} takes {main}; {TEXT_OR_IMAGES}")
    try:
        reached = _reached(plan.skeleton, batch)
    except UserError as error:
        raise UserError(f"{feeds}, on which {name} does not run ({error}); {TEXT_OR_IMAGES}") from None
    asleep = [block for block in plan.blocks if not block_parts(block) <= reached]
    if len(asleep) == len(plan.blocks):
        raise UserError(f"{feeds}, and no feed-forward block of {name} runs on that; {TEXT_OR_IMAGES}")
    plan.discovery.blocks = [block for block in plan.blocks if block not in asleep]
    plan.discovery.refused += [(block, f"does not run on --data {source}") for block in asleep]
    plan.projections = [projection for projection in plan.projections if projection.name in reached]
    plan.networks = [block for block in plan.networks if block.name in reached]
    return asleep


def check_fed(model: nn.Module, discovery: Discovery, source: str) -> None:
    """Exclude blocks that no data of `convert` reaches, as far as the config alone tells.

    Args:
        model: A skeleton.
        discovery: Is changed.
        source: The model, for messages.

    Raises:
        UserError: If none is left of some.
    """
    main = getattr(model, "main_input_name", "input_ids")
    if not discovery.blocks:
        return
    try:
        if main not in ("input_ids", "pixel_values"):
            raise UserError(f"it takes {main}")
        value = dummy_inputs(model)[main]
        batch = {main: value} | ({"attention_mask": torch.ones_like(value)} if main == "input_ids" else {})
        reached = _reached(model, batch)
    except UserError as error:
        discovery.refused += [(block, f"convert has no data for this model: {error}") for block in discovery.blocks]
        discovery.blocks = []
        raise UserError(f"--model {source}: {TEXT_OR_IMAGES}, and {type(model).__name__} is none ({error})") from None
    asleep = [block for block in discovery.blocks if not block_parts(block) <= reached]
    discovery.blocks = [block for block in discovery.blocks if block not in asleep]
    discovery.refused += [(block, f"does not run on {main} alone, and {TEXT_OR_IMAGES}") for block in asleep]


def block_parts(block: Block) -> set[str]:
    """Names of a block's linear maps."""
    return {block.up, block.down, block.gate or block.up}


def _reached(model: nn.Module, batch: Batch) -> set[str]:
    """Names of the linear maps that this batch reaches; `UserError` with the reason if the model does not run on it."""
    inputs = model_inputs(model, corner(batch))
    try:
        return runs_on(model, inputs)
    except Exception as error:
        reason = first_line(error)
        with suppress(Exception):  # there may be no inputs from the config
            lacking = ", ".join(sorted(dummy_inputs(model).keys() - inputs.keys()))
            reason = f"it takes {lacking} as well" if lacking else reason
        raise UserError(reason) from None


def _replaced(projection: Projection, network: Block) -> int:
    """Parameters that a network has more than the projection in whose place it stands."""
    per_neuron = projection.inputs + projection.outputs
    return network.width * (per_neuron + 1) + projection.outputs - projection.macs


def _added(block: Block, config: ConvertConfig, blocks: list[Block]) -> int:
    router = router_width(config.router_width, block) * (block.d_model + block.experts)
    if config.stand_in == "zero":
        return router
    rank = {name: min(value, block.d_model) for name, value in ranks(config, blocks).items()}
    stand_ins = block.experts * block.d_model
    stand_ins += rank["delta_rank"] * (block.slots + block.d_model) + rank["linear_rank"] * 2 * block.d_model
    return router + stand_ins * len(targets(config))


def _largest_stage(model_config: Any, config: ConvertConfig, blocks: list[Block], held: int) -> int:
    """Bytes that a conversion takes beside the weights, in the stage that takes most."""
    largest = max(blocks, key=lambda b: b.width * b.d_model)
    rows, tokens = config.batch_size * config.max_length, config.calibration_tokens
    vocabulary = getattr(model_config.get_text_config(), "vocab_size", 0)
    activations = 4 * min(rows, TOKENS_AT_ONCE) * (6 * largest.width + 12 * largest.d_model + 3 * vocabulary)
    kept = 0 if config.low_memory else min(KEPT, 4 * tokens * sum(b.d_model for b in blocks))
    captured = 0
    if config.router_fit != "closed-form":
        captured = 4 * min(rows, ROWS_HELD) * sum(b.d_model + b.experts for b in blocks)
    packing = held * sum(b.width * b.d_model * (3 if b.kind == "glu" else 2) for b in blocks)  # beside the originals
    return max(activations + kept + captured, activations + kept + _moments(largest, config), packing)


def _moments(block: Block, config: ConvertConfig) -> int:
    """Bytes of the stand-ins' regression for its largest block: moments in fp32, a solve in fp64."""
    if config.stand_in not in REGRESSED:
        return 0
    n, d = block.slots + block.experts + block.d_model, block.d_model
    pair = 8 * n * (n + d)  # of one budget
    return min(max(MEMORY, pair), pair * len(targets(config))) + 8 * n * (n + 5 * d)


def describe(
    discovery: Discovery, projections: Projections | None = None, head: str | None = None
) -> list[dict[str, Any]]:
    """Rows of `d2dmoe list`: every block, projection and linear map, converted or not, and why not.

    `head` is the name of one that could be converted.
    """
    projections = projections or Projections()
    around = {p.name: None for p in projections.found} | dict(projections.refused)
    rows = [
        {
            "name": block.name, "kind": block.kind, "activation": block.activation, "d_model": block.d_model,
            "width": block.width, "parts": {"up": block.up, "gate": block.gate, "down": block.down},
            "divisors": [n for n in divisors(block.width) if 1 < n < block.width],
            "converted": why is None, "why": why or _remark(block),
        }
        for block, why in [*((b, None) for b in discovery.blocks), *discovery.refused]
    ]  # fmt: skip
    rows += [
        {
            "name": p.name, "kind": "attention", "activation": None, "d_model": p.inputs, "width": p.outputs,
            "parts": {"up": p.name, "gate": None, "down": None}, "divisors": [], "converted": False, "role": p.role,
            "why": f"{', '.join(p.role)} of attention{_heads_of(p)}; convert takes it with --attention",
        }
        for p in projections.found
    ]  # fmt: skip
    for name, inputs, outputs, why in discovery.other:
        kind, why = _kind_of_linear(name, why, around, head)
        if why:
            rows.append({
                "name": name, "kind": kind, "activation": None, "d_model": inputs, "width": outputs,
                "parts": {"up": name, "gate": None, "down": None}, "divisors": [], "converted": False, "why": why,
            })  # fmt: skip
    return rows


def _heads_of(projection: Projection) -> str:
    """How many of its heads can be narrower, role by role."""
    counts = {role: count for role, count in zip(projection.role, projection.heads, strict=False) if count}
    if not counts:
        return ""
    same = len({*counts.values()}) == 1 and len(counts) == len(projection.role)
    named = next(iter(counts.values())) if same else " and ".join(f"{n} of {role}" for role, n in counts.items())
    return f", {named} heads that can be narrower"


def _kind_of_linear(name: str, why: str, around: dict[str, str | None], head: str | None) -> tuple[str, str | None]:
    """Kind of a linear map outside of blocks, and why it is not converted; no reason where it has a row already."""
    if name == head:
        return "head", "gives the logits; convert takes it with --head svd-softmax"
    return ("attention", around[name]) if name in around else ("linear", why)


def _remark(block: Block) -> str:
    return (
        f"runs {block.calls} times with the same weights: one set of experts and one router" if block.calls > 1 else ""
    )
