"""Figures for people and for programs: Markdown tables, the common JSON form, the model card."""

from __future__ import annotations

import json
import os
import platform
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData

from .config import UserError

PLOT_SUFFIXES = (".png", ".svg", ".pdf")
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


def portable(text: Any) -> Any:
    """A value or command-line word for the record: of a path on this machine only its last part stays.

    Hub ids and paths relative to the working folder say nothing about the machine and stay whole.
    """
    if not isinstance(text, str):
        return text
    flag, equals, value = text.partition("=") if text.startswith("--") else ("", "", text)
    if Path(value).is_absolute() or value.startswith("~") or ".." in Path(value).parts:
        value = Path(os.path.abspath(value)).name
    return flag + equals + value


def envelope(command: list[str], seed: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The form that every `--json` file has."""
    from . import __version__

    command = [portable(word) for word in command]
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
    metric, further = rows[0]["metric"]["name"], list(rows[0].get("metrics", {}))
    body = [
        [
            *(row[k] for k in EVAL_COLUMNS.values()), row["metric"]["value"], row["dense"]["value"],
            *(row["metrics"][name] for name in further),
        ]
        for row in rows
    ]  # fmt: skip
    return table([*EVAL_COLUMNS, metric, f"dense {metric}", *further], body)


def compare_table(rows: list[dict[str, Any]]) -> str:
    """Rows of several models: one line per setting of the gate, one column per model, FLOPs fraction in brackets."""
    columns = _short_names(list(dict.fromkeys(row["model"] for row in rows)))
    cells: dict[tuple[str, float], dict[str, str]] = {}
    for row in rows:
        dense = row["active_fraction"] == 1
        asked = ("tau", row["tau"]) if "active" not in row and not dense else ("active", row.get("active", 1.0))
        figure = f"{row['metric']['value']:.4g} ({row['flops_fraction_model']:.3f})"
        cells.setdefault(asked, {})[row["model"]] = figure
    body = [
        [f"{kind} {value:g}", *(line.get(model, "") for model in columns)]
        for (kind, value), line in sorted(cells.items())
    ]
    return table([f"{rows[0]['metric']['name']} (model FLOPs)", *columns.values()], body)


def _short_names(models: list[str]) -> dict[str, str]:
    """Last parts of paths where they differ."""
    short = [Path(model).name for model in models]
    return dict(zip(models, short if len({*short}) == len(models) else models, strict=True))


def check_plot(path: str | Path) -> None:
    """Before any long work: can a plot be drawn?

    Raises:
        UserError: If matplotlib is missing or the file's suffix is none it knows.
    """
    if find_spec("matplotlib") is None:
        raise UserError(f"--plot {path}: matplotlib is not installed; pip install 'd2dmoe-toolkit[plot]'")
    if Path(path).suffix not in PLOT_SUFFIXES:
        raise UserError(f"--plot {path}: the name must end in one of {', '.join(PLOT_SUFFIXES)}")


def plot_curves(rows: list[dict[str, Any]], path: str | Path) -> None:
    """Draw quality against the whole-model FLOPs fraction: a line per model, its dense quality dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for model, name in _short_names(list(dict.fromkeys(row["model"] for row in rows))).items():
        mine = [row for row in rows if row["model"] == model]
        points = sorted((row["flops_fraction_model"], row["metric"]["value"]) for row in mine)
        (line,) = axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.axhline(mine[0]["dense"]["value"], color=line.get_color(), linestyle="--", linewidth=1)
    metric = rows[0]["metric"]["name"]
    if metric in ("perplexity", "masked_lm"):
        axes.set_yscale("log")
    axes.set(xlabel="FLOPs of the whole model, relative to dense", ylabel=metric, title="dashed: dense")
    axes.grid(alpha=0.3)
    axes.legend()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def bench_table(rows: list[dict[str, Any]]) -> str:
    """Rows of `bench`: medians in ms with quartiles; `x` is the faster of dense eager and compiled over `sparse`."""
    names = list(dict.fromkeys(name for row in rows for name in row["ms"]))
    quality = next((row["metric"]["name"] for row in rows if "metric" in row), None)
    extra = {"dispatched_speedup": "dispatched x", "way": "way"}
    extra = {key: title for key, title in extra.items() if any(row.get(key) for row in rows)}
    header = ["phase", "dtype", "tokens", "active", *(f"{n} ms" for n in names), "x", "ideal x", *extra.values()]
    body = []
    for row in rows:
        cells = [f"{row['ms'][n]:.3g} ({_range(row['quartiles_ms'][n])})" if n in row["ms"] else "" for n in names]
        line = [row["phase"], row["dtype"], row["tokens"], row["active_fraction"], *cells, row["speedup"], row["ideal"]]
        line += [row.get(key) or "" for key in extra]
        body.append(line + ([row["metric"]["value"] if "metric" in row else ""] if quality else []))
    return table(header + ([quality] if quality else []), body)


def _range(ends: list[float]) -> str:
    return "–".join(f"{end:.3g}" for end in ends)


def recorded_quality(folder: str | Path, active: float) -> dict[str, Any]:
    """What `convert` has measured at a budget, `{"metric": …, "dense": …}`; nothing if it has not."""
    path = Path(folder) / "results.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    found = [row for row in rows if abs(row.get("active", row["active_fraction"]) - active) < 1e-6]
    return {key: found[0][key] for key in ("metric", "dense")} if found else {}


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
    """The `AutoModel…` that opens checkpoints of this class: that of its task, `PreTraining` only where it has none."""
    from transformers.models.auto import modeling_auto

    found = []
    for name in dir(modeling_auto):
        mapping = getattr(getattr(modeling_auto, name), "_model_mapping", None)
        if name.startswith("AutoModelFor") and mapping is not None and kind.__name__ in mapping._model_mapping.values():
            found.append(name)
    return min(found, key=lambda name: name == "AutoModelForPreTraining", default="AutoModel")
