"""Documents as batches of tensors: tokenised, packed or padded, and addressed by number."""

from __future__ import annotations

import copy
import importlib.util
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..config.options import DataConfig
from ..errors import UserError, first_line
from .table import where
from .token_ids import check_range, say_cut, sequences_of, without_padding

Document = dict[str, Any]

LENGTH_WINDOW = 32  # batches among whose items those of one length are put together


class Batches(Sequence[dict[str, torch.Tensor]]):
    """Fixed batches of sequences or images, addressed by number.

    Token batches hold `input_ids` and `attention_mask` of shape ``(batch, length)``; image batches `pixel_values`
    ``(batch, channels, height, width)``. `labels` ``(batch,)`` where the documents have labels. An image counts as
    `image_tokens` tokens, the patches that the model makes of it.
    """

    def __init__(
        self, items: list[Document], batch_size: int, *, pad_id: int = 0, image_processor: Any = None,
        image_tokens: int = 1,
    ):  # fmt: skip
        self.items = [without_padding(item) if "attention_mask" in item else item for item in items]
        self.batch_size = batch_size
        self.pad_id, self.image_processor, self.image_tokens = pad_id, image_processor, image_tokens

    def __len__(self) -> int:
        return -(-len(self.items) // self.batch_size)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        items = self.items[number * self.batch_size : (number + 1) * self.batch_size]
        if not items:
            raise IndexError(number)
        return self.collate(items)

    def collate(self, items: list[Document]) -> dict[str, torch.Tensor]:
        """One batch of these items, padded on the right."""
        if "image" in items[0]:
            batch = {"pixel_values": self._pixels(items)}
        else:
            rows = [torch.as_tensor(item["input_ids"]) for item in items]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad_id)
            lengths = torch.tensor([len(row) for row in rows])
            batch = {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}
        if "label" in items[0]:
            batch["labels"] = torch.tensor([int(item["label"]) for item in items])
        return batch

    def _pixels(self, items: list[Document]) -> torch.Tensor:
        images = [_opened(item).convert("RGB") for item in items]
        return self.image_processor(images, return_tensors="pt")["pixel_values"]

    def shuffled(self, seed: int) -> Batches:
        """The same items in another order, in which those of a batch are of about one length, to save padding."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.items), generator=generator).tolist()
        lengths = [len(item.get("input_ids", (0,))) for item in self.items]
        window, size = LENGTH_WINDOW * self.batch_size, self.batch_size
        order = [
            i for at in range(0, len(order), window) for i in sorted(order[at : at + window], key=lengths.__getitem__)
        ]
        whole = len(order) // size
        places = torch.randperm(whole, generator=generator).tolist()
        order = [i for p in places for i in order[p * size : (p + 1) * size]] + order[whole * size :]
        return self.with_items([self.items[i] for i in order])

    def with_items(self, items: list[Document]) -> Batches:
        """Batches of other items, otherwise like these."""
        return Batches(
            items, self.batch_size, pad_id=self.pad_id, image_processor=self.image_processor,
            image_tokens=self.image_tokens,
        )  # fmt: skip

    def _length(self, item: Document) -> int:
        return len(item["input_ids"]) if "input_ids" in item else self.image_tokens

    def first(self, tokens: int) -> Batches:
        """Enough leading items to hold `tokens` tokens."""
        total, count = 0, 0
        for item in self.items:
            if total >= tokens:
                break
            total, count = total + self._length(item), count + 1
        return self.with_items(self.items[:count])

    def after(self, tokens: int) -> Batches:
        """What `first` leaves over."""
        return self.with_items(self.items[len(self.first(tokens).items) :])

    def last(self, tokens: int) -> Batches:
        """All but what leads up to the last `tokens` tokens; everything where there are no more."""
        return self.after(self.tokens - tokens) if self.tokens > tokens else self

    @property
    def longest(self) -> int:
        """Tokens of the longest item."""
        return max(map(self._length, self.items), default=0)

    @property
    def tokens(self) -> int:
        """Tokens in all items, padding left out."""
        return sum(map(self._length, self.items))


def make_batches(
    documents: list[Document],
    processor: Any,
    config: DataConfig,
    *,
    packed: bool,
    label2id: dict[str, int] | None = None,
    vocabulary: int | None = None,
    pad_id: int | None = None,
    image_tokens: int = 1,
    no_tokenizer: Callable[[], str] = lambda: "the model comes with no tokenizer",
) -> Batches:
    """Turn documents into batches with a tokenizer or an image processor.

    Args:
        documents: From `read_documents`.
        processor: Tokenizer for `text`, image processor for `image`, ignored for `input_ids`.
        config: Lengths and sizes; `config.sequences` overrides `packed` unless it is `auto`.
        packed: Join the documents and cut full sequences (for causal language models).
        label2id: Numbers of a classifier's classes; without them labels that are names are left out.
        vocabulary: Number of the model's embeddings, to check token ids by; `None` if unknown.
        pad_id: The model's padding token, by which some models find the end of a text; by default the tokenizer's.
        image_tokens: What an image counts as.
        no_tokenizer: The reason why there is no tokenizer, asked for if text needs one.

    Raises:
        UserError: If there is less text than one sequence, the processor does not fit the documents, a label is
            none of the classes, or a token id is none of the model's.
    """
    documents = _number_labels(documents, label2id, config)
    if "image" in documents[0]:
        if importlib.util.find_spec("PIL") is None:
            raise UserError(f"--data {config.data} holds images: install pillow, or d2dmoe-toolkit[vision]")
        if processor is None or not hasattr(processor, "image_mean"):
            raise UserError(f"--data {config.data} holds images, and the model comes with no image processor")
        for document in documents:
            _opened(document, config.data).close()
        return Batches(documents, config.batch_size, image_processor=processor, image_tokens=image_tokens)
    pad_id = _usable(vocabulary, pad_id, getattr(processor, "pad_token_id", None))
    if "input_ids" in documents[0]:
        return Batches(sequences_of(documents, config, vocabulary), config.batch_size, pad_id=pad_id)
    if processor is None or not callable(getattr(processor, "encode", None)):
        raise UserError(
            f"--data {config.data} is text, and {no_tokenizer()}; give data with an `input_ids` column (jsonl or "
            f"parquet), or an `image` column for a vision model"
        )
    packed = packed if config.sequences == "auto" else config.sequences == "packed"
    make = _pack if packed else _chunk
    return Batches(make(documents, processor, config, vocabulary), config.batch_size, pad_id=pad_id)


def _opened(document: Document, source: str = "") -> Any:
    """The image of a document, of which only the header is read yet.

    Raises:
        UserError: Naming the row, if there is no image in it.
    """
    from PIL import Image

    stored = document["image"]
    try:
        return Image.open(io.BytesIO(stored["bytes"]) if stored.get("bytes") else stored["path"])
    except OSError as error:
        shown = "no PNG or JPEG file" if stored.get("bytes") else first_line(error)
        raise UserError(f"--data {where(document, source)}: its image cannot be read ({shown}); mend the row") from None


def _usable(vocabulary: int | None, *candidates: Any) -> int:
    """The first of these that is a token id of the model; 0 if there is none."""
    for one in candidates:
        if isinstance(one, int) and one >= 0 and (vocabulary is None or one < vocabulary):
            return one
    return 0


def _number_labels(documents: list[Document], label2id: dict[str, int] | None, config: DataConfig) -> list[Document]:
    """Labels as class numbers; as names only where they are the names of the classes."""
    if not any("label" in d for d in documents):
        return documents
    if label2id is None:
        numbered = all("label" in d and _label_text(d["label"]).isdecimal() for d in documents)
        if not numbered:
            return [_without_label(d) for d in documents]
        return [_with_label(d, int(_label_text(d["label"]))) for d in documents]
    names = ", ".join(sorted(label2id, key=label2id.get))
    numbers = {str(number): number for number in label2id.values()} | label2id
    numbered = []
    for document in documents:
        label = str(document.get("label")).strip()  # None if it is missing
        label = label if label in numbers else _label_text(label)
        if label not in numbers:
            raise UserError(
                f"--data {where(document, config.data)}: label {document.get('label')!r} is none of the model's, "
                f"{names} or their numbers; name the right column with --label-column, or --label-column none"
            )
        numbered.append(_with_label(document, numbers[label]))
    return numbered


def _label_text(label: Any) -> str:
    """A label as text, whole numbers without a fraction: `1.0` is class 1."""
    return re.sub(r"(?<=\d)\.0*$", "", str(label).strip())


def _with_label(document: Document, label: int) -> Document:
    changed = copy.copy(document)  # keeps its place
    changed["label"] = label
    return changed


def _without_label(document: Document) -> Document:
    changed = copy.copy(document)
    changed.pop("label", None)
    return changed


def _pack(documents: list[Document], tokenizer: Any, config: DataConfig, vocabulary: int | None) -> list[Document]:
    """Documents joined and cut to sequences of exactly `max_length`.

    Between documents stands what the tokenizer adds itself, or else the end-of-sequence token.
    """
    marks_itself = bool(tokenizer("")["input_ids"])
    joint = [] if marks_itself or len(documents) < 2 or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    encoded = tokenizer([d["text"] for d in documents], verbose=False)["input_ids"]
    check_range(zip(encoded, documents, strict=True), vocabulary, config.data, given=False)
    for number, row in enumerate(encoded):
        ids.extend(joint if number else [])
        ids.extend(row)
    length = config.max_length
    if len(ids) < length:
        raise UserError(
            f"--data {config.data}: its text has {len(ids)} tokens, shorter than one sequence of {length}; "
            f"give more text or a smaller --max-length"
        )
    return [{"input_ids": ids[i : i + length]} for i in range(0, len(ids) - length + 1, length)]


def _chunk(documents: list[Document], tokenizer: Any, config: DataConfig, vocabulary: int | None) -> list[Document]:
    """One sequence per document; the rest of a longer one follows as further sequences unless it has a label."""
    items, cut = [], 0
    for document in documents:
        rest = {k: v for k, v in document.items() if k != "text"}
        rows = _sequences(document["text"], tokenizer, config.max_length)
        check_range(((row, document) for row in rows), vocabulary, config.data, given=False)
        cut += bool(rest) and len(rows) > 1
        rows = rows[:1] if rest else rows
        items += [{"input_ids": row, **rest} for row in rows if len(row) > 1]
    say_cut(cut, len(documents), config)
    if not items:
        raise UserError(f"--data {config.data}: no document in it has two tokens or more")
    return items


def _sequences(text: str, tokenizer: Any, length: int) -> list[list[int]]:
    """One text as sequences of at most `length` tokens, each with the tokenizer's own marks."""
    if tokenizer.is_fast:
        encoded = tokenizer(text, truncation=True, max_length=length, return_overflowing_tokens=True)["input_ids"]
        return encoded if encoded and isinstance(encoded[0], list) else [encoded]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    size = max(1, length - tokenizer.num_special_tokens_to_add())
    return [tokenizer.build_inputs_with_special_tokens(ids[i : i + size]) for i in range(0, max(len(ids), 1), size)]
