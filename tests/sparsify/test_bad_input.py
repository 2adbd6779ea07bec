"""What cannot work is refused with one sentence, before any weights are read; a loss that explodes, with its step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cli_support import BERT, GPT2, TEXT_SIZES, names, run_in_process, save_model
from conftest import ROOT

from sparsify.conftest import write_rows
from sparsify.support import sparsify_argv

# Model, data, flags, exit code, what the sentence says.
CASES = {
    "no labels": ("classifier", "text.txt", [], 1, ("it has no label", "--label-column", "--task distillation")),
    "some labels": ("classifier", "some.jsonl", [], 1, ("label None is none of the model's", "calm, glad, cross")),
    "other labels": ("classifier", "other.jsonl", [], 1, ("label 'sad' is none of the model's", "calm, glad, cross")),
    "label too large": ("classifier", "large.jsonl", [], 1, ("label 3 is none of the model's", "--label-column")),
    "no such head": (
        "gpt2", "text.txt", ["--task", "classification"], 1,
        ("--task classification: a GPT2LMHeadModel has no such head; possible here: causal_lm, distillation",),
    ),
    "no masked head": ("gpt2", "text.txt", ["--task", "masked_lm"], 1, ("--task masked_lm", "causal_lm")),
    "no causal head": ("classifier", "rows.jsonl", ["--task", "causal_lm"], 1, ("possible here: classification",)),
    "no mask token": ("unmasked", "text.txt", [], 1, ("no tokenizer with a mask token", "--task distillation")),
    "no such task": ("gpt2", "text.txt", ["--task", "speech"], 2, ("invalid choice: 'speech'", "causal_lm")),
    "activation in the code": (
        "fixed", "text.txt", ["--activation", "relu"], 1,
        ("--activation relu: no key of the config holds the activation", "use --activation keep"),
    ),
    "no blocks": ("mamba", "text.txt", [], 1, ("no feed-forward block found, so there is nothing to sparsify",)),
    "alpha negative": ("gpt2", "text.txt", ["--alpha", -1], 1, ("--alpha -1.0: must be 0 or more",)),
    "alpha nan": ("gpt2", "text.txt", ["--alpha", "nan"], 1, ("--alpha nan: must be",)),
    "alpha infinite": ("gpt2", "text.txt", ["--alpha", "inf"], 1, ("--alpha inf: must be a finite number",)),
    "alpha a word": ("gpt2", "text.txt", ["--alpha", "much"], 2, ("argument --alpha: invalid float value: 'much'",)),
    "locality nan": ("gpt2", "text.txt", ["--locality", "nan"], 1, ("--locality nan: must be",)),
    "no such regulariser": ("gpt2", "text.txt", ["--regulariser", "l7"], 2, ("invalid choice: 'l7'", "hoyer")),
    "short data": (
        "gpt2", "short.txt", [], 1, ("tokens, shorter than one sequence of 32; give more text or a smaller",),
    ),
    "short held-out part": (
        "gpt2", "middle.txt", [], 1, ("shorter than one sequence of 32", "--eval-tokens 0 skips them"),
    ),
    "no such data": ("gpt2", "nothing.txt", [], 1, ("nothing.txt: no such file or folder",)),
    "converted": ("converted", "text.txt", [], 1, ("already converted; sparsify comes before that",)),
    "unknown flag": (
        "gpt2", "text.txt", ["--max-step", 3], 1, ("unknown option --max-step; did you mean --max-steps?",),
    ),
    "unknown flag of ours": (
        "gpt2", "text.txt", ["--alpha-schedul", "sine"], 1,
        ("unknown option --alpha-schedul; did you mean --alpha-schedule?",),
    ),
    "unlike any flag": ("gpt2", "text.txt", ["--qqq"], 1, ("unknown option --qqq (see d2dmoe sparsify --help)",)),
    "no flag": ("gpt2", "text.txt", ["alpha", 3], 1, ("alpha: belongs to no flag; see d2dmoe sparsify --help",)),
    "reserved": (
        "gpt2", "text.txt", ["--per-device-train-batch-size", 2], 1,
        ("--per-device-train-batch-size is set by d2dmoe itself; use --batch-size",),
    ),
    "reserved, spelt as a field": (
        "gpt2", "text.txt", ["--resume_from_checkpoint", "x"], 1,
        ("--resume-from-checkpoint is set by d2dmoe itself; use --resume",),
    ),
    "reserved without a substitute": (
        "gpt2", "text.txt", ["--remove-unused-columns=false"], 1,
        ("--remove-unused-columns is set by d2dmoe itself",),
    ),
    "not a truth value": ("gpt2", "text.txt", ["--bf16", "maybe"], 1, ("--bf16: ", "maybe", "true/false")),
    "not a number": ("gpt2", "text.txt", ["--learning-rate", "fast"], 1, ("d2dmoe: --learning-rate: ", "'fast'")),
    "not a strategy": ("gpt2", "text.txt", ["--save-strategy", "often"], 1, ("often", "steps", "epoch")),
    "no value": ("gpt2", "text.txt", ["--learning-rate"], 1, ("d2dmoe: --learning-rate: expected one argument",)),
    "threshold without fatrelu": (
        "gpt2", "text.txt", ["--threshold", 0.1], 1, ("--threshold 0.1 belongs to --activation fatrelu",),
    ),
    "fatrelu without threshold": (
        "gpt2", "text.txt", ["--activation", "fatrelu"], 1, ("--activation fatrelu needs a --threshold above 0",),
    ),
    "adapters nowhere": (
        "gpt2", "text.txt", ["--lora-rank", 2, "--lora-targets", "nothing_like_it"], 1,
        ("--lora-targets nothing_like_it", "not found"),
    ),
    "weight of nothing": (
        "gpt2", "text.txt", ["--regulariser", "none", "--alpha", 2], 1,
        ("--alpha 2.0 changes nothing with --regulariser none",),
    ),
    "lora alpha alone": ("gpt2", "text.txt", ["--lora-alpha", 2], 1, ("--lora-alpha 2.0 needs --lora-rank",)),
    "lora targets alone": (
        "gpt2", "text.txt", ["--lora-targets", "c_fc"], 1, ("--lora-targets c_fc needs --lora-rank",),
    ),
    "best model without evaluation": (
        "gpt2", "text.txt", ["--load-best-model-at-end", "--eval-strategy", "no"], 1,
        ("--load_best_model_at_end requires", "(from transformers.TrainingArguments)"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def inputs(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and data of `home` and further ones; no model can be opened from these weights."""
    folder = tmp_path_factory.mktemp("inputs")
    for name in ("gpt2", "classifier"):
        shutil.copytree(home / name, folder / name)
    save_model("BertForMaskedLM", folder / "unmasked", **BERT)
    bloom = TEXT_SIZES | {"hidden_size": 16, "n_layer": 2, "n_head": 2}
    save_model("BloomForCausalLM", folder / "fixed", **bloom)  # GELU of its own, and no key for it
    mamba = TEXT_SIZES | {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    save_model("MambaForCausalLM", folder / "mamba", **mamba)
    record = json.loads((ROOT / "tests/moe/checkpoint-2026-11-24/config.json").read_text())["quantization_config"]
    save_model("GPT2LMHeadModel", folder / "converted", **GPT2, quantization_config=record)
    for file in folder.rglob("*.safetensors"):
        content = file.read_bytes()
        file.write_bytes(content.replace(b'weight":', b'nobody":'))  # a whole file, with tensors that no model has
    for name in ("text.txt", "rows.jsonl"):
        shutil.copy(home / name, folder / name)
    (folder / "short.txt").write_text("too short")
    (folder / "middle.txt").write_text("a line of text\n" * 9)
    rows = [{"text": f"sentence {i}", "label": i % 3} for i in range(20)]
    write_rows(folder / "some.jsonl", [{**r, "label": None if i == 5 else r["label"]} for i, r in enumerate(rows)])
    write_rows(folder / "other.jsonl", [{**r, "label": "sad"} for r in rows])
    write_rows(folder / "large.jsonl", [{**r, "label": i % 4} for i, r in enumerate(rows)])
    return folder


@pytest.mark.parametrize("case", CASES)
def test_refused_before_any_weights_are_read(case: str, inputs: Path, capsys, tmp_path: Path) -> None:
    model, data, flags, code, said = CASES[case]
    result = run_in_process(capsys, *sparsify_argv(inputs / model, inputs / data, tmp_path / "out", *flags))
    assert result.code == code, result.err
    for words in said:
        assert words in result.err
    assert result.out == ""
    assert not any(word in result.err for word in ("Traceback", "--debug shows", "F99"))
    if code == 1:
        assert result.err.startswith("d2dmoe: ")
        assert result.err.count("\n") == 1, result.err
    assert names(tmp_path) == set()


def test_the_weights_there_cannot_be_read(inputs: Path, capsys, tmp_path: Path) -> None:
    """Otherwise the test above would show nothing."""
    result = run_in_process(capsys, *sparsify_argv(inputs / "gpt2", inputs / "text.txt", tmp_path / "out"))
    assert result.code == 1
    assert "the checkpoint lacks 16 tensors of the model" in result.err


def test_a_folder_inside_the_output(inputs: Path, capsys, tmp_path: Path) -> None:
    shutil.copytree(inputs / "gpt2", tmp_path / "out" / "gpt2")
    argv = sparsify_argv(tmp_path / "out" / "gpt2", inputs / "text.txt", tmp_path / "out", "--overwrite")
    result = run_in_process(capsys, *argv)
    assert result.code == 1
    assert "lies in it and would be replaced" in result.err


def test_a_recipe_with_an_unknown_key(inputs: Path, capsys, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("regulariser: l1\nlearning_rat: 0.1\n")
    argv = sparsify_argv(inputs / "gpt2", inputs / "text.txt", tmp_path / "out", "--recipe", tmp_path / "recipe.yaml")
    result = run_in_process(capsys, *argv)
    assert result.code == 1
    assert "learning-rat; did you mean --learning-rate?" in result.err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--learning-rate", 1e30, "--save-strategy", "no"],
            "step 3: the task loss became",
        ),  # the first step has a rate of 0
        (
            ["--alpha", 1e38, "--regulariser", "l1", "--alpha-schedule", "constant"],
            "step 1: the sum of all terms became inf",
        ),
    ],
    ids=["task", "sparsity"],
)
def test_a_loss_that_explodes(flags: list, said: str, home: Path, d2dmoe, tmp_path: Path) -> None:
    argv = sparsify_argv(home / "gpt2", home / "text.txt", tmp_path / "out", *flags, "--max-grad-norm", 0)
    result = d2dmoe(*argv, code=1)
    assert said in result.err
    assert "lower the learning rate or alpha" in result.err
    assert result.out == ""
    assert names(tmp_path) == set()


def test_a_loss_that_explodes_after_a_state_was_saved(home: Path, d2dmoe, tmp_path: Path) -> None:
    """The state stays for another look, the output folder does not appear."""
    flags = ("--learning-rate", 1e30, "--warmup-steps", 0, "--save-steps", 1, "--max-grad-norm", 0)
    result = d2dmoe(*sparsify_argv(home / "gpt2", home / "text.txt", tmp_path / "out", *flags), code=1)
    assert "step 2: the task loss became" in result.err
    assert names(tmp_path) == {"out.partial"}
