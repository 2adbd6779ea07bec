"""The same budgets on a second text: how far cost and quality drift away from the data they were made for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .. import hub
from ..config.options import DataConfig
from ..data.batches import Batches
from ..data.reading import read_batches
from ..errors import UserError
from ..report.machine import portable
from .metrics import choose_metric

KEPT = ("active_fraction", "flops_fraction_ffn", "flops_fraction_model", "metric", "dense", "metrics", "dense_metrics",
        "tokens")  # fmt: skip


@dataclass
class SecondText:
    """What `--also-eval` names, as batches, and the metric that both texts are measured by."""

    name: str
    batches: Batches
    metric: str


def second_text(
    source: str, data: DataConfig, *, name: str, config: Any, kind: type, processor: Any, metric: str, tokens: int = 0,
    part: str | None = None, revision: str | None = None,
) -> SecondText:  # fmt: skip
    """Read a second text for a model.

    Args:
        source: A data source, as `--data` takes it.
        data: Settings of the first one, which hold for both.
        name: The model.
        config: Its config.
        kind: Its class.
        processor: Its tokenizer or image processor.
        metric: What the first text is measured by.
        tokens: Stop after this many tokens; 0 for all.
        part: Part of the data; by default `held_out` of builtin, `all` of anything else.
        revision: Of the model.

    Raises:
        UserError: If it cannot be read, or does not fit the model or the metric.
    """
    part = part or ("held_out" if source == "builtin" else "all")
    data = replace(hub.fit_length(data, config), data=source)
    label2id = config.label2id if hub.is_classifier(kind, config) else None
    try:
        facts = hub.token_facts(name, config, revision) | {"packed": hub.is_causal(kind), "label2id": label2id}
        batches = read_batches(data, part, processor, tokens=tokens, **facts)
        batches = batches.first(tokens) if tokens else batches
        choose_metric(metric, kind, config, batches.collate(batches.items[:1]), processor)
    except UserError as error:
        text = str(error).replace("--data ", "--also-eval ")
        prefix = "" if text.startswith("--also-eval") else f"--also-eval {source}: "
        raise UserError(prefix + text) from None
    return SecondText(str(portable(source)), batches, metric)


def add_drift(rows: list[dict[str, Any]], second: SecondText, others: list[dict[str, Any]]) -> None:
    """Give every row of `evaluate` an entry `drift`: the same setting's row on the second text, and its name."""
    for row, other in zip(rows, others, strict=True):
        row["drift"] = {"data": second.name, **{key: other[key] for key in KEPT}}
