"""`report.html`: one self-contained page on a conversion, or on several side by side."""

from __future__ import annotations

import statistics
from itertools import takewhile
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..config.projections import Projection, ProjectionState
from ..config.record import D2DMoEConfig
from ..errors import UserError
from ..files import write_text
from ..quality import loss_unit, quality_loss
from .card_sections import with_times
from .conversions import TIMES, USAGE, Conversion, check_comparable, percent, read_conversion
from .pictures import as_svg, can_draw, draw, labels, save_png

PAGE, EXTRA = "report.html", "pip install d2dmoe-toolkit[plot]"
LEVELS = 10  # shades of a token
Table = dict[str, Any]  # {"header": [text], "rows": [[text]]}


def write_report(
    paths: list[str | Path], output: Path, *, name: str | None = None, pictures: bool | None = None
) -> list[Path]:
    """Write the page, and its figures as PNG files into a folder of its name beside it.

    Args:
        paths: Converted folders; the figures of several stand side by side.
        output: The page to write.
        name: What to call the only folder, instead of its own name.
        pictures: Draw figures; by default where matplotlib is installed.

    Returns:
        The files written, the page first.

    Raises:
        UserError: If a folder is no conversion, is damaged, or they cannot be compared.
    """
    conversions = [read_conversion(path, name if len(paths) == 1 else None) for path in paths]
    check_comparable(conversions)
    output.parent.mkdir(parents=True, exist_ok=True)
    figures, files = [], [output]
    for key, title, figure in draw(conversions) if (can_draw() if pictures is None else pictures) else ():
        figures.append({"key": key, "title": title, "svg": Markup(as_svg(figure, key, title))})
        files.append(output.with_suffix("") / f"{key}.png")
        save_png(figure, files[-1])
    write_text(output, render(conversions, figures))
    return files


def refresh_card(folder: str | Path) -> None:
    """Put the times that `bench` measured, if any, into the folder's model card."""
    card = Path(folder) / "README.md"
    if card.is_file():
        text = card.read_text(encoding="utf-8")
        changed = with_times(text, read_conversion(folder).times)
        if changed != text:
            write_text(card, changed)


def render(conversions: list[Conversion], figures: list[dict[str, Any]]) -> str:
    """The page as HTML. Everything but the figures is escaped."""
    environment = Environment(
        loader=PackageLoader(__package__, "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    only = conversions[0] if len(conversions) == 1 else None
    return environment.get_template("report.html.j2").render(
        title=only.title if only else f"{len(conversions)} conversions", conversions=[_facts(c) for c in conversions],
        figures=figures, budgets=budget_table(conversions), drift=drift_table(conversions),
        times=time_table(conversions), layers=layer_table(only) if only else None,
        projections=projection_table(only) if only else None,
        samples=_samples(only) if only else [], missing=_missing(conversions, bool(figures)),
        notes=_notes(conversions), several=only is None,
    )  # fmt: skip


def _number(value: float) -> str:
    return f"{value:.4g}"


def _facts(conversion: Conversion) -> dict[str, Any]:
    """The head of the page: what was converted, on what, where and when."""
    recipe, results, machine = conversion.recipe, conversion.results, conversion.results.get("machine", {})
    unknown = "unknown"
    threads = machine.get("threads", "unknown")
    where = [machine.get("processor"), machine.get("gpu"), f"{threads} thread{'s' * (threads != 1)}"]
    facts = {
        "model": conversion.name, "base": recipe.get("model", unknown), "data": recipe.get("data", unknown),
        "second text": recipe.get("also_eval"), "preset": recipe.get("preset", unknown),
        "blocks": _blocks(conversion), "machine": ", ".join(filter(None, where)),
        "versions": f"d2dmoe {results.get('d2dmoe', unknown)}, torch {machine.get('torch', unknown)}, "
        f"transformers {machine.get('transformers', unknown)}",
        "date": str(results.get("date", unknown)).replace("T", " ").replace("+00:00", " UTC"),
    }  # fmt: skip
    command = " ".join(map(str, results.get("command", []))) or unknown
    return {"facts": {k: v for k, v in facts.items() if v}, "command": command, "title": conversion.title}


def _blocks(conversion: Conversion) -> str | None:
    blocks = conversion.record.get("blocks", [])
    experts = "/".join(map(str, sorted({block["experts"] for block in blocks})))
    return f"{len(blocks)} feed-forward blocks of {experts} experts" if blocks else None


def budget_table(conversions: list[Conversion]) -> Table | None:
    """Every row of every conversion: cost, quality and what it lost, and time where it was measured."""
    metric = conversions[0].metric
    if metric is None:
        return None
    timed = any(c.times for c in conversions)
    header = ["asked", "active", "FFN FLOPs", "model FLOPs", metric, f"dense {metric}",
              f"loss increase ({loss_unit(metric)})", "ms/token", *(["measured time"] if timed else [])]  # fmt: skip
    body = []
    for conversion, label in labels(conversions):
        for row in conversion.rows:
            cells = [
                conversion.asked(row), *(_number(row[k]) for k in ("active_fraction", "flops_fraction_ffn",
                "flops_fraction_model")), _number(row["metric"]["value"]), _number(row["dense"]["value"]),
                _number(quality_loss(row)), _number(row["ms_per_token"]) if "ms_per_token" in row else "",
            ]  # fmt: skip
            cells += [_shortest(conversion, row)] if timed else []
            body.append([label, *cells] if len(conversions) > 1 else cells)
    return {"header": ["conversion"] * (len(conversions) > 1) + header, "rows": body}


def _shortest(conversion: Conversion, row: dict[str, Any]) -> str:
    """The time of a budget in the first thing that `bench` timed."""
    found = next((t for t in conversion.times if t["active"] == row.get("active")), None)
    if found is None:
        return ""
    return f"{_number(found['sparse_ms'])} ms, {found['dense_ms'] / found['sparse_ms']:.2f}×"


def time_table(conversions: list[Conversion]) -> Table | None:
    """All rows of `bench`, with their machines."""
    body = []
    for conversion, label in labels(conversions):
        for t in conversion.times:
            cells = [t["phase"], str(t["batch"]), str(t["context"]), f"{t['active']:g}", _number(t["sparse_ms"]),
                     _number(t["dense_ms"]), f"{t['dense_ms'] / t['sparse_ms']:.2f}", str(t["threads"]),
                     t.get("dtype", ""), t.get("processor") or "unknown"]  # fmt: skip
            body.append([label, *cells] if len(conversions) > 1 else cells)
    header = ["phase", "batch", "context", "budget", "ms", "dense ms", "speed-up", "threads", "dtype", "machine"]
    return {"header": ["conversion"] * (len(conversions) > 1) + header, "rows": body} if body else None


def drift_table(conversions: list[Conversion]) -> Table | None:
    """Active fraction and loss of every budget on the evaluation data and on a second text."""
    body = []
    for conversion, label in labels(conversions):
        for row in conversion.rows:
            if other := row.get("drift"):
                cells = [
                    conversion.asked(row), other["data"], _number(row["active_fraction"]),
                    _number(other["active_fraction"]), _number(row["metric"]["value"]),
                    _number(other["metric"]["value"]), _number(other["dense"]["value"]), _number(quality_loss(row)),
                    _number(quality_loss(other)),
                ]  # fmt: skip
                body.append([label, *cells] if len(conversions) > 1 else cells)
    metric = conversions[0].metric
    header = ["asked", "second text", "active", "active there", metric, f"{metric} there", f"dense {metric} there",
              "loss increase", "loss increase there"]  # fmt: skip
    return {"header": ["conversion"] * (len(conversions) > 1) + header, "rows": body} if body else None


def layer_table(conversion: Conversion) -> Table | None:
    """Each layer's active fraction and number of experts per token, budget by budget."""
    usage = conversion.usage
    if not usage or not usage["budgets"]:
        return None
    blocks, prefix = _shortened(usage["blocks"])
    header = [f"block in {prefix}" if prefix else "block", "experts"]
    for budget in usage["budgets"]:
        header += [f"active at {percent(budget['active'])}", "k, 5–50–95 %", "experts used by no token"]
    body = []
    for number, block in enumerate(blocks):
        cells = [block, str(usage["budgets"][0]["layers"][number]["experts"])]
        for budget in usage["budgets"]:
            layer = budget["layers"][number]
            if "active" in layer:
                ks = "–".join(str(_quantile(layer["k"], share) * layer["k_step"]) for share in (0.05, 0.5, 0.95))
                cells += [_number(layer["active"]), ks, str(sum(share == 0 for share in layer["usage"]))]
            else:
                cells += ["did not run", "", ""]
        body.append(cells)
    return {"header": header, "rows": body}


def projection_table(conversion: Conversion) -> Table | None:
    """What each projection around attention and the head do, budget by budget; shares are of their own dense work."""
    try:
        record = D2DMoEConfig.from_dict(conversion.record) if conversion.record else None
    except UserError:  # a page of a damaged folder does without
        return None
    if record is None or not record.projections or not record.budgets:
        return None
    names, prefix = _shortened([p.name for p in record.projections])
    header = [f"projection in {prefix}" if prefix else "projection"]
    header += [f"at {percent(budget.active)}" for budget in record.budgets]
    states = [budget.projection_states for budget in record.budgets]
    rows = enumerate(zip(names, record.projections, strict=True))
    return {
        "header": header,
        "rows": [[name, *(_what_it_does(p, each[n]) for each in states)] for n, (name, p) in rows],
    }


def _shortened(names: list[str]) -> tuple[list[str], str]:
    """Module paths without the beginning that they share, and this beginning: a phone has room for little more."""
    parts = [name.split(".") for name in names]
    alike = takewhile(lambda level: len(set(level)) == 1, zip(*(path[:-1] for path in parts), strict=False))
    shared = len(list(alike)) if len(names) > 1 else 0
    return [".".join(path[shared:]) for path in parts], ".".join(parts[0][:shared]) if shared else ""


def _what_it_does(projection: Projection, state: ProjectionState) -> str:
    ranks = "+".join(map(str, state.ranks))
    if state.method == "low-rank":
        return f"rank {ranks} ({projection.factored_macs(state.ranks) / projection.macs:.0%})"
    if state.method == "heads":
        kept, all_of_them = sum(state.ranks), sum(projection.head_widths)
        share = projection.head_macs(state.ranks) / projection.macs
        return f"{kept} of {all_of_them} columns in {len(state.ranks)} heads ({share:.0%})"
    if state.method == "svd-softmax":
        work = projection.factored_macs(state.ranks, state.candidates) / projection.macs
        return f"rank {ranks}, {state.candidates} exact outputs ({work:.0%})"
    return state.method + (f", rank {ranks} for the rest" if ranks else "")


def _quantile(counts: list[int], share: float) -> int:
    """The first place up to which this share of the counts lies."""
    total, wanted = 0, share * sum(counts)
    for place, count in enumerate(counts):
        total += count
        if total >= wanted:
            return place
    return len(counts) - 1


def _samples(conversion: Conversion) -> list[dict[str, Any]]:
    """Per budget the sample texts, each token with its share of experts and the shade for it."""
    texts = [s for s in (conversion.usage or {}).get("samples", []) if "pieces" in s]
    found = []
    for active in sorted({active for text in texts for active, _ in text["active"]}):
        mine = [(text["pieces"], shares) for text in texts for a, shares in text["active"] if a == active]
        every = sorted(share for _, shares in mine for share in shares)
        low, high = every[len(every) // 20], every[-1 - len(every) // 20]
        span = max(high - low, 1e-9)
        shade = lambda share, low=low, span=span: max(0, min(LEVELS - 1, int((share - low) / span * LEVELS)))  # noqa: E731
        found.append({
            "active": percent(active), "low": f"{low:.0%}", "high": f"{high:.0%}",
            "mean": _number(statistics.mean(every)),
            "texts": [[{"text": piece, "share": f"{share:.0%}", "shade": shade(share)}
                       for piece, share in zip(pieces, shares, strict=True)] for pieces, shares in mine],
        })  # fmt: skip
    return found


def _missing(conversions: list[Conversion], drawn: bool) -> list[str]:
    """What the page could show as well, and the way there."""
    found = []
    if not drawn and not can_draw():
        found.append(f"Pictures need matplotlib: {EXTRA}, then d2dmoe report DIR.")
    for conversion, label in labels(conversions):
        if conversion.metric is None:
            found.append(f"{label}: nothing was evaluated (--eval-tokens 0), so there is no quality.")
        if conversion.usage is None and len(conversions) == 1:
            found.append(
                f"{label}: there is no {USAGE}, so experts, layers and samples are missing; convert writes it."
            )
        if not conversion.times:
            found.append(
                f"{label}: no measured times. d2dmoe bench --model DIR --json DIR/{TIMES.replace('*', '')} writes "
                f"them, and d2dmoe report DIR adds them."
            )
        if not conversion.recipe:
            found.append(f"{label}: there is no recipe.yaml, so base and data are unknown.")
    return found


def _notes(conversions: list[Conversion]) -> list[str]:
    """What to bear in mind where several conversions stand side by side."""
    found = []
    for key, text in (("model", "They come from different models."), ("data", "They were measured on different data.")):
        if len({str(c.recipe.get(key)) for c in conversions}) > 1:
            found.append(text)
    return found
