"""Quality that a budget has lost against the dense model, as one number."""

from __future__ import annotations

from typing import Any


def quality_loss(row: dict[str, Any]) -> float:
    """Quality that a row of `evaluate` has lost against the dense model.

    In nats per token for language models, as the KL divergence for classifiers, else as 1 minus the metric.
    """
    name, value = row["metric"]["name"], row["metric"]["value"]
    if name in ("perplexity", "masked_lm"):
        return row["metrics"]["loss"] - row["dense_metrics"]["loss"]
    return {"accuracy": row["metrics"].get("kl_to_dense"), "kl_to_dense": value}.get(name, 1.0 - value)


def loss_unit(metric: str) -> str:
    """The unit in which `quality_loss` counts."""
    nats = {"perplexity": "nats", "masked_lm": "nats", "accuracy": "KL in nats",
            "kl_to_dense": "KL in nats"}  # fmt: skip
    return nats.get(metric, "1 − cosine")
