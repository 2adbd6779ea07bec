"""Rows of token ids: what is allowed in them, their padding, and rows longer than a sequence."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from typing import Any

from ..config.options import DataConfig
from ..errors import UserError
from .table import where

Item = dict[str, Any]


def checked_ids(value: Any, mask: Any, place: str) -> list[int]:
    """Token ids of a row without its padding.

    Args:
        value: The row's `input_ids`.
        mask: The row's `attention_mask`, 0 for padding; `None` if it has none.
        place: The row, for errors.

    Raises:
        UserError: If an id is no whole number from 0 on, or the mask does not fit.
    """
    if not isinstance(value, list | tuple):
        raise UserError(f"--data {place}: 'input_ids' holds {_short(value)}; give a list of token ids in each row")
    for one in value:
        if (type(one) is not int and not (isinstance(one, float) and one.is_integer())) or one < 0:
            raise UserError(f"--data {place}: 'input_ids' holds {_short(one)}; token ids are whole numbers from 0 on")
    if mask is None:
        return [int(one) for one in value]
    if not isinstance(mask, list | tuple) or len(mask) != len(value):
        raise UserError(
            f"--data {place}: 'attention_mask' holds {_short(mask)} for {len(value)} token ids; give one number per id"
        )
    for one in mask:
        if one not in (0, 1):
            raise UserError(f"--data {place}: 'attention_mask' holds {_short(one)}; it is 1 for text and 0 for padding")
    return [int(one) for one, real in zip(value, mask, strict=True) if real]


def without_padding(item: Item) -> Item:
    """The item without the positions whose `attention_mask` is 0, and without the mask."""
    rest = {k: v for k, v in item.items() if k != "attention_mask"}
    kept = zip(item["input_ids"], item["attention_mask"], strict=True)
    return {**rest, "input_ids": [int(one) for one, real in kept if real]}


def check_range(rows: Iterable[tuple[list[int], Item]], vocabulary: int | None, source: str, *, given: bool) -> None:
    """Whether the model has an embedding for every id.

    Args:
        rows: Ids, each with the document that they come from.
        vocabulary: Number of embeddings; `None` if unknown.
        source: The data, for errors.
        given: Whether the ids are data; otherwise the tokenizer made them.

    Raises:
        UserError: Naming the first document with an id out of range.
    """
    if vocabulary is None:
        return
    for ids, document in rows:
        highest = max(ids, default=0)
        if highest < vocabulary:
            continue
        place = where(document, source)
        if given:
            raise UserError(
                f"--data {place}: token id {highest} is out of range, because the model's vocabulary has {vocabulary} "
                f"tokens (0 to {vocabulary - 1}); tokenise with the model's own tokenizer"
            )
        raise UserError(
            f"--data {place}: the tokenizer gives token id {highest}, and the model's vocabulary has {vocabulary} "
            f"tokens; put the tokenizer that belongs to the model beside it"
        )


def sequences_of(documents: list[Item], config: DataConfig, vocabulary: int | None = None) -> list[Item]:
    """Documents of `input_ids` as sequences of at most `max_length` tokens.

    A longer document goes on in further sequences. One with a label is cut, because a label belongs to one sequence.

    Raises:
        UserError: If an id is out of range, or nothing is left.
    """
    rows = []
    for document in documents:
        ids = checked_ids(_listed(document["input_ids"]), _listed(document.get("attention_mask")),
                          where(document, config.data))  # fmt: skip
        rows.append((ids, document))
    check_range(rows, vocabulary, config.data, given=True)
    items, cut, size = [], 0, config.max_length
    for ids, document in rows:
        if "label" in document:
            cut += len(ids) > size
            items += [{"input_ids": ids[:size], "label": document["label"]}] if ids else []
        else:  # a remainder of one token predicts nothing
            pieces = [ids[i : i + size] for i in range(0, len(ids), size)]
            items += [{"input_ids": piece} for n, piece in enumerate(pieces) if len(piece) > 1 or not n]
    say_cut(cut, len(rows), config)
    if not items:
        raise UserError(f"--data {config.data}: every row of 'input_ids' is empty or padding; give more data")
    return items


def say_cut(cut: int, total: int, config: DataConfig) -> None:
    """Warn about labelled rows that were cut."""
    if cut:
        warnings.warn(
            f"--data {config.data}: {cut} of {total} rows with labels are longer than {config.max_length} tokens and "
            f"are cut there; a larger --max-length keeps more of them, up to the model's limit",
            stacklevel=_level_of_caller(),
        )


def _level_of_caller() -> int:
    """How far up the stack the first function outside this package is, for a warning from the function above."""
    package, frame, level = __name__.partition(".")[0], sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == package:
        frame, level = frame.f_back, level + 1
    return level


def _listed(value: Any) -> Any:
    """Tensors and arrays as lists."""
    return value.tolist() if hasattr(value, "tolist") else value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 40 else text[:37] + "..."
