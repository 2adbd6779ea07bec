"""Quality, active fraction and FLOPs of a model at some settings of its gate."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import hub
from ..config.checks import check_tau
from ..config.options import DataConfig, heals_everything
from ..config.record import D2DMoEConfig
from ..data.batches import Batches
from ..data.reading import read_batches
from ..discovery.positions import fit_to_positions
from ..errors import UserError
from ..files import read_yaml
from ..kernels import dispatching
from ..moe.gating import set_gate, stored_config
from ..moe.int8_linear import dtypes_of, set_linear_dtype
from ..moe.layer import layers
from ..moe.memory import set_expert_dtype, twin_in
from ..moe.projection import around_attention, projections
from ..progress import progress
from ..vocabulary import size_of, special_tokens
from .drift import SecondText, add_drift, second_text
from .flops import DenseCost, dense_cost, dense_ffn_flops, projection_flops, sparse_ffn_flops
from .metrics import METRICS, Batch, Metric, choose_metric
from .observe import ActiveCounter, ChannelCounter, model_inputs, observing, observing_projections, pieces

Setting = dict[str, Any]  # keyword arguments of `set_gate`
LOGITS_HELD = 2**25  # elements, 128 MB in fp32
TIMED = 3  # timed passes


@dispatching("sparse")
@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Sequence[Batch],
    settings: list[Setting],
    *,
    metric: str | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    original: nn.Module | None = None,
) -> list[dict[str, Any]]:
    """One row for each setting, in the form of the command contract.

    Over every batch the dense model (all experts on) runs once and then each setting, so that all of them can be
    compared with it and memory is bounded by one batch. The dense model never has its weights in int8.

    Args:
        model: Converted model, or a dense one (then `settings` is ignored and there is one row).
        batches: Held-out batches.
        settings: Keyword arguments of `set_gate`, `{"active": 0.25}` or `{"tau": 0.1}`.
        metric: A key of `METRICS`; by default what fits the model's class and the data.
        tokenizer: Needed by `masked_lm` alone, unless the config has a mask token.
        seed: Of the tokens that are masked.
        original: The dense model, where the converted one does not hold it (`--attention mlp`), or what a dense one
            was before it was trained further. Without it the model is compared with itself, all experts on.

    Returns:
        `{"gate", "tau", "active_fraction", "flops_fraction_ffn", "flops_fraction_model", "metric", "dense", "metrics",
        "dense_metrics", "tokens", "ms_per_token", "dtype"}`; `metrics` holds what the metric tells besides its
        own value.

    Raises:
        UserError: If the metric does not fit the model or the data.
    """
    kind = METRICS[choose_metric(metric, type(model), model.config, batches[0], tokenizer)]
    if kind.name == "masked_lm":
        tokenizer = special_tokens(model.config, tokenizer)
    rounded = dtypes_of(model)
    plain = twin_in(model, None) if rounded else model
    generator, limit, tokens = torch.Generator().manual_seed(seed), _row_limit(model, batches), 0
    each = getattr(batches, "image_tokens", 1)
    dense = _Point({"active": 1.0}, kind(), each)
    converted = bool(layers(model))
    if not converted:
        original = plain if rounded and original is None else original
        settings = [] if original is None else [{"active": 1.0}]
    points = [_Point(setting, kind(), each) for setting in settings]
    own = converted and not rounded and original is None
    repeated = [point for point in points if own and _runs_everything(model, point)]
    for batch in pieces(progress(batches, desc="eval"), limit):
        tokens += _tokens(batch, each)
        batch = kind.prepare(batch, tokenizer, generator)
        inputs = model_inputs(model, batch)
        reference = dense.run(plain if original is None else original, inputs, batch, None)
        for point in points:
            if point not in repeated:
                point.run(model, inputs, batch, reference)
    timed = [model_inputs(model, batch) for batch in islice(pieces(batches, limit), TIMED)]
    base = dense.row(plain, timed, dense.metric, None) | {"tokens": tokens}
    if not converted:
        common = {"tokens": tokens, **rounded}
        return [point.row(model, timed, dense.metric, None) | common for point in points] or [base]
    cost = dense_cost(plain, timed[0])
    rows = []
    for point in points:
        row = base if point in repeated else point.row(model, timed, dense.metric, cost) | {"tokens": tokens}
        rows.append({**point.setting, **row, **rounded})
    return rows


def evaluate_both(
    model: nn.Module, batches: Sequence[Batch], second: SecondText | None, settings: list[Setting], **options: Any
) -> list[dict[str, Any]]:
    """As `evaluate`, and each row has an entry `drift` where there is a second text."""
    rows = evaluate(model, batches, settings, **options)
    if second:
        add_drift(rows, second, evaluate(model, second.batches, settings, **{**options, "metric": second.metric}))
    return rows


def _runs_everything(model: nn.Module, point: _Point) -> bool:
    """Whether a setting of the gate leaves nothing out, so that its row is the dense model's."""
    with point.gate(model):
        everything = all(layer.gate_state.tau == 0 for layer in layers(model))
        everything = everything and all(layer.gate_state.method == "dense" for layer in projections(model))
    return everything and not any(layer.block.role for layer in layers(model))


@dataclass(eq=False)
class _Point:
    """One setting of the gate: its metric and active fraction, summed batch by batch."""

    setting: Setting
    metric: Metric
    image_tokens: int = 1
    counter: ActiveCounter = field(default_factory=ActiveCounter)
    channels: ChannelCounter = field(default_factory=ChannelCounter)

    def gate(self, model: nn.Module) -> AbstractContextManager:
        """Context manager that sets the gate."""
        return set_gate(model, **self.setting) if layers(model) else nullcontext()

    def run(self, model: nn.Module, inputs: Batch, batch: Batch, reference: torch.Tensor | None) -> torch.Tensor | None:
        """One forward pass. `reference` is the dense model's result, `None` in the dense pass itself."""
        with (
            self.gate(model), observing(model, self.counter) as current,
            observing_projections(model, self.channels) as other,
        ):  # fmt: skip
            current["mask"] = other["mask"] = batch.get("attention_mask")
            kept = self.metric.keep(model(**inputs), batch)
        self.metric.add(kept, kept if reference is None else reference, batch)
        return kept if self.metric.compares else kept[:0]

    def row(self, model: nn.Module, timed: list[Batch], dense: Metric, cost: DenseCost | None) -> dict[str, Any]:
        """The figures; `cost` is the dense model's, and not needed for its own row."""
        (name, value), *further = self.metric.figures().items()
        (_, dense_value), *dense_further = dense.figures().items()
        with self.gate(model):
            costs = _dense_costs() if cost is None else _costs(model, self.counter, self.channels, cost)
            milliseconds = _milliseconds(model, timed, self.image_tokens)
        return {
            **costs,
            "metric": {"name": name, "value": value},
            "dense": {"value": dense_value},
            "metrics": dict(further),
            "dense_metrics": dict(dense_further),
            "ms_per_token": milliseconds,
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        }


def _dense_costs() -> dict[str, Any]:
    return {
        "gate": "none", "tau": 0.0, "active_fraction": 1.0, "flops_fraction_ffn": 1.0, "flops_fraction_model": 1.0,
    }  # fmt: skip


def _costs(model: nn.Module, counter: ActiveCounter, channels: ChannelCounter, dense: DenseCost) -> dict[str, Any]:
    """Active and FLOP fractions of the gate in force."""
    by_layer = counter.by_layer(len(layers(model)))
    pairs = [(dense_ffn_flops(x), sparse_ffn_flops(x, a)) for x, a in zip(layers(model), by_layer, strict=True)]
    networks = [bool(layer.block.role) for layer in layers(model)]  # in the places of projections
    before, after = (dense.blocks(p[n] * (not net) for p, net in zip(pairs, networks, strict=True)) for n in (0, 1))
    full, total = (dense.blocks(p[n] * net for p, net in zip(pairs, networks, strict=True)) for n in (0, 1))
    full += dense.dense_projections(model)
    total += dense.projections(projection_flops(x, channels.fraction(x.number)) for x in around_attention(model))
    saved = {"flops_fraction_attention": total / full} if full else {}
    taus = [layer.gate_state.tau for layer in layers(model)]
    return {
        "gate": stored_config(model).gate,
        "tau": taus[0] if len(set(taus)) == 1 else taus,
        "active_fraction": counter.fraction,
        "flops_fraction_ffn": after / before if before else 1.0,
        **saved,
        "flops_fraction_model": (dense.total - before + after - full + total - dense.saved_by_head(model))
        / dense.total,
        "active_by_layer": [round(active, 4) for active in by_layer],
    }


def _milliseconds(model: nn.Module, timed: list[Batch], image_tokens: int) -> float:
    """Milliseconds per token, padding left out: whole forward passes of a setting that has run before."""
    started = time.perf_counter()
    for inputs in timed:
        model(**inputs)
    seconds = time.perf_counter() - started
    return 1000 * seconds / max(sum(_tokens(inputs, image_tokens) for inputs in timed), 1)


def _tokens(batch: Batch, image_tokens: int) -> int:
    """Tokens that are not padding, or patches of images."""
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    return len(next(iter(batch.values()))) * image_tokens


def _row_limit(model: nn.Module, batches: Sequence[Batch]) -> int:
    """Sequences per forward pass: few enough that the logits of a large vocabulary fit in memory."""
    ids = batches[0].get("input_ids")
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", 0) if ids is not None else 0
    return max(1, LOGITS_HELD // (ids.shape[1] * vocabulary)) if vocabulary else 2**30


@dataclass
class Subject:
    """A folder or hub model that is ready to be evaluated, its weights not yet read."""

    name: str
    config: Any
    stored: D2DMoEConfig | None
    batches: Batches
    metric: str
    tokenizer: Any
    second: SecondText | None = None
    original: str | None = None  # the dense model that it is compared with, if it is not itself with everything on

    def rows(
        self, settings: list[Setting], *, oracle: bool = False, expert_dtype: str | None = None,
        linear_dtype: str | None = None,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Load the model and evaluate it; without settings at its stored budgets."""
        if not settings and self.stored:
            settings = [{"active": a} for a in sorted({*(b.active for b in self.stored.budgets), 1.0})]
        settings = [{**s, "oracle": True} for s in settings] if oracle else settings
        if self.stored and self.stored.networks and not self.original:
            warnings.warn(
                f"{self.name} holds no dense model (--attention mlp): what is called dense here is this model with all "
                f"experts on; its results.json compares it with the dense model it was made from", stacklevel=2
            )  # fmt: skip
        if not self.original and _healed(self.name):
            warnings.warn(
                f"{self.name} was healed in all its weights (--heal-parameters all): what is called dense here is the "
                f"healed model with everything on; --original MODEL compares with the one it was made from",
                stacklevel=2,
            )
        model = hub.load_model(self.name, self.config)
        if expert_dtype and self.stored:
            set_expert_dtype(model, expert_dtype)
        set_linear_dtype(model, linear_dtype)
        options = {"metric": self.metric, "tokenizer": self.tokenizer}
        if self.original:
            options["original"] = hub.load_model(self.original, hub.read_config(self.original))
        return evaluate_both(model, self.batches, self.second, settings, **options)


def prepare(
    name: str,
    data: DataConfig,
    settings: list[Setting],
    *,
    part: str = "all",
    tokens: int = 0,
    metric: str | None = None,
    also_eval: str | None = None,
    original: str | None = None,
) -> Subject:
    """Prepare an evaluation: every check that needs no weights.

    Args:
        name: Converted or dense model: hub id or local folder.
        data: Data to evaluate on.
        settings: Checked against the model's gate.
        part: Part of the data.
        tokens: Stop after this many tokens; 0 for all.
        metric: A key of `METRICS`, or `None` for the natural one.
        also_eval: A second text, on which every row gets an entry `drift`.
        original: The dense model to compare with, hub id or folder; by default the model itself with everything on.

    Raises:
        UserError: If the model, the data, a setting, the metric or the dense model does not fit.
    """
    config = hub.read_config(name)
    stored = hub.conversion_record(config)
    for setting in settings:
        check_tau(setting.get("tau", 0.0), stored.gate if stored else "max")
    kind = hub.model_class(config, name)
    if original:
        _check_original(original, name, config)
    data = fit_to_positions(data, kind, config)
    processor = hub.load_processor(name, config)
    facts = hub.token_facts(name, config) | {"packed": hub.is_causal(kind)}
    facts["label2id"] = config.label2id if hub.is_classifier(kind, config) else None
    batches = read_batches(data, part, processor, tokens=tokens, **facts)
    batches = batches.first(tokens) if tokens else batches
    hub.check_safetensors(name)
    metric = choose_metric(metric, kind, config, batches.collate(batches.items[:1]), processor)
    second = also_eval and second_text(
        also_eval, data, name=name, config=config, kind=kind, processor=processor, metric=metric, tokens=tokens
    )
    return Subject(name, config, stored, batches, metric, processor, second or None, original)


def _healed(name: str) -> bool:
    """Whether the recipe in a converted folder, if it can be read, has healed the dense weights as well."""
    with suppress(UserError):
        return heals_everything(read_yaml(Path(name) / "recipe.yaml"))
    return False


def _check_original(original: str, name: str, config: Any) -> None:
    """Check that a model is dense and of the kind that another one is.

    Raises:
        UserError: If it is not.
    """
    theirs = hub.read_config(original)
    if hub.conversion_record(theirs) is not None:
        raise UserError(f"--original {original}: is converted itself; give the dense model")
    ours, other = ((hub.model_class(c, n), size_of(c), c.num_labels) for c, n in ((config, name), (theirs, original)))
    if ours != other:
        raise UserError(f"--original {original}: class, vocabulary and number of labels are not those of {name}")
    hub.check_safetensors(original)


def compare(
    subjects: list[Subject], settings: list[Setting], *, oracle: bool = False, expert_dtype: str | None = None,
    linear_dtype: str | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of several models one after another, each with the name of its `model`.

    The converted ones among them compute their experts in `expert_dtype`, and all of them other linear maps in
    `linear_dtype`.

    Raises:
        UserError: If they are not measured by the same metric, or none has the experts that a dtype was given for, or
            the budgets that settings were.
    """
    if expert_dtype and not any(subject.stored for subject in subjects):
        raise UserError(
            f"--expert-dtype {expert_dtype}: {subjects[0].name} has no experts; "
            f"run `d2dmoe convert --model {subjects[0].name}` first"
        )
    if (settings or oracle) and not any(subject.stored for subject in subjects):
        name = subjects[0].name
        raise UserError(f"{name} is not converted and has no budgets; leave out --active, --tau and --oracle")
    for subject in subjects[1:]:
        if subject.metric != subjects[0].metric:
            raise UserError(
                f"--compare: {subjects[0].name} is measured by {subjects[0].metric} and {subject.name} by "
                f"{subject.metric}; compare models of one kind, or give --metric cosine_to_dense"
            )
    options = {"oracle": oracle, "expert_dtype": expert_dtype, "linear_dtype": linear_dtype}
    return [{"model": subject.name, **row} for subject in subjects for row in subject.rows(settings, **options)]
