"""What a model is trained for: the task its head is made for, the batches that task needs, and the checks before."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch

from .. import hub
from ..data.batches import Batches
from ..errors import UserError
from .masks import IGNORED

Collator = Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]


def possible_tasks(kind: type, config: Any, vision: bool) -> list[str]:
    """Tasks that a model class has a loss for, the natural one first; `distillation` is always possible."""
    if hub.is_classifier(kind, config):
        return ["image_classification" if vision else "classification", "distillation"]
    if hub.is_causal(kind):
        return ["causal_lm", "distillation"]
    if any(base.__name__.endswith("ForMaskedLM") for base in kind.__mro__):
        return ["masked_lm", "distillation"]
    return ["distillation"]


def choose_task(wanted: str, kind: type, config: Any, batches: Batches, processor: Any, source: str) -> str:
    """The task asked for, or the one of the model's head; `distillation` where the data lacks what the task needs.

    Raises:
        UserError: If the head does not have this task, or the data has no labels for it.
    """
    item = batches.items[0]
    possible = possible_tasks(kind, config, "image" in item)
    task = possible[0] if wanted == "auto" else wanted
    if task not in possible:
        raise UserError(f"--task {task}: a {kind.__name__} has no such head; possible here: {', '.join(possible)}")
    if task.endswith("classification") and not all("label" in i for i in batches.items):
        raise UserError(
            f"--data {source}: {'some rows have' if any('label' in i for i in batches.items) else 'it has'} no label; "
            f"name their column with --label-column, or train without labels by --task distillation"
        )
    if task == "masked_lm" and getattr(processor, "mask_token_id", None) is None:
        raise UserError("--task masked_lm: the model has no tokenizer with a mask token; use --task distillation")
    return task


class Masking:
    """Batches for masked language models. What is masked follows from the epoch and the batch alone, so that a resumed
    training masks what an uninterrupted one would have masked.

    Attributes:
        epoch: Set from outside; another one masks other tokens.
    """

    def __init__(self, tokenizer: Any, seed: int):
        from transformers import DataCollatorForLanguageModeling

        self.mask = DataCollatorForLanguageModeling(tokenizer, mlm=True, mlm_probability=0.15)
        self.seed, self.epoch = seed, 0

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Items with `input_ids` to `input_ids`, `attention_mask` and `labels`."""
        rows = [{"input_ids": item["input_ids"]} for item in items]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(repr((self.seed, self.epoch, rows)).encode()))
            return self.mask(rows)


def collator(task: str, batches: Batches, processor: Any, seed: int = 0) -> Collator:
    """Turns items of `batches` into the keyword arguments of a training step."""
    if task == "masked_lm":
        return Masking(processor, seed)

    def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = batches.collate(items)
        if task == "causal_lm":
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
        elif task == "distillation":
            batch.pop("labels", None)
        return batch

    return collate
