"""Figures for people and for programs: Markdown tables, the common JSON form, the model card."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData

EVAL_COLUMNS = {
    "active": "active_fraction",
    "FFN FLOPs": "flops_fraction_ffn",
    "model FLOPs": "flops_fraction_model",
    "ms/token": "ms_per_token",
}


def machine() -> dict[str, Any]:
    """What the figures were made on; no names or paths."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def envelope(command: list[str], seed: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The form that every `--json` file has."""
    from . import __version__

    return {"d2dmoe": __version__, "command": command, "machine": machine(), "seed": seed, "rows": rows}


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Write under a temporary name and rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(scratch, path)


def table(header: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table; floats to four significant digits."""
    cells = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row] for row in rows]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in cells)])


def eval_table(rows: list[dict[str, Any]]) -> str:
    """Rows of `evaluate`: quality beside what it costs. One multiply-accumulate is two FLOPs."""
    if not rows:
        return "(no figures: nothing was evaluated)"
    metric = rows[0]["metric"]["name"]
    body = [[*(row[k] for k in EVAL_COLUMNS.values()), row["metric"]["value"], row["dense"]["value"]] for row in rows]
    return table([*EVAL_COLUMNS, metric, f"dense {metric}"], body)


def list_table(rows: list[dict[str, Any]]) -> str:
    """Rows of `list`, repeated layers folded into one line."""
    folded: dict[tuple, list[Any]] = {}
    for row in rows:
        pattern = ".".join("*" if part.isdigit() else part for part in row["name"].split("."))
        key = (pattern, row["kind"], row["activation"], row["d_model"], row["width"], row["converted"], row["why"])
        folded.setdefault(key, [0, row["divisors"], row["name"]])[0] += 1
    body = [
        [name if count == 1 else pattern, count, kind, activation or "", f"{inputs}->{width}",
         "yes" if converted else "no", why or "divisors " + _some(divs)]
        for (pattern, kind, activation, inputs, width, converted, why), (count, divs, name) in folded.items()
    ]  # fmt: skip
    return table(["module", "count", "kind", "activation", "size", "converted", "why / expert counts"], body)


def _some(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers if len(numbers) <= 16 else [*numbers[:8], "…", *numbers[-4:]]))


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
measured. This version computes every expert before it masks the skipped ones: the FLOPs are those that a sparse kernel
would spend, the times are not.

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
        data=recipe["data"] if recipe["data"] == "builtin" else Path(recipe["data"]).name,
        processor=results["machine"]["processor"], threads=results["machine"]["threads"],
        table=eval_table(results["rows"]), command=" ".join(results["command"]),
    )  # fmt: skip
    return str(ModelCard(text))


def auto_class(kind: type) -> str:
    """The `AutoModel…` that opens checkpoints of this class."""
    from transformers.models.auto import modeling_auto

    for name in dir(modeling_auto):
        mapping = getattr(getattr(modeling_auto, name), "_model_mapping", None)
        if name.startswith("AutoModelFor") and mapping is not None and kind.__name__ in mapping._model_mapping.values():
            return name
    return "AutoModel"
