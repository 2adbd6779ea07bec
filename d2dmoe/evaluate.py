"""Quality, active fraction and FLOPs of a model at one setting of its gate."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .experts import layers
from .flops import dense_ffn_flops, model_flops, sparse_ffn_flops
from .gating import set_gate, stored_config
from .observe import ActiveCounter, model_inputs, observing, pieces
from .progress import progress


def evaluate(model: nn.Module, batches: Sequence, settings: list[dict[str, float]]) -> list[dict[str, Any]]:
    """One row for each setting, in the form of the command contract.

    Args:
        model: Converted model, or a dense one (then `settings` is ignored and there is one row).
        batches: Held-out batches.
        settings: Keyword arguments of `set_gate`, `{"active": 0.25}` or `{"tau": 0.1}`.

    Returns:
        `{"gate", "tau", "active_fraction", "flops_fraction_ffn", "flops_fraction_model", "metric", "dense", "tokens",
        "ms_per_token"}`; the metric is perplexity for causal language models, accuracy where the data has labels,
        and otherwise the mean cosine between the outputs and those of the dense model.
    """
    metric = metric_of(model, batches)
    if not layers(model):
        value, tokens, milliseconds, _ = _measure(model, batches, metric, "dense")
        return [_row("dense", 0.0, 1.0, 1.0, 1.0, metric, value, value, tokens, milliseconds)]
    config = stored_config(model)
    with set_gate(model, active=1):
        dense, tokens, dense_ms, _ = _measure(model, batches, metric, "dense")
        inputs = model_inputs(model, next(pieces(batches, _row_limit(model, batches))))
        total = model_flops(model, inputs) / _positions(model, inputs)
    rows = []
    for setting in settings:
        with set_gate(model, **setting):
            if all(layer.gate_state.tau == 0 for layer in layers(model)):
                row = _row("none", 0.0, 1.0, 1.0, 1.0, metric, dense, dense, tokens, dense_ms)
            else:
                value, _, milliseconds, counter = _measure(model, batches, metric, str(setting))
                by_layer = counter.by_layer(len(layers(model)))
                before = sum(dense_ffn_flops(layer) for layer in layers(model))
                after = sum(sparse_ffn_flops(x, a) for x, a in zip(layers(model), by_layer, strict=True))
                taus = [layer.gate_state.tau for layer in layers(model)]
                row = _row(
                    config.gate, taus[0] if len(set(taus)) == 1 else taus, counter.fraction, after / before,
                    (total - before + after) / total, metric, value, dense, tokens, milliseconds,
                )  # fmt: skip
                row["active_by_layer"] = [round(a, 4) for a in by_layer]
        rows.append({**setting, **row})
    return rows


def _row(gate, tau, active, ffn, whole, metric, value, dense, tokens, milliseconds) -> dict[str, Any]:
    return {
        "gate": gate,
        "tau": tau,
        "active_fraction": active,
        "flops_fraction_ffn": ffn,
        "flops_fraction_model": whole,
        "metric": {"name": metric, "value": value},
        "dense": {"value": dense},
        "tokens": tokens,
        "ms_per_token": milliseconds,
    }


def metric_of(model: nn.Module, batches: Sequence) -> str:
    """`perplexity`, `accuracy` or `cosine_to_dense`, by what the model and the data allow."""
    if "labels" in batches[0] and getattr(model.config, "num_labels", 0) and hasattr(model, "classifier"):
        return "accuracy"
    causal = model.can_generate() and not model.config.is_encoder_decoder if hasattr(model, "can_generate") else False
    return "perplexity" if causal and "input_ids" in batches[0] else "cosine_to_dense"


def _positions(model: nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    """Rows that the first converted layer sees in one pass: the unit of "per token"."""
    seen = []

    def count(index, layer, x, hidden, scores, run):
        if index == 0:
            seen.append(x.shape[0])

    with torch.no_grad(), observing(model, count):
        model(**inputs)
    return max(sum(seen) // max(layers(model)[0].block.calls, 1), 1)


@torch.no_grad()
def _measure(model: nn.Module, batches: Sequence, metric: str, name: str) -> tuple[float, int, float, ActiveCounter]:
    """Metric, tokens it was taken over, milliseconds per token of the forward passes, and the active counter."""
    counter, total, count, tokens, seconds = ActiveCounter(), 0.0, 0, 0, 0.0
    with observing(model, counter) as current:
        for batch in progress(pieces(batches, _row_limit(model, batches)), desc=f"eval {name}"):
            current["mask"] = batch.get("attention_mask")
            inputs = model_inputs(model, batch)
            started = time.perf_counter()
            output = model(**inputs)
            seconds += time.perf_counter() - started
            tokens += (
                int(batch["attention_mask"].sum()) if "attention_mask" in batch else len(inputs[next(iter(inputs))])
            )
            score, weight = SCORES[metric](model, inputs, output, batch)
            total, count = total + score, count + weight
    value = total / max(count, 1)
    if metric == "perplexity":
        value = math.exp(value)
    return value, tokens, 1000 * seconds / max(tokens, 1), counter


LOGITS_HELD = 2**25  # elements, 128 MB in fp32


def _row_limit(model: nn.Module, batches: Sequence) -> int:
    """Sequences per forward pass, so that logits over a large vocabulary stay small."""
    ids = batches[0].get("input_ids")
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", 0) if ids is not None else 0
    return max(1, LOGITS_HELD // (ids.shape[1] * vocabulary)) if vocabulary else 2**30


def _negative_log_likelihood(model, inputs, output, batch) -> tuple[float, int]:
    """Summed nats over predicted tokens, and their number."""
    logits = output.logits[:, :-1].float()
    targets = inputs["input_ids"][:, 1:].clone()
    if "attention_mask" in inputs:
        targets[inputs["attention_mask"][:, 1:] == 0] = -100
    loss = torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=-100, reduction="sum"
    )
    return loss.item(), int((targets != -100).sum())


def _correct(model, inputs, output, batch) -> tuple[float, int]:
    right = (output.logits.argmax(-1).cpu() == batch["labels"]).sum().item()
    return right, len(batch["labels"])


def _cosine(model, inputs, output, batch) -> tuple[float, int]:
    """Cosine between this output and the dense model's, summed over positions that are not padding."""
    with set_gate(model, active=1) if layers(model) else torch.no_grad():
        observers = [(layer, layer.observer) for layer in layers(model)]
        for layer, _ in observers:
            layer.observer = None
        reference = model(**inputs)
        for layer, observer in observers:
            layer.observer = observer
    ours, theirs = (_main_tensor(o).float().flatten(0, -2) for o in (output, reference))
    cosine = torch.nn.functional.cosine_similarity(ours, theirs, dim=-1)
    mask = inputs.get("attention_mask")
    if mask is not None and mask.numel() == cosine.numel():
        cosine = cosine[mask.reshape(-1).bool()]
    return cosine.sum().item(), cosine.numel()


def _main_tensor(output: Any) -> torch.Tensor:
    """Logits if there are any, else the first floating-point tensor; at least two dimensions."""
    values = [output["logits"]] if "logits" in output else [v for v in output.values() if isinstance(v, torch.Tensor)]
    first = next(v for v in values if v.is_floating_point())
    return first if first.ndim > 1 else first[None]


SCORES = {"perplexity": _negative_log_likelihood, "accuracy": _correct, "cosine_to_dense": _cosine}
