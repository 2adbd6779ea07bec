"""Sections that a finished model card gets besides: drift, measured times, the report, the citation as BibTeX."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from .tables import bench_table, drift_table

BEGIN, END = "<!-- d2dmoe: times -->", "<!-- d2dmoe: end of times -->"
REPORT = """## Report

`report.html` in this folder shows quality against cost, the use of experts and the compute of single tokens.
`d2dmoe report path/to/this/folder` makes it again."""
BIBTEX = """```bibtex
@inproceedings{szatkowski2024d2dmoe,
  title = {Exploiting Activation Sparsity with Dense to Dynamic-k Mixture-of-Experts Conversion},
  author = {Szatkowski, Filip and W{\\'o}jcik, Bartosz and Pi{\\'o}rczy{\\'n}ski, Miko{\\l}aj and Scardapane, Simone},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2024}
}
```"""


def extended_card(text: str, results: dict[str, Any]) -> str:
    """A model card with these sections before its limits, and the second text's quality in its metadata.

    Args:
        text: The card of a conversion.
        results: The contents of `results.json`.
    """
    card = ModelCard(text)
    rows = [row for row in results["rows"] if "drift" in row]
    if rows:
        card.data.eval_results = [*(card.data.eval_results or []), *_second_results(card, rows)]
    sections = [*([_drift_section(rows)] if rows else []), BEGIN + "\n" + END, REPORT]
    body = f"{card}".rstrip()
    where = body.find("\n## Limits")
    where = len(body) if where < 0 else where
    body = f"{body[:where].rstrip()}\n\n" + "\n\n".join(sections) + f"\n{body[where:]}"
    return f"{body}\n\n{BIBTEX}\n"


def _drift_section(rows: list[dict[str, Any]]) -> str:
    other = rows[0]["drift"]["data"]
    return (
        f"## Drift\n\nThe same budgets on `{other}`, which routers and thresholds were not fitted on.\n\n"
        f"{drift_table(rows)}"
    )


def _second_results(card: ModelCard, rows: list[dict[str, Any]]) -> Iterator[EvalResult]:
    """The second text's quality as the hub's metadata, in the form that the card has for the first one."""
    first = (card.data.eval_results or [None])[0]
    for row in rows:
        drift = row["drift"]
        setting = {key: drift[key] for key in ("active_fraction", "flops_fraction_model")}
        for metric, value in {drift["metric"]["name"]: drift["metric"]["value"], **drift["metrics"]}.items():
            if math.isfinite(value):
                yield EvalResult(
                    task_type=first.task_type if first else "feature-extraction", dataset_type=drift["data"],
                    dataset_name=drift["data"], dataset_split="all", metric_type=metric, metric_value=value,
                    metric_name=", ".join([metric, *(f"{k} {v:.3g}" for k, v in setting.items())]),
                    metric_args=setting,
                )  # fmt: skip


def with_times(text: str, times: list[dict[str, Any]]) -> str:
    """The card with the measured times of `bench`, and their machines, in the place that it keeps for them."""
    machines = sorted({f"{row.get('processor') or 'an unknown machine'}, {row['threads']} threads" for row in times})
    section = ""
    if times:
        section = (
            f"## Measured time\n\nMedians of `d2dmoe bench`, quartiles in brackets, on {'; '.join(machines)}. `x` is "
            f"the speed-up over the dense model.\n\n{bench_table(times)}\n"
        )
    return re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{section}{END}", text, count=1, flags=re.DOTALL)
