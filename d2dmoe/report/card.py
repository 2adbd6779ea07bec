"""The checkpoint's README."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .tables import eval_table

CARD = """---
{metadata}
---

# {name}

`{base}` as a dynamic-k Mixture-of-Experts: {blocks} feed-forward blocks of {experts} experts each, of which a router
picks as many as a token needs. Made by [d2dmoe](https://arxiv.org/abs/2310.04361) {version}, preset `{preset}`, split
`{split}`, gate `{gate}`, skipped experts replaced by `{stand_in}`.

## Use

```python
import d2dmoe                      # registers the loader
from transformers import {auto}

model = {auto}.from_pretrained("path/to/this/folder")
d2dmoe.set_gate(model, active=0.5)   # stored budgets: {budgets}; 1 is exactly the dense model
```

Without `import d2dmoe` the same folder opens as the dense model, its neurons in another order.

## Figures

On the held-out part of `{data}`. One multiply-accumulate is two FLOPs; routers, gates and stand-ins are counted,
padding is not. Times are whole forward passes on {processor}, {threads} threads.

{table}

Command: `{command}`

## Limits

The routers were trained on `{data}`; on text unlike it they choose less well. Figures other than those above were not
measured. The times were measured with what `d2dmoe env` calls live there; without the CPU kernels every expert is
computed and no time is saved.

## Citation

Szatkowski et al., *Exploiting Activation Sparsity with Dense to Dynamic-k Mixture-of-Experts Conversion*, NeurIPS 2024,
arXiv 2310.04361.
"""


def model_card(model: Any, recipe: dict[str, Any], results: dict[str, Any]) -> str:
    """The checkpoint's README, with metadata that the hub accepts."""
    base = recipe["model"]
    name = Path(str(recipe["output_dir"])).name
    data = ModelCardData(
        base_model=base if "/" in base and not Path(base).exists() else None,
        library_name="transformers",
        tags=["d2dmoe", "mixture-of-experts", "dynamic-k"],
    )
    stored = model.config.quantization_config.d2dmoe
    text = CARD.format(
        metadata=data.to_yaml(), name=name, base=Path(base).name if Path(base).exists() else base,
        blocks=len(stored.blocks), experts="/".join(map(str, sorted({b.experts for b in stored.blocks}))),
        version=results["d2dmoe"], preset=recipe["preset"], split=recipe["split"], gate=recipe["gate"],
        stand_in=recipe["stand_in"], auto=auto_class(type(model)),
        budgets=", ".join(f"{b.active:g}" for b in stored.budgets) or "none",
        data=Path(recipe["data"]).name if Path(recipe["data"]).exists() else recipe["data"],
        processor=results["machine"]["processor"], threads=results["machine"]["threads"],
        table=eval_table(results["rows"]), command=" ".join(results["command"]),
    )  # fmt: skip
    return str(ModelCard(text))


def auto_class(kind: type) -> str:
    """The `AutoModel…` that opens checkpoints of this class. `AutoModelForPreTraining` only if no task has it."""
    from transformers.models.auto import modeling_auto

    found = []
    for name in dir(modeling_auto):
        mapping = getattr(getattr(modeling_auto, name), "_model_mapping", None)
        if name.startswith("AutoModelFor") and mapping is not None and kind.__name__ in mapping._model_mapping.values():
            found.append(name)
    return min(found, key=lambda name: name == "AutoModelForPreTraining", default="AutoModel")
