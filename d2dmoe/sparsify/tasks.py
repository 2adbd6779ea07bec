"""What a model is trained for: the task its head is made for, the batches that task needs, and the checks before."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch

from .. import hub
from ..data.batches import Batches
from ..errors import UserError
from ..vocabulary import size_of, special_tokens
from .masks import IGNORED

Collator = Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]
MASKED_SHARE = 0.15


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
    if task == "masked_lm" and special_tokens(config, processor).mask_token_id is None:
        raise UserError("--task masked_lm: the model has no tokenizer with a mask token; use --task distillation")
    return task


class Masking:
    """Batches for masked language models. What is masked follows from the epoch and the batch alone, so that a resumed
    training masks what an uninterrupted one would have masked.

    Of the tokens that are not special, 15 % are to be told; four fifths of these are replaced by the mask token, and
    half of the rest by any token (Devlin et al., *BERT*, 2019, section 3.1).

    Attributes:
        epoch: Set from outside; another one masks other tokens.
    """

    def __init__(self, batches: Batches, special: Any, vocabulary: int, seed: int):
        self.batches, self.special, self.vocabulary = batches, special, vocabulary
        self.seed, self.epoch = seed, 0

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Items with `input_ids` to `input_ids`, `attention_mask` and `labels`."""
        rows = [{"input_ids": item["input_ids"]} for item in items]
        batch = self.batches.collate(rows)
        ids, seed = batch["input_ids"], zlib.crc32(repr((self.seed, self.epoch, rows)).encode())
        generator = torch.Generator().manual_seed(seed)
        chance = torch.rand(ids.shape, generator=generator)
        others = torch.randint(self.vocabulary, ids.shape, generator=generator)
        chance[torch.isin(ids, torch.tensor(self.special.all_special_ids)) | (batch["attention_mask"] == 0)] = 1
        if MASKED_SHARE <= float(chance.min()) < 1:
            chance[chance == chance.min()] = 0  # one at least, because there is no loss of none
        masked = others.where(chance < 0.9 * MASKED_SHARE, ids)
        masked = masked.masked_fill(chance < 0.8 * MASKED_SHARE, self.special.mask_token_id)
        batch["labels"] = ids.masked_fill(chance >= MASKED_SHARE, IGNORED)
        return {**batch, "input_ids": masked}


def collator(task: str, batches: Batches, processor: Any, config: Any, seed: int = 0) -> Collator:
    """Turns items of `batches` into the keyword arguments of a training step.

    Args:
        task: From `choose_task`.
        batches: The data.
        processor: The tokenizer, if there is one.
        config: The model's config, which tells the mask token where no tokenizer does.
        seed: Of what is masked.
    """
    if task == "masked_lm":
        special, size = special_tokens(config, processor), size_of(config)
        return Masking(batches, special, size or len(processor), seed)

    def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = batches.collate(items)
        if task == "causal_lm":
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
        elif task == "distillation":
            batch.pop("labels", None)
        return batch

    return collate
