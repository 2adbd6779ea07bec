"""The README of a sparsified checkpoint, and the tables of figures before and after."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..report.card import Figure, fill_card
from ..report.tables import table

OWN_QUALITY = ("perplexity", "masked_lm", "accuracy", "loss")
CARD = """---
{{ card_data }}
---

# {{ name }}

`{{ base }}` with sparser activations: fine-tuned with the `{{ regulariser }}` regulariser, α {{ alpha }}, activation
`{{ activation }}`, task `{{ task }}`. It is a dense model like the one before{{ needs }}, and made to be
converted by [d2dmoe](https://arxiv.org/abs/2310.04361) {{ version }}: `d2dmoe convert --model path/to/this/folder`.

## Use

```python
{{ imports }}from transformers import {{ auto }}

model = {{ auto }}.from_pretrained("path/to/this/folder")
```

## Figures

On the held-out part of `{{ data }}`. `nonzero` is the share of hidden activations that are not zero, `near zero` the
share that is at most 1 % of the token's largest one; means over {{ blocks }} feed-forward blocks.

{{ table }}

Command: `{{ command }}`

## Citation

Szatkowski et al., *Exploiting Activation Sparsity with Dense to Dynamic-k Mixture-of-Experts Conversion*, NeurIPS 2024,
arXiv 2310.04361.
"""


def sparsity_table(rows: list[dict[str, Any]]) -> str:
    """Quality and sparsity, one row for each of `before` and `after`."""
    shown = [row for row in rows if "metric" in row]
    if not shown:
        return "(no figures: --eval-tokens 0)"
    name = shown[0]["metric"]["name"]
    further = list(shown[0]["metrics"])
    return table(
        ["model", name, *further, "nonzero", "near zero", "tokens"],
        [
            [row["model"], f"{row['metric']['value']:.4f}", *(f"{row['metrics'][key]:.4f}" for key in further),
             f"{row['nonzero']:.4f}", f"{row['near_zero']:.4f}", row["tokens"]]
            for row in shown
        ],
    )  # fmt: skip


def sparsified_card(model: Any, recipe: dict[str, Any], results: dict[str, Any], origin: dict[str, Any]) -> str:
    """The README of a sparsified checkpoint."""
    own = recipe["activation"] == "fatrelu"
    return fill_card(
        CARD, type(model), recipe, results, origin, ["activation-sparsity"],
        list(sparsified_figures(results["rows"][-1])),
        regulariser=recipe["regulariser"], alpha=f"{recipe['alpha']:g}", activation=recipe["activation"],
        task=results["task"], needs=", except that transformers refuses its activation unless d2dmoe is imported" * own,
        imports="import d2dmoe  # registers the activation\n" * own,
        table=sparsity_table(results["rows"]), blocks=len(results["rows"][-1].get("blocks", [])) or "all",
    )  # fmt: skip


def sparsified_figures(row: dict[str, Any]) -> Iterator[Figure]:
    """Quality and sparsity of the model after training; nothing where it was not evaluated.

    Likeness to the dense model is left out: here that is the model itself.
    """
    if "metric" in row:
        quality = {row["metric"]["name"]: row["metric"]["value"], **row["metrics"]}
        for name in (*(name for name in quality if name in OWN_QUALITY), "nonzero", "near_zero"):
            yield name, quality.get(name, row.get(name)), {}
