"""Batches of one data source, or of several in equal shares, from no more text than is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..config.options import DataConfig
from ..errors import UserError
from .batches import Batches, make_batches
from .documents import read_documents
from .table import Document

CHARACTERS = 8  # of text read for each token wanted; a token of English has four or five
PIECE = 12  # characters for each token of a sequence, in a piece of a long document: some three sequences
GROWTH = 4  # if that was too little


def sources_of(data: str) -> list[str]:
    """The sources that `--data` names, separated by commas; a path that exists is one of its own."""
    found = [data] if Path(data).exists() else [part.strip() for part in data.split(",")]
    return [source for source in found if source] or [data]


def read_batches(
    config: DataConfig, part: str, processor: Any, *, packed: bool, tokens: int = 0, seed: int | None = None,
    **facts: Any,
) -> Batches:  # fmt: skip
    """Read one part of the data that `config.data` names, as batches.

    Of several sources each gives the same number of tokens, and one that has less gives all; their items alternate.

    Args:
        config: Source, columns, lengths and sizes.
        part: As for `read_documents`.
        processor: Tokenizer or image processor.
        packed: As for `make_batches`.
        tokens: How many are wanted, 0 for everything there is. There may be more, and there are less where the data
            has less. Text without labels is tokenised no further than they need.
        seed: Where text is not tokenised as a whole, take documents, or pieces of long ones, from all over it;
            `None` takes the beginning, which then is as it would be of the whole.
        facts: Further arguments of `make_batches`.

    Raises:
        UserError: As `read_documents` and `make_batches`, or if sources do not fit each other.
    """
    sources = sources_of(config.data)
    share, pools = -(-tokens // len(sources)), []
    packed = packed if config.sequences == "auto" else config.sequences == "packed"
    for source in sources:
        own = replace(config, data=source, sequences="packed" if packed else "documents")
        documents = read_documents(source, part, own.text_column, own.label_column, own.header)
        pools.append(_enough(documents, own, processor, share, seed, packed=packed, **facts))
    return pools[0] if len(pools) == 1 else _mixed(pools, sources, tokens, seed)


def _enough(
    documents: list[Document], config: DataConfig, processor: Any, tokens: int, seed: int | None, **options: Any
) -> Batches:  # fmt: skip
    """Batches of as many documents as give these tokens; of all where they give less."""
    if tokens and "text" in documents[0] and not any("label" in document for document in documents):
        characters = CHARACTERS * (tokens + config.max_length)
        while sum(len(document["text"]) for document in documents) > characters:
            if seed is None:
                chosen = _beginning(documents, characters, options["packed"])
            else:
                chosen = _sample(documents, characters, seed, PIECE * config.max_length if options["packed"] else 0)
            try:
                batches = make_batches(list(chosen), processor, config, **options)
            except UserError:  # too little text, perhaps; otherwise the whole tells
                batches = None
            if batches is not None and batches.tokens >= tokens + config.max_length:  # the last one may be cut short
                return batches
            characters *= GROWTH
    return make_batches(documents, processor, config, **options)


def _beginning(documents: list[Document], characters: int, packed: bool) -> Iterator[Document]:
    """The first documents with at least so many characters; where they are packed, the last one is cut there."""
    for document in documents:
        if characters <= 0:
            return
        yield _part(document, 0, characters) if packed else document
        characters -= len(document["text"])


def _sample(documents: list[Document], characters: int, seed: int, piece: int) -> Iterator[Document]:
    """Documents in random order with at least so many characters; long ones in pieces if `piece` is not 0."""
    pieces = [part for document in documents for part in _cut(document, piece)] if piece else documents
    for number in torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed)).tolist():
        if characters <= 0:
            return
        yield pieces[number]
        characters -= len(pieces[number]["text"])


def _cut(document: Document, size: int) -> Iterator[Document]:
    """A document in pieces of about `size` characters, which end at the ends of lines or words where there are any."""
    text, start = document["text"], 0
    while start < len(text):
        end = start + size
        if len(text) - end < size:
            end = len(text)
        else:
            places = (text.find(mark, end, end + size) for mark in ("\n", " "))
            end = next((place for place in places if place >= 0), end)
        yield _part(document, start, end)
        start = end


def _part(document: Document, start: int, end: int) -> Document:
    source, place = getattr(document, "source", ""), getattr(document, "place", "")
    return Document({**document, "text": document["text"][start:end]}, source, place)


def _mixed(pools: list[Batches], sources: list[str], tokens: int, seed: int | None) -> Batches:
    """Batches of items from all pools in turn.

    Raises:
        UserError: If some hold text and others images, or only some have labels.
    """
    kinds = [sorted(pool.items[0].keys() & {"input_ids", "image", "label"}) for pool in pools]
    for source, kind in zip(sources, kinds, strict=True):
        if kind != kinds[0]:
            held = " and ".join(kinds[0]), " and ".join(kind)
            raise UserError(f"--data {source} gives {held[1]}, and {sources[0]} {held[0]}; mix data of one kind")
    left, shares = tokens, {}
    for count, (number, pool) in enumerate(sorted(enumerate(pools), key=lambda pair: pair[1].tokens)):
        wanted = -(-left // (len(pools) - count))
        shares[number] = (pool if seed is None else pool.shuffled(seed)).first(wanted) if tokens else pool
        left -= shares[number].tokens
    placed = [
        ((place + 0.5) / len(share.items), number, place)
        for number, share in shares.items() for place in range(len(share.items))
    ]  # fmt: skip
    return pools[0].with_items([shares[number].items[place] for _, number, place in sorted(placed)])
