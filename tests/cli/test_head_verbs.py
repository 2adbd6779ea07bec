"""Every verb on a checkpoint whose projections and head are converted in ways that keep the dense model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_support import GPT2, convert_argv, run_in_process, save_model, sentences
from safetensors.torch import load_file

from d2dmoe.cli import main


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("head")
    (root / "text.txt").write_text("\n".join(sentences(120)))
    save_model("GPT2LMHeadModel", root / "dense", **GPT2)
    argv = convert_argv(root / "dense", root / "text.txt", root / "out", "--attention", "low-rank", "--head",
                        "svd-softmax", "--head-active", 0.5, "--active", 0.5)  # fmt: skip
    assert main(argv) == 0
    return root


def test_what_is_written(root):
    half, full = json.loads((root / "out" / "results.json").read_text())["rows"]
    assert full["metric"]["value"] == full["dense"]["value"]
    assert half["flops_fraction_model"] < 1
    card = (root / "out" / "README.md").read_text()
    assert "4 projections around attention and the head run with a part of their work (low-rank, svd-softmax)" in card
    assert "exact outputs" in (root / "out" / "report.html").read_text()


def test_verify_and_export(root, capsys, tmp_path):
    result = run_in_process(capsys, "verify", root / "out", "--json", tmp_path / "rows.json")
    assert result.code == 0, result.err
    result = run_in_process(capsys, "export", "--dense", root / "out", tmp_path / "dense")
    assert result.code == 0, result.err
    before, after = (load_file(folder / "model.safetensors") for folder in (root / "dense", tmp_path / "dense"))
    assert before.keys() == after.keys()
    assert all(before[key].equal(after[key]) for key in before)


def test_eval_and_bench(root, capsys):
    result = run_in_process(capsys, "eval", "--model", root / "out", "--data", root / "text.txt", "--max-length", 32)
    assert result.code == 0, result.err
    assert "attention FLOPs" in result.out
    result = run_in_process(capsys, "bench", "--model", root / "out", "--batch", 1, "--length", 8, "--seconds", 0.05,
                            "--columns", "eager")  # fmt: skip
    assert result.code == 0, result.err
    assert "decode" in result.out


def test_a_dry_run_counts_the_head(root, capsys):
    sizes = []
    for head in ("none", "svd-softmax"):
        result = run_in_process(capsys, "convert", "--model", root / "dense", "--data", root / "text.txt", "--head",
                                head, "--dry-run")  # fmt: skip
        assert result.code == 0, result.err
        sizes.append(int(result.out.partition("dense, ")[2].partition(" added")[0].replace(",", "")))
    assert 0 < sizes[1] - sizes[0] < 2 * GPT2["n_embd"] ** 2 + GPT2["n_embd"] + 1


def test_a_model_without_a_vocabulary_is_refused_before_anything_is_read(root, capsys):
    save_model("BertForSequenceClassification", root / "bert", hidden_size=16, num_hidden_layers=1,
               num_attention_heads=2, intermediate_size=32, vocab_size=99)  # fmt: skip
    result = run_in_process(capsys, "convert", "--model", root / "bert", "--data", root / "text.txt", "--head",
                            "svd-softmax", "--output-dir", root / "never")  # fmt: skip
    assert result.code == 1
    assert "does not choose from a vocabulary" in result.err
    assert not (root / "never").exists()
