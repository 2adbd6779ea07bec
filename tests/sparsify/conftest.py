"""The command in this process, with a tiny model and its data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_support import BERT, GPT2, save_model, sentences
from transformers import AutoTokenizer

CLASSES = ("calm", "glad", "cross")


def write_rows(file: Path, rows: list[dict]) -> Path:
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models `gpt2`, `masked` and `classifier`; `text.txt`, and rows of different lengths with labels in `rows.jsonl`.

    All models have dropout.
    """
    home = tmp_path_factory.mktemp("sparsify")
    save_model("GPT2LMHeadModel", home / "gpt2", **GPT2)
    save_model("BertForMaskedLM", home / "masked", **BERT)
    tokenizer = AutoTokenizer.from_pretrained(home / "masked")
    tokenizer.mask_token = tokenizer.eos_token
    tokenizer.save_pretrained(home / "masked")
    labels = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}
    save_model("BertForSequenceClassification", home / "classifier", **BERT, **labels)
    (home / "text.txt").write_text("\n".join(sentences(200)))
    texts = [text[: 8 + 11 * i % 24] for i, text in enumerate(sentences(24, seed=1))]
    write_rows(home / "rows.jsonl", [{"text": text, "label": CLASSES[i % 3]} for i, text in enumerate(texts)])
    return home
