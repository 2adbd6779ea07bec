"""Two processes train as one does with batches twice as large: in copies of the model (DDP), or in shards (FSDP2)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli_support import BERT, GPT2, Result, names, run_in_process, run_python, save_model, sentences, weights
from safetensors.torch import load_file

from sparsify.conftest import CLASSES, write_rows

pytestmark = pytest.mark.usefixtures("one_thread")

LAUNCH = (
    "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", 2, "--num_machines", 1,
    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0,
)  # fmt: skip
# `--multi_gpu` starts processes on a machine without GPUs as well; `--cpu` would start one.
COPIES = ("--multi_gpu",)
SHARDS = ("--use_fsdp", "--fsdp_version", 2, "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP")
# In the order of the data, so that one process sees in a step what two see; no momentum, whose rounding would grow.
EXACT = (
    "--train-sampling-strategy", "sequential", "--optim", "sgd", "--learning-rate", 0.1, "--max-grad-norm", 0,
    "--lr-scheduler-type", "constant", "--warmup-steps", 0, "--save-strategy", "no",
)  # fmt: skip
LORA = ("--lora-rank", 2, "--learning-rate", 1.0)
RUNS = {
    "gpt2": ("gpt2", 2, EXACT),
    "classifier": ("classifier", 2, (*EXACT, "--gradient-accumulation-steps", 2, "--locality", 0.1)),
    "lora": ("gpt2", 2, (*EXACT, *LORA)),
    "distilled": ("classifier", 2, (*EXACT, "--distillation", 0.7, "--activation", "relu", "--eval-steps", 2)),
    "interrupted": ("dropout", 2, ("--save-steps", 2, "--learning-rate", 0.01)),
}


def argv(folder: Path, run: str, output: Path, processes: int, *more: object) -> list[str]:
    model, batch, flags = RUNS[run]
    argv = ["sparsify", "--model", folder / model, "--data", folder / "rows.jsonl", "--sequences", "documents"]
    argv += ["--output-dir", output, "--max-steps", 4, "--batch-size", batch * 2 // processes, "--max-length", 32]
    argv += ["--eval-tokens", 100, "--logging-steps", 1, "--alpha", 0.05, "--alpha-schedule", "constant"]
    return [str(a) for a in (*argv, *flags, *more)]


def launch(cwd: Path, how: tuple, *program: object) -> Result:
    result = run_python(*LAUNCH, *how, *program, cwd=cwd, timeout=240)
    assert result.code == 0, result.err
    return result


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, the same without dropout, and rows whose lengths differ from one process to the other."""
    folder = tmp_path_factory.mktemp("processes")
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    save_model("GPT2LMHeadModel", folder / "dropout", **GPT2)
    save_model("GPT2LMHeadModel", folder / "gpt2", **GPT2, **none)
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    labels = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}
    save_model("BertForSequenceClassification", folder / "classifier", **BERT, **none, **labels)
    texts = [text[: 5 + 11 * i % 26] for i, text in enumerate(sentences(60, seed=1))]
    write_rows(folder / "rows.jsonl", [{"text": text, "label": CLASSES[i % 3]} for i, text in enumerate(texts)])
    return folder


@pytest.fixture(scope="module")
def one(inputs: Path) -> dict[str, Path]:
    """What one process makes of batches twice as large."""
    from d2dmoe.cli import main

    for run in RUNS:
        if run != "interrupted":
            assert main(argv(inputs, run, inputs / f"one-{run}", 1)) == 0
    return {run: inputs / f"one-{run}" for run in RUNS}


def several(inputs: Path, name: str, how: tuple, runs: dict[str, tuple]) -> tuple[Result, Path]:
    """Trainings in two processes, with further flags; one also interrupted and gone on with, and left interrupted."""
    folder = inputs / name
    folder.mkdir()
    runs = {**runs, "interrupted": ()}
    jobs = [{"argv": argv(inputs, run, folder / run, 2, *flags), "stop": None} for run, flags in runs.items()]
    again = argv(inputs, "interrupted", folder / "resumed", 2)
    jobs += [{"argv": again, "stop": "checkpoint-2"}, {"argv": [*again, "--resume"], "stop": None}]
    jobs += [{"argv": argv(inputs, "interrupted", folder / "left", 2), "stop": "checkpoint-2"}]
    plan = json.dumps({"sharded": how is SHARDS, "jobs": jobs})
    return launch(folder, how, Path(__file__).with_name("several.py"), plan), folder


def check_equal(folder: Path, one: Path, start: Path) -> None:
    """The same weights, and the same figures of every step."""
    ours, theirs, before = (load_file(f / "model.safetensors") for f in (folder, one, start))
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, msg=lambda text, key=key: f"{key}: {text}")
    assert sum(not torch.equal(before[key], value) for key, value in theirs.items()) >= 8
    results, reference = (json.loads((f / "results.json").read_text()) for f in (folder, one))
    assert (results["processes"], reference["processes"]) == (2, 1)
    assert len(results["log"]) == 4
    for a, b in zip(results["log"], reference["log"], strict=True):
        for key in {"loss", "task_loss", "sparsity_loss", "distillation_loss", "alpha", "nonzero", "near_zero"} & {*b}:
            assert a[key] == pytest.approx(b[key], rel=1e-5), key
    for a, b in zip(results["rows"], reference["rows"], strict=True):
        assert a["metric"]["value"] == pytest.approx(b["metric"]["value"], rel=1e-5)


@pytest.mark.slow
def test_the_command_in_two_processes(inputs: Path, one: dict[str, Path], tmp_path: Path) -> None:
    """As a user would type it."""
    launch(tmp_path, COPIES, "-m", "d2dmoe", *argv(inputs, "gpt2", tmp_path / "out", 2))
    check_equal(tmp_path / "out", one["gpt2"], inputs / "gpt2")
    assert names(tmp_path) == {"out"}


# One test for each launch: tests that shared one might run in different workers, and each would need its own.


def test_copies(inputs: Path, one: dict[str, Path], capsys) -> None:
    figures = inputs / "figures.json"
    runs = {"gpt2": ("--json", figures), "classifier": (), "lora": (), "distilled": ()}
    result, folder = several(inputs, "copies", COPIES, runs)
    for run in runs:
        check_equal(folder / run, one[run], inputs / RUNS[run][0])
        assert json.loads((folder / run / "results.json").read_text())["distributed"] == "MULTI_CPU"
    assert json.loads(figures.read_text()) == json.loads((folder / "gpt2" / "results.json").read_text())
    check_interruptions(result, folder, inputs, capsys)


@pytest.mark.slow  # half a minute; copies, which take the same steps, stay
def test_shards(inputs: Path, one: dict[str, Path], capsys) -> None:
    # By default accelerate wraps BERT's embeddings twice, and fails.
    layers = ("--fsdp", "--fsdp-config", '{"transformer_layer_cls_to_wrap": ["BertLayer"]}')
    runs = {"gpt2": (), "classifier": layers, "lora": ()}
    result, folder = several(inputs, "shards", SHARDS, runs)
    for run in runs:
        check_equal(folder / run, one[run], inputs / RUNS[run][0])
        assert json.loads((folder / run / "results.json").read_text())["distributed"] == "FSDP"
    check_interruptions(result, folder, inputs, capsys)


def check_interruptions(result: Result, folder: Path, inputs: Path, capsys) -> None:
    """What was printed; the same weights, bit by bit; another number of processes does not go on with what was left."""
    finished = {name for name in names(folder) if not name.endswith(".partial")}
    assert names(folder) == finished | {"left.partial"}
    lines = result.out.splitlines()  # by the first process alone, and nothing but tables
    assert len(lines) == 4 * len(finished)
    for at in range(0, len(lines), 4):
        assert lines[at].startswith("| model | ")
        assert set(lines[at + 1]) == {"|", "-"}
        assert [line.split(" | ")[0] for line in lines[at + 2 : at + 4]] == ["| before", "| after"]
    assert result.err.count("saved ") == len(finished)
    assert weights(folder / "resumed") == weights(folder / "interrupted")
    assert {"interrupted", "resumed"} < finished
    alone = run_in_process(capsys, *argv(inputs, "interrupted", folder / "left", 2, "--resume"))
    assert alone.code == 1
    assert "processes changed (2 then, 1 now)" in alone.err


def test_sharding_where_accelerate_would_not_is_refused(inputs: Path, capsys, tmp_path: Path) -> None:
    result = run_in_process(capsys, *argv(inputs, "gpt2", tmp_path / "out", 1, "--fsdp"))
    assert result.code == 1
    assert "--fsdp: " in result.err
    assert names(tmp_path) == set()


@pytest.mark.slow
def test_what_only_the_first_process_refuses_ends_both(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").touch()
    command = argv(inputs, "gpt2", tmp_path / "out", 2)
    result = run_python(*LAUNCH, *COPIES, "-m", "d2dmoe", *command, cwd=tmp_path)
    assert result.code != 0
    assert result.err.count("is not empty; use --overwrite to replace it") == 1
