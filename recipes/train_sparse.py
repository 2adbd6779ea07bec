"""Run the trainings of a YAML file, one folder for each name and seed; what is there already is not made again.

    python recipes/train_sparse.py --config recipes/sparsity.yaml --seeds 0,1,2

`recipes/compare.py` with the same file then converts what this has trained and prints the table of quality.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import transformers
import yaml
from compare import places

from d2dmoe.errors import UserError
from d2dmoe.pipeline.sparsify import sparsify
from d2dmoe.report import table
from d2dmoe.sparsify.options import resolve_sparsify


def trainings(content: dict[str, Any], seeds: list[int], only: list[str] | None = None) -> list[tuple[str, int, dict]]:
    """`(name, seed, keys of d2dmoe sparsify)` of every training, seed by seed.

    Raises:
        UserError: If a key of it has a value that is not allowed.
    """
    found = []
    for seed in seeds:
        for name, keys in content["sparsify"].items():
            if only and name not in only:
                continue
            own = {**content.get("training", {}), **keys}
            filled = {k: v.format(**places(), seed=seed) if isinstance(v, str) else v for k, v in own.items()}
            filled |= {"seed": seed, "output_dir": f"{content['folder']}/{name}-{seed}"}
            resolve_sparsify(filled)
            found.append((name, seed, filled))
    return found


def run(name: str, seed: int, keys: dict[str, Any]) -> dict[str, Any]:
    """The figures of one training, made now or read from its folder."""
    results = Path(keys["output_dir"], "results.json")
    if not results.exists():
        config, training = resolve_sparsify(keys)
        resume = Path(f"{config.output_dir}.partial").exists()
        sparsify(config, training, resume=resume, say=lambda text: print(text, file=sys.stderr, flush=True))
    return {"name": name, "seed": seed, **json.loads(results.read_text())}


def summarise(done: list[dict[str, Any]]) -> str:
    """Markdown: before and after each training."""
    rows = []
    for entry in done:
        before, after = entry["rows"]
        figures = [f"{row[key]:.4f}" for row in (before, after) for key in ("nonzero", "near_zero")]
        quality = [f"{row['metric']['value']:.4f}" for row in (before, after)]
        rows.append([entry["name"], entry["seed"], *quality, *figures, entry["minutes"]])
    metric = done[0]["rows"][0]["metric"]["name"]
    shares = ["non-zero before", "near zero before", "non-zero after", "near zero after"]
    return table(["training", "seed", f"{metric} before", f"{metric} after", *shares, "minutes"], rows)


def main(argv: list[str] | None = None) -> int:
    """Train what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--only", help="names of trainings in it, comma separated")
    parser.add_argument("--seeds", help="comma separated (default: those of the file)")
    arguments = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    content = yaml.safe_load(arguments.config.read_text())
    seeds = [int(s) for s in arguments.seeds.split(",")] if arguments.seeds else content["seeds"]
    try:
        only = arguments.only.split(",") if arguments.only else None
        print(summarise([run(*training) for training in trainings(content, seeds, only)]))
    except UserError as error:
        print(f"train_sparse.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
