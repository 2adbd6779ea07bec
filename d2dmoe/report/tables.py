"""Figures as Markdown tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..quality import quality_loss

EVAL_COLUMNS = {
    "active": "active_fraction",
    "FFN FLOPs": "flops_fraction_ffn",
    "model FLOPs": "flops_fraction_model",
    "ms/token": "ms_per_token",
}


def table(header: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table; floats to four significant digits."""
    cells = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row] for row in rows]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in cells)])


ATTENTION = "flops_fraction_attention"


def eval_table(rows: list[dict[str, Any]]) -> str:
    """Rows of `evaluate`: quality and cost. One multiply-accumulate is two FLOPs."""
    if not rows:
        return "(no figures: nothing was evaluated)"
    metric, further = rows[0]["metric"]["name"], list(rows[0].get("metrics", {}))
    columns = dict(EVAL_COLUMNS)
    if any(ATTENTION in row for row in rows):  # beside the FFNs
        columns = {
            "active": columns["active"],
            "FFN FLOPs": columns["FFN FLOPs"],
            "attention FLOPs": ATTENTION,
            **columns,
        }
    dtype = rows[0].get("dtype", "float32")  # a conversion measures in that of the checkpoint, which eval opens in fp32
    if dtype != "float32":
        columns = {f"{name} in {dtype}" if name == "ms/token" else name: key for name, key in columns.items()}
    body = [
        [
            *(row.get(k, 1.0) if k == ATTENTION else row[k] for k in columns.values()),
            row["metric"]["value"], row["dense"]["value"], *(row["metrics"][name] for name in further),
        ]
        for row in rows
    ]  # fmt: skip
    return table([*columns, metric, f"dense {metric}", *further], body)


def drift_table(rows: list[dict[str, Any]]) -> str:
    """Rows of `evaluate` with an entry `drift`: active fraction and quality on the data and on the second text."""
    shown = [row for row in rows if "drift" in row]
    name, other = shown[0]["metric"]["name"], shown[0]["drift"]["data"]
    header = [text for column in ("active", name, "loss increase") for text in (column, f"{column} on {other}")]
    body = [
        [
            row["active_fraction"], row["drift"]["active_fraction"], row["metric"]["value"],
            row["drift"]["metric"]["value"], quality_loss(row), quality_loss(row["drift"]),
        ]
        for row in shown
    ]  # fmt: skip
    several = len({row.get("model") for row in shown}) > 1
    models = short_names(list(dict.fromkeys(row["model"] for row in shown))) if several else {}
    body = [[models[row["model"]], *cells] if several else cells for row, cells in zip(shown, body, strict=True)]
    return table(["model"] * several + header, body)


def compare_table(rows: list[dict[str, Any]]) -> str:
    """Rows of several models: one line per setting of the gate, one column per model, FLOPs fraction in brackets."""
    columns = short_names(list(dict.fromkeys(row["model"] for row in rows)))
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


def short_names(models: list[str]) -> dict[str, str]:
    """A short name for every model: the last part of its path, if these parts differ."""
    short = [Path(model).name for model in models]
    return dict(zip(models, short if len({*short}) == len(models) else models, strict=True))


def bench_table(rows: list[dict[str, Any]]) -> str:
    """Rows of `bench`: medians in ms with quartiles; `x` is the faster of dense eager and compiled over `sparse`."""
    names = list(dict.fromkeys(name for row in rows for name in row["ms"]))
    quality = next((row["metric"]["name"] for row in rows if "metric" in row), None)
    ratios = [f"{name}_speedup" for name in names if any(f"{name}_speedup" in row for row in rows)]
    extra = {key: f"{key.removesuffix('_speedup')} x" for key in ratios} | {"way": "way"}
    extra = {key: title for key, title in extra.items() if any(row.get(key) for row in rows)}
    header = ["phase", "dtype", "tokens", "active", *(f"{n} ms" for n in names), "x", "1 / active", *extra.values()]
    body = []
    for row in rows:
        cells = [f"{row['ms'][n]:.3g} ({_range(row['quartiles_ms'][n])})" if n in row["ms"] else "" for n in names]
        line = [row["phase"], row["dtype"], row["tokens"], row["active_fraction"], *cells, row["speedup"], row["ideal"]]
        line += [row.get(key) or "" for key in extra]
        body.append(line + ([row["metric"]["value"] if "metric" in row else ""] if quality else []))
    return table(header + ([quality] if quality else []), body)


def parts_table(rows: list[dict[str, Any]]) -> str:
    """Rows of `bench --profile`: where the milliseconds go, a line for each model."""
    names = list(dict.fromkeys(part for row in rows for parts in row["parts"].values() for part in parts))
    body, dense = [], set()
    for row in rows:
        for column, parts in row["parts"].items():
            same = (row["phase"], row["batch"], column)
            if same in dense:
                continue  # a dense model is the same at every budget
            if column == "eager" or column.startswith("dense"):
                dense.add(same)
            active = 1 if same in dense else row["active_fraction"]
            body.append([row["phase"], row["batch"], column, active, *(f"{parts[name]:.3g}" for name in names)])
    return table(["phase", "batch", "", "active", *(f"{name} ms" for name in names)], body)


def peers_table(rows: list[dict[str, Any]]) -> str:
    """Rows of `bench --rivals`: a line for each way to run the model, a table for each batch size."""
    tables = []
    for batch in dict.fromkeys(row["batch"] for row in rows):
        body = [
            [row["column"], row["active_fraction"], f"{row['ms']:.3g} ({_range(row['quartiles_ms'])})", row["speedup"],
             f"{row['close']:.4f}"]
            for row in rows if row["batch"] == batch
        ]  # fmt: skip
        header = ["", "active", "ms", "times dense", "outputs like dense"]
        tables.append(f"batch {batch}\n\n" + table(header, body))
    return "\n\n".join(tables)


def _range(ends: list[float]) -> str:
    return "–".join(f"{end:.3g}" for end in ends)


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
