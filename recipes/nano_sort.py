"""A model that comes without a tokenizer: calibrate on token ids, then count what it still gets exactly right.

    python recipes/nano_sort.py data runs/sort.jsonl
    d2dmoe convert --model ../shared/data/models/gpt-nano-sort --data runs/sort.jsonl --output-dir runs/nano-sort
    python recipes/nano_sort.py count runs/nano-sort

The model sorts six digits out of {0, 1, 2}: it reads them and writes them in order, greedily.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import d2dmoe

LENGTH = 6


def questions() -> list[tuple[int, ...]]:
    """All 729 inputs."""
    return list(itertools.product(range(3), repeat=LENGTH))


def write_data(path: Path) -> None:
    """Every input with its answer, in a fixed random order, as rows of token ids."""
    rows = [{"input_ids": [*q, *sorted(q)][:-1]} for q in questions()]
    random.Random(0).shuffle(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{len(rows)} rows in {path}")


@torch.no_grad()
def count(model: torch.nn.Module) -> int:
    """How many of the 729 inputs are sorted exactly."""
    ids = torch.tensor(questions())
    for _ in range(LENGTH):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return int((ids[:, LENGTH:] == ids[:, :LENGTH].sort(dim=1).values).all(1).sum())


def main() -> None:
    """`data FILE` or `count FOLDER`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("data", "count"))
    parser.add_argument("path", type=Path)
    arguments = parser.parse_args()
    if arguments.what == "data":
        write_data(arguments.path)
        return
    model = AutoModelForCausalLM.from_pretrained(arguments.path)
    stored = [budget.active for budget in model.config.quantization_config.d2dmoe.budgets]
    for active in [1.0, *reversed(stored)]:
        with d2dmoe.set_gate(model, active=active):
            print(f"active {active:g}: {count(model)} of {len(questions())} sorted")


if __name__ == "__main__":
    main()
