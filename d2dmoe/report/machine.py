"""The machine that made the figures, and their JSON form."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

from ..files import write_text
from ..kernels.decisions import processor
from ..version import __version__


def machine() -> dict[str, Any]:
    """The machine and versions that made the figures, without names or paths."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def portable(text: Any) -> Any:
    """A value or command-line word without the paths of this machine: only the last part of such a path stays.

    Hub ids and paths inside the working folder stay whole.
    """
    if not isinstance(text, str):
        return text
    flag, equals, value = text.partition("=") if text.startswith("--") else ("", "", text)
    if "," in value and not Path(value).exists():  # several sources of data
        return flag + equals + ",".join(map(portable, value.split(",")))
    if Path(value).is_absolute() or value.startswith("~") or ".." in Path(value).parts:
        value = Path(os.path.abspath(value)).name
    return flag + equals + value


def envelope(command: list[str], seed: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The form that every `--json` file has."""
    command = [portable(word) for word in command]
    return {"d2dmoe": __version__, "command": command, "machine": machine(), "seed": seed, "rows": rows}


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Write under a temporary name and rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=1) + "\n")


def recorded_quality(folder: str | Path, active: float) -> dict[str, Any]:
    """The quality that `convert` has recorded for a budget, `{"metric": …, "dense": …}`; empty if there is none."""
    path = Path(folder) / "results.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    found = [row for row in rows if abs(row.get("active", row["active_fraction"]) - active) < 1e-6]
    return {key: found[0][key] for key in ("metric", "dense")} if found else {}
