"""What a folder tells of a conversion: its request, its figures, its use of experts, its times."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import read_yaml
from ..quality import quality_loss

USAGE, RESULTS, TIMES = "report.json", "results.json", "bench*.json"


def percent(active: float) -> str:
    """An active fraction in per cent, exact enough to tell budgets apart: `25 %`, `33.41 %`."""
    return f"{100 * active:.4g} %"


@dataclass
class Conversion:
    """One converted folder.

    Attributes:
        name: How the page calls it.
        folder: Where it lies.
        results: The contents of `results.json`.
        recipe: What was asked for; empty if `recipe.yaml` is gone.
        record: The conversion's record in `config.json`; empty if that is gone.
        usage: The contents of `report.json`, `None` if it is not there.
        times: Rows of `bench` on this model.
    """

    name: str
    folder: Path
    results: dict[str, Any]
    recipe: dict[str, Any]
    record: dict[str, Any]
    usage: dict[str, Any] | None
    times: list[dict[str, Any]] = field(default_factory=list)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Rows of `evaluate`: a row for each stored budget, and the dense model."""
        return self.results["rows"]

    @property
    def metric(self) -> str | None:
        """Name of the metric of quality; `None` if nothing was evaluated."""
        return self.rows[0]["metric"]["name"] if self.rows else None

    @property
    def title(self) -> str:
        """The name, and that it is the paper's rule where it is."""
        return f"{self.name} (the paper's rule)" if self.recipe.get("preset") == "paper" else self.name

    def asked(self, row: dict[str, Any]) -> str:
        """The user's words for a row's budget."""
        if row.get("active", 1.0) == 1:
            networks = any(block.get("role") for block in self.record.get("blocks", []))
            return "all experts on" if networks else "dense"
        budgets = self.record.get("budgets", [])
        goals = [b.get("objective") for b in budgets if abs(b.get("active", 0) - row["active"]) < 1e-9]
        goal = next(filter(None, goals), "")
        return goal.replace("=", " ") if goal else f"active {row['active']:g}"


def read_conversion(path: str | Path, name: str | None = None) -> Conversion:
    """Read a converted folder; without `report.json` or bench results the rest is read all the same.

    Raises:
        UserError: If it is not a converted folder, or one of its files is damaged.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{path}: no such folder; give a folder that d2dmoe convert has written")
    results = _json(folder / RESULTS)
    if results is None:
        raise UserError(f"{path}: has no {RESULTS}; give a folder that d2dmoe convert has written")
    _check_results(results, path)
    record = (_json(folder / "config.json") or {}).get("quantization_config")
    record = record if isinstance(record, dict) and record.get("quant_method") == "d2dmoe" else {}
    times = [row for file in sorted(folder.glob(TIMES)) for row in _model_times(file)]
    name, usage = name or folder.resolve().name, _json(folder / USAGE)
    if usage is not None and not _is_usage(usage):
        raise UserError(
            f"{folder / USAGE}: holds other counts than those of convert; delete it to go without, or convert again"
        )
    return Conversion(name, folder, results, read_yaml(folder / "recipe.yaml"), record, usage, times)


def _is_usage(usage: dict[str, Any]) -> bool:
    """Whether the counts have the form that `collect_usage` gives them."""
    try:
        layers = [layer for budget in usage["budgets"] for layer in budget["layers"]]
        counted = [layer for layer in layers if "active" in layer]
        samples = [pair for sample in usage["samples"] for pair in sample["active"]]
        return (
            all(len(b["layers"]) == len(usage["blocks"]) and b["active"] + 0.0 for b in usage["budgets"])
            and all(isinstance(layer["experts"], int) for layer in layers)
            and all(sum(layer["usage"]) + layer["active"] >= 0 for layer in counted)
            and all(sum(layer["k"]) > 0 and layer["k_step"] > 0 for layer in counted)
            and all(len(shares) > 0 and active + 0.0 for active, shares in samples)
            and all(
                len(s["pieces"]) == len(shares) for s in usage["samples"] if "pieces" in s for _, shares in s["active"]
            )
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        return False


def _json(file: Path) -> dict[str, Any] | None:
    """A JSON object; `None` without the file."""
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({_short(error)}); copy it again from where it came from") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: is not a JSON object; copy it again from where it came from")
    return content


def _short(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error).splitlines()[0]


def _check_results(results: dict[str, Any], path: str | Path) -> None:
    """Whether these are the results of a conversion.

    Raises:
        UserError: If they are those of something else, or damaged.
    """
    rows = results.get("rows")
    if isinstance(rows, list) and any(isinstance(row, dict) and row.get("model") == "after" for row in rows):
        raise UserError(f"{path}: is a sparsified dense model; convert it first, the report is of a conversion")
    try:
        _ = results.get("machine", {}).get("processor"), [*results.get("command", [])]
        for row in rows:
            quality_loss(row), row["dense"]["value"]
            _ = [row[key] + 0.0 for key in ("active_fraction", "flops_fraction_ffn", "flops_fraction_model")]
    except (AttributeError, KeyError, LookupError, TypeError):
        raise UserError(
            f"{path}: its {RESULTS} holds other figures than those of a conversion; copy it again from where it "
            f"came from, or convert again"
        ) from None


def _model_times(file: Path) -> list[dict[str, Any]]:
    """Rows of `bench --model`; none of other files."""
    content = _json(file)
    wanted = {"phase", "batch", "context", "active", "sparse_ms", "dense_ms", "threads"}
    rows = content.get("rows") if isinstance(content.get("rows"), list) else []
    keep = [row for row in rows if isinstance(row, dict) and row.keys() >= wanted]
    return [row | {"processor": content.get("machine", {}).get("processor")} for row in keep]


def check_comparable(conversions: list[Conversion]) -> None:
    """Whether their qualities can stand in one figure.

    Raises:
        UserError: If they are not measured by the same metric.
    """
    first = conversions[0]
    for other in conversions[1:]:
        if other.metric != first.metric:
            raise UserError(
                f"{first.folder} is measured by {first.metric or 'nothing'} and {other.folder} by "
                f"{other.metric or 'nothing'}; put conversions side by side that have the same metric"
            )
