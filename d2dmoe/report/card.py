"""The READMEs of checkpoints: text from a template, figures as a table and as metadata that the hub reads."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..config.options import heals_everything
from ..config.projections import HEAD
from .tables import eval_table

Figure = tuple[str, float, dict[str, Any]]  # a metric, its value and the setting it belongs to
CARD = """---
{{ card_data }}
---

# {{ name }}

`{{ base }}` as a dynamic-k Mixture-of-Experts: {{ blocks }} of {{ experts }} experts each, of which
a router picks as many as a token needs. Made by [d2dmoe](https://arxiv.org/abs/2310.04361) {{ version }}, preset
`{{ preset }}`, split `{{ split }}`, gate `{{ gate }}`, skipped experts replaced by `{{ stand_in }}`.{{ linear_maps }}

## Use

```python
import d2dmoe                      # registers the loader
from transformers import {{ auto }}

model = {{ auto }}.from_pretrained("path/to/this/folder")
d2dmoe.set_gate(model, active=0.5)   # stored budgets: {{ budgets }}; 1 is {{ everything }}
```

{{ without }}

## Figures

On the held-out part of `{{ data }}`. One multiply-accumulate is two FLOPs; routers, gates and stand-ins are counted,
padding is not. Times are whole forward passes on {{ processor }}, {{ threads }} threads.

{{ table }}

Command: `{{ command }}`

## Limits

The routers were trained on `{{ data }}`; on text unlike it they choose less well. Figures other than those above were
not measured. The times were measured with what `d2dmoe env` calls live there; without the CPU kernels every expert is
computed and no time is saved.

## Citation

Szatkowski et al., *Exploiting Activation Sparsity with Dense to Dynamic-k Mixture-of-Experts Conversion*, NeurIPS 2024,
arXiv 2310.04361.
"""


# What `active=1` is, and how the folder opens without d2dmoe: of a checkpoint that holds the dense model, or does not.
TWIN = {
    "everything": "exactly the dense model",
    "without": "Without `import d2dmoe` the same folder opens as the dense model, its neurons in another order.",
}
TRAINED_TWIN = {
    "everything": "the dense model as this conversion has trained it",
    "without": "Without `import d2dmoe` the same folder opens as that dense model, its neurons in another order. It\n"
    'is not `{base}` any more: {trained}. "Dense" in the figures is {compared}.',
}
NO_TWIN = {
    "everything": "everything that this model has, and not the dense model",
    "without": "Networks of two layers, distilled from the projections around attention, stand in their places\n"
    "(`--attention mlp`), so this folder holds no dense model. Without `import d2dmoe` it does not open:\n"
    "`transformers` finds tensors of other sizes than it expects, and says so.",
}


def model_card(model: Any, recipe: dict[str, Any], results: dict[str, Any], origin: dict[str, Any]) -> str:
    """The README of a converted checkpoint."""
    stored = model.config.quantization_config.d2dmoe
    networks = len(stored.networks)
    blocks = f"{len(stored.blocks) - networks} feed-forward blocks"
    blocks += f" and {networks} networks in the places of projections around attention," * bool(networks)
    return fill_card(
        CARD, type(model), recipe, results, origin, ["mixture-of-experts", "dynamic-k"],
        list(converted_figures(results["rows"])),
        blocks=blocks, experts="/".join(map(str, sorted({b.experts for b in stored.blocks}))),
        preset=recipe["preset"], split=recipe["split"], gate=recipe["gate"], stand_in=recipe["stand_in"],
        budgets=", ".join(f"{b.active:g}" for b in stored.budgets) or "none",
        processor=results["machine"]["processor"], threads=results["machine"]["threads"],
        linear_maps=_linear_maps(stored), table=eval_table(results["rows"]), **_twin(recipe, bool(networks)),
    )  # fmt: skip


def _twin(recipe: dict[str, Any], networks: bool) -> dict[str, str]:
    """What the card says of the dense model in a checkpoint."""
    if networks:
        return NO_TWIN
    tuned = recipe.get("sparsify", "skip") != "skip"
    done = [f"fine-tuned first (`--sparsify {recipe['sparsify']}`)"] if tuned else []
    done += ["healed in all its weights"] * heals_everything(recipe)
    if not done:
        return TWIN
    compared = "the one that was fine-tuned" if tuned else "the one before healing"
    words = {"base": _shown(recipe["model"]), "trained": "it was " + " and ".join(done), "compared": compared}
    return {key: text.format(**words) for key, text in TRAINED_TWIN.items()}


def _linear_maps(stored: Any) -> str:
    """A sentence about projections and head, where they are converted."""
    heads = sum(projection.role == HEAD for projection in stored.projections)
    around = len(stored.projections) - heads
    named = " and ".join([f"{around} projections around attention"] * bool(around) + ["the head"] * bool(heads))
    ways = sorted({method for budget in stored.budgets for method in budget.methods} - {"dense"})
    if not named or not ways:
        return ""
    return f"\nBelow `active=1`, {named} run with a part of their work ({', '.join(ways)})."


def converted_figures(rows: list[dict[str, Any]]) -> Iterator[Figure]:
    """Every metric of rows of `evaluate`, with the share of experts and of FLOPs that it took."""
    for row in rows:
        setting = {key: row[key] for key in ("active_fraction", "flops_fraction_model")}
        for name, value in {row["metric"]["name"]: row["metric"]["value"], **row["metrics"]}.items():
            yield name, value, setting


def fill_card(
    template: str, kind: type, recipe: dict[str, Any], results: dict[str, Any], origin: dict[str, Any],
    tags: list[str], figures: list[Figure], **words: Any,
) -> str:  # fmt: skip
    """Fill the template of a README.

    Args:
        template: Jinja text that begins with `card_data`, the metadata.
        kind: The model's class.
        recipe: What was asked for.
        results: The contents of `results.json`.
        origin: Metadata that the card of the model it was made from states, and this one keeps.
        tags: Further tags for the hub.
        figures: What becomes `model-index` in the metadata; none that are not finite.
        words: What the template names besides `name`, `base`, `data`, `auto`, `version` and `command`.
    """
    base, data, name = str(recipe["model"]), _shown(str(recipe["data"])), Path(str(recipe["output_dir"])).name
    auto = auto_class(kind)
    found = [
        EvalResult(
            task_type=_task(auto), dataset_type=data, dataset_name=data, dataset_split="held out", metric_type=metric,
            metric_value=value, metric_name=", ".join([metric, *(f"{k} {v:.3g}" for k, v in setting.items())]),
            metric_args=setting or None,
        )
        for metric, value, setting in figures
        if math.isfinite(value)
    ]  # fmt: skip
    metadata = ModelCardData(
        library_name="transformers", tags=["d2dmoe", *tags], model_name=name, eval_results=found or None,
        **{"pipeline_tag": _task(auto), **origin},
    )  # fmt: skip
    card = ModelCard.from_template(
        metadata, template_str=template, name=name, base=_shown(base), data=data, auto=auto,
        version=results["d2dmoe"], command=" ".join(results["command"]), **words,
    )  # fmt: skip
    return f"{card}\n"


def _shown(source: str) -> str:
    """A hub id as it is; of a path the last part; of several, separated by commas, each so."""
    if "," in source and not Path(source).exists():
        return ", ".join(map(_shown, source.split(",")))
    return Path(source).name if Path(source).exists() else source


def _task(auto: str) -> str:
    """The hub's name of the task that an `AutoModel…` class is for."""
    from transformers.pipelines import SUPPORTED_TASKS

    found = (task for task, entry in SUPPORTED_TASKS.items() if auto in {kind.__name__ for kind in entry["pt"]})
    return next(found, "feature-extraction")


def auto_class(kind: type) -> str:
    """The `AutoModel…` that opens checkpoints of this class. `AutoModelForPreTraining` only if no task has it."""
    from transformers.models.auto import modeling_auto

    found = []
    for name in dir(modeling_auto):
        mapping = getattr(getattr(modeling_auto, name), "_model_mapping", None)
        if name.startswith("AutoModelFor") and mapping is not None and kind.__name__ in mapping._model_mapping.values():
            found.append(name)
    return min(found, key=lambda name: name == "AutoModelForPreTraining", default="AutoModel")
