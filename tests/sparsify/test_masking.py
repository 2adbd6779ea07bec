"""Masked language models: what is masked, and data that are token ids already."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cli_support import BERT, byte_tokenizer, names, run_in_process, save_model, sentences

from d2dmoe.data import Batches
from d2dmoe.sparsify.masks import IGNORED
from d2dmoe.sparsify.tasks import Masking
from sparsify.conftest import write_rows
from sparsify.support import sparsify_argv

MASK, SPECIAL = 3, SimpleNamespace(mask_token_id=3, all_special_ids=[0, 1, 2, 3])


def masking(rows: list[list[int]], seed: int = 0) -> tuple[Masking, list[dict]]:
    items = [{"input_ids": row, "label": 1} for row in rows]
    return Masking(Batches(items, 4, pad_id=0), SPECIAL, 100, seed), items


def test_what_is_masked_and_what_is_to_be_told():
    rows = [[1, *[4 + (7 * i + j) % 90 for j in range(n)], 2] for i, n in enumerate([400, 250] * 50)]
    mask, items = masking(rows)
    batch = mask(items)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    original = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    ids, told = batch["input_ids"], batch["labels"] != IGNORED
    assert torch.equal(batch["labels"][told], original[told])
    assert torch.equal(ids[~told], original[~told])
    assert not torch.isin(original[told], torch.tensor(SPECIAL.all_special_ids)).any()
    usual = sum(len(row) - 2 for row in rows)
    assert told.sum().item() / usual == pytest.approx(0.15, abs=0.01)
    assert (ids[told] == MASK).float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert (ids[told] == original[told]).float().mean().item() == pytest.approx(0.1, abs=0.02)


def test_it_follows_the_epoch_the_batch_and_the_seed():
    rows = [[5 + i + j for j in range(40)] for i in range(4)]
    mask, items = masking(rows)
    first = mask(items)["input_ids"]
    torch.rand(3)
    assert torch.equal(mask(items)["input_ids"], first)
    assert not torch.equal(masking(rows, seed=1)[0](items)["input_ids"], first)
    mask.epoch = 1
    assert not torch.equal(mask(items)["input_ids"], first)


@pytest.mark.parametrize("length", range(1, 7))
def test_a_short_row_has_a_token_to_tell(length):
    for start in range(10, 60):
        mask, items = masking([[start + i for i in range(length)]])
        batch = mask(items)
        assert (batch["labels"] != IGNORED).any()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with and without a tokenizer and a mask token, rows of ids, and the same rows as text."""
    folder = tmp_path_factory.mktemp("masking")
    sizes = {**BERT, "vocab_size": 258}
    save_model("BertForMaskedLM", folder / "config alone", tokenizer=False, **sizes, mask_token_id=257)
    save_model("BertForMaskedLM", folder / "neither", tokenizer=False, **BERT)
    save_model("BertForMaskedLM", folder / "no mask", **BERT)
    save_model("BertForMaskedLM", folder / "tokenizer", tokenizer=False, **sizes)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    assert tokenizer.mask_token_id == 257
    tokenizer.save_pretrained(folder / "tokenizer")
    texts = sentences(80)
    write_rows(folder / "text.jsonl", [{"text": text} for text in texts])
    ids = [tokenizer(text)["input_ids"] for text in texts]
    write_rows(folder / "ids.jsonl", [{"input_ids": row} for row in ids])
    return folder


@pytest.mark.parametrize("name", ["config alone", "tokenizer"])
@pytest.mark.parametrize("task", ["auto", "masked_lm"])
def test_token_ids_train_a_masked_model(name: str, task: str, models: Path, d2dmoe, tmp_path: Path) -> None:
    argv = sparsify_argv(
        models / name, models / "ids.jsonl", tmp_path / "out", "--task", task, "--logging-steps", 1, steps=4
    )
    d2dmoe(*argv)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["task"] == "masked_lm"
    assert [row["metric"]["name"] for row in results["rows"]] == ["masked_lm", "masked_lm"]
    assert results["log"][0]["task_loss"] > 0


def test_text_and_its_ids_give_the_same_model(models: Path, d2dmoe, tmp_path: Path) -> None:
    written = []
    for data in ("text.jsonl", "ids.jsonl"):
        d2dmoe(*sparsify_argv(models / "tokenizer", models / data, tmp_path / data, steps=4))
        written.append((tmp_path / data / "model.safetensors").read_bytes())
    assert written[0] == written[1]


@pytest.mark.parametrize("name", ["neither", "no mask"])
def test_without_a_mask_token_it_is_told_at_once(name: str, models: Path, capsys, tmp_path: Path) -> None:
    argv = sparsify_argv(models / name, models / "ids.jsonl", tmp_path / "out", "--task", "masked_lm")
    result = run_in_process(capsys, *argv)
    assert result.code == 1
    assert result.err == (
        "d2dmoe: --task masked_lm: the model has no tokenizer with a mask token; use --task distillation\n"
    )
    assert names(tmp_path) == set()
