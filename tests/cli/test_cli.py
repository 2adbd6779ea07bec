"""The command line: what every verb writes and prints, precedence of options, interruption, the hub."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from cli_support import (
    BERT,
    LAYERS,
    TEXT_SIZES,
    convert_argv,
    names,
    run_killed,
    run_python,
    save_model,
    sentences,
    weights,
)
from hub_mirror import hub_mirror, mirror_environment
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from d2dmoe import __version__, hub, set_gate
from d2dmoe.config import ConvertConfig, resolve
from d2dmoe.moe.layer import layers

pytestmark = pytest.mark.usefixtures("one_thread")
EVAL_KEYS = {
    "gate", "tau", "active_fraction", "flops_fraction_ffn", "flops_fraction_model", "metric", "dense", "tokens",
}  # fmt: skip
LIST_KEYS = {"name", "kind", "activation", "d_model", "width", "parts", "converted", "why"}
DEFAULTS = {key: getattr(ConvertConfig(), key) for key in ("preset", "split", "gate", "stand_in", "thresholds")}
COMMON_KEYS = {"d2dmoe", "command", "machine", "seed", "rows"}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("BertForMaskedLM", tmp_path_factory.mktemp("bert"), **BERT)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = TEXT_SIZES | LAYERS | {"intermediate_size": 40}
    return save_model("LlamaForCausalLM", tmp_path_factory.mktemp("llama"), tokenizer=False, **config)


def figures(path: Path) -> dict:
    """A `--json` file, its common keys checked."""
    content = json.loads(path.read_text())
    assert set(content) >= COMMON_KEYS
    assert content["d2dmoe"] == __version__
    assert content["command"][0] == "d2dmoe"
    assert set(content["machine"]) >= {"processor", "cores", "threads", "python", "torch", "transformers"}
    return content


# --- convert: what it writes -----------------------------------------------------------------------------------------


def test_convert_writes_a_complete_folder(home: Path) -> None:
    assert names(home / "first") >= {
        "model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "recipe.yaml", "results.json",
        "README.md",
    }  # fmt: skip
    recipe = yaml.safe_load((home / "first" / "recipe.yaml").read_text())
    assert recipe["seed"] == 0
    assert recipe["experts"] == 8
    assert set(recipe) == set(vars(ConvertConfig()))
    stored = json.loads((home / "first" / "config.json").read_text())["quantization_config"]
    assert (stored["quant_method"], stored["version"]) == ("d2dmoe", 1)
    results = figures(home / "first" / "results.json")
    assert [row["active"] for row in results["rows"]] == [0.25, 0.5, 0.75, 1.0]
    for row in results["rows"]:
        assert set(row) >= EVAL_KEYS
        assert row["metric"]["name"] == "perplexity"
        assert row["active_fraction"] == pytest.approx(row["active"], abs=0.05)


def test_the_model_card_is_valid_and_shows_how_to_open_the_model(home: Path) -> None:
    card = ModelCard.load(home / "first" / "README.md")
    assert card.data.library_name == "transformers"
    assert "d2dmoe" in card.data.tags
    assert (card.data.license, card.data.base_model) == ("mit", "org/ancestor")  # as the model it was made from says
    assert card.data.pipeline_tag == "text-generation"
    snippet = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]
    assert snippet.startswith("import d2dmoe")
    opened: dict[str, object] = {}
    exec(snippet.replace("path/to/this/folder", str(home / "first")), opened)
    assert type(opened["model"]).__name__ == "GPT2LMHeadModel"


def test_the_model_card_holds_the_figures_as_metadata(home: Path) -> None:
    data, rows = ModelCard.load(home / "first" / "README.md").data, figures(home / "first" / "results.json")["rows"]
    assert data.model_name == "first"
    assert {(r.task_type, r.dataset_name, r.dataset_split) for r in data.eval_results} == {
        ("text-generation", "text.txt", "held out")
    }
    expected = {}
    for row in rows:
        for name, value in {"perplexity": row["metric"]["value"], **row["metrics"]}.items():
            expected[name, row["active_fraction"], row["flops_fraction_model"]] = value
    assert len(expected) > len(rows)
    assert expected == {
        (r.metric_type, r.metric_args["active_fraction"], r.metric_args["flops_fraction_model"]): r.metric_value
        for r in data.eval_results
    }


def test_convert_tells_what_it_does_and_prints_the_figures(home: Path, d2dmoe, tmp_path: Path) -> None:
    result = d2dmoe(*convert_argv(home / "dense", home / "text.txt", tmp_path / "out", "--json", tmp_path / "f.json"))
    assert "2 blocks of 8 experts in GPT2LMHeadModel" in result.err
    assert f"saved {tmp_path / 'out'}" in result.err
    assert result.out.startswith("| active | FFN FLOPs |")
    assert len(result.out.splitlines()) == 6
    assert figures(tmp_path / "f.json")["rows"] == json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert weights(tmp_path / "out") == weights(home / "first")  # the same command twice
    assert names(tmp_path) == {"out", "f.json"}


def test_no_path_of_the_machine_is_written(home: Path, d2dmoe, tmp_path: Path) -> None:
    argv = convert_argv(home / "dense", home / "text.txt", tmp_path / "out", f"--json={tmp_path}/f.json")
    d2dmoe(*argv, "--router-tokens", 40)
    texts = [tmp_path / "f.json", *(p for p in (tmp_path / "out").iterdir() if p.suffix in (".json", ".yaml", ".md"))]
    assert len(texts) > 5
    for file in texts:
        assert str(home) not in file.read_text(), file
        assert str(tmp_path) not in file.read_text(), file
    recipe = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert (recipe["model"], recipe["data"], recipe["output_dir"]) == ("dense", "text.txt", "out")
    command = json.loads((tmp_path / "out" / "results.json").read_text())["command"]
    assert command[:5] == ["d2dmoe", "convert", "--model", "dense", "--data"]
    assert "--json=f.json" in command


def test_the_written_recipe_repeats_the_conversion(
    home: Path, d2dmoe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    d2dmoe("convert", "--recipe", home / "first" / "recipe.yaml", "--output-dir", tmp_path / "out")
    assert weights(tmp_path / "out") == weights(home / "first")
    d2dmoe("convert", "--recipe", home / "first" / "recipe.yaml", "--output-dir", tmp_path / "seed", "--seed", 1)
    assert weights(tmp_path / "seed") != weights(home / "first")
    assert yaml.safe_load((tmp_path / "seed" / "recipe.yaml").read_text())["seed"] == 1


def test_shards_and_half_precision(home: Path, d2dmoe, tmp_path: Path) -> None:
    flags = ["--max-shard-size", "20KB", "--dtype", "bfloat16"]
    d2dmoe(*convert_argv(home / "dense", home / "text.txt", tmp_path / "out", *flags))
    assert "model.safetensors.index.json" in names(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    argv = ["eval", "--model", tmp_path / "out", "--data", home / "text.txt", "--max-length", 32, "--active", 1]
    d2dmoe(*argv, "--json", tmp_path / "f.json")
    d2dmoe("eval", "--model", home / "dense", *argv[3:7], "--json", tmp_path / "g.json")
    (half,), (full,) = (figures(tmp_path / name)["rows"] for name in ("f.json", "g.json"))
    assert half["metric"]["value"] == pytest.approx(full["metric"]["value"], rel=0.02)


def test_a_width_that_the_experts_do_not_divide(home: Path, d2dmoe, tmp_path: Path) -> None:
    """Ten experts of seven neurons for 64: six of them are padding, which no file has."""
    argv = convert_argv(home / "dense", home / "text.txt", tmp_path / "out", "--experts", 10)
    assert "padding: 12 zero neurons" in d2dmoe(*argv, "--dry-run").out
    result = d2dmoe(*argv)
    assert "padded with 12 zero neurons" in result.err
    rows = figures(tmp_path / "out" / "results.json")["rows"]
    assert rows[-1]["metric"]["value"] == pytest.approx(rows[-1]["dense"]["value"])
    dense, ours = (load_file(folder / "model.safetensors") for folder in (home / "dense", tmp_path / "out"))
    assert {key: value.shape for key, value in dense.items()} == {key: ours[key].shape for key in dense}


def test_figures_are_those_of_the_checkpoint(home: Path, d2dmoe, tmp_path: Path) -> None:
    """In the dtype in which it is written, not in the one it was fitted in."""
    result = d2dmoe(*convert_argv(home / "dense", home / "text.txt", tmp_path / "out", "--dtype", "bfloat16"))
    assert "| ms/token in bfloat16 |" in result.out
    flags = ["--data", home / "text.txt", "--max-length", 32, "--tokens", 500, "--part", "held_out"]
    kept = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    full = json.loads((home / "first" / "results.json").read_text())["rows"]
    assert [rows[0]["dtype"] for rows in (kept, full)] == ["bfloat16", "float32"]
    for row, wide in zip(kept, full, strict=True):
        assert row["metric"]["value"] == pytest.approx(wide["metric"]["value"], rel=0.05)
        assert row["metric"]["value"] != wide["metric"]["value"]
    with pytest.MonkeyPatch.context() as patch:
        load = hub.load_model
        patch.setattr(hub, "load_model", lambda *a, **k: load(*a, **k).to(torch.bfloat16))
        d2dmoe("eval", "--model", tmp_path / "out", *flags, "--json", tmp_path / "f.json")
    again = figures(tmp_path / "f.json")["rows"]
    assert [row["metric"] for row in again] == [row["metric"] for row in kept]


def test_eval_beside_another_dense_model(home: Path, d2dmoe, tmp_path: Path) -> None:
    """That of a model whose own weights have changed since, and one of which nothing is known to be equal."""
    dense = AutoModelForCausalLM.from_pretrained(home / "dense")
    dense.transformer.h[0].mlp.c_proj.weight.data.mul_(3)
    dense.save_pretrained(tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(home / "dense" / name, tmp_path / "other")
    flags = ["--data", home / "text.txt", "--max-length", 32, "--tokens", 500, "--json", tmp_path / "f.json"]

    def rows(*argv: object) -> list:
        d2dmoe("eval", *argv, *flags)
        return figures(tmp_path / "f.json")["rows"]

    own = rows("--model", tmp_path / "other")[0]["metric"]["value"]
    beside = rows("--model", home / "first", "--original", tmp_path / "other")
    alone = rows("--model", home / "first")
    assert [row["metric"]["value"] for row in beside] == [row["metric"]["value"] for row in alone]
    assert {row["dense"]["value"] for row in beside} == {own}
    cosine = ["--metric", "cosine_to_dense"]
    assert rows("--model", home / "first", *cosine)[-1]["metric"]["value"] == pytest.approx(1, abs=1e-6)
    for model, original in ((home / "first", tmp_path / "other"), (tmp_path / "other", home / "dense")):
        assert rows("--model", model, "--original", original, *cosine)[-1]["metric"]["value"] < 0.999
    dense.resize_token_embeddings(77)
    dense.save_pretrained(tmp_path / "small")
    refused = {
        home / "first": "is converted itself; give the dense model",
        "nowhere": "nowhere",
        tmp_path / "small": "class, vocabulary and number of labels are not those of",
    }
    for name, sentence in refused.items():
        assert sentence in d2dmoe("eval", "--model", home / "first", "--original", name, *flags, code=1).err


def test_the_default_output_folder(home: Path, d2dmoe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    argv = convert_argv(home / "dense", home / "text.txt", "")
    d2dmoe(*argv, "--eval-tokens", 0)
    assert names(tmp_path / "checkpoints") == {"dense-d2dmoe"}
    assert weights(tmp_path / "checkpoints" / "dense-d2dmoe") == weights(home / "first")
    assert json.loads((tmp_path / "checkpoints" / "dense-d2dmoe" / "results.json").read_text())["rows"] == []


# --- convert: where its options come from ----------------------------------------------------------------------------


def test_flags_win_over_the_recipe_and_the_recipe_over_the_preset(home: Path, d2dmoe, tmp_path: Path) -> None:
    recipe = {"preset": "paper", "split": "random", "seed": 3, "experts": 16, "router_learning_rate": "2e-3"}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({**recipe, "active": 0.5, "eval_tokens": 100}))
    argv = convert_argv(home / "dense", home / "text.txt", tmp_path / "out", "--gate", "topk")
    d2dmoe(*argv, "--recipe", tmp_path / "r.yaml")
    used = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert (used["experts"], used["gate"], used["eval_tokens"]) == (8, "topk", 500)  # flags
    assert (used["split"], used["seed"], used["active"], used["router_learning_rate"]) == ("random", 3, [0.5], 2e-3)
    assert (used["stand_in"], used["thresholds"]) == ("zero", "global")  # preset
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (stored["gate"], stored["stand_in"], len(stored["budgets"])) == ("topk", "zero", 1)


def test_the_paper_preset(home: Path, d2dmoe, tmp_path: Path) -> None:
    d2dmoe(*convert_argv(home / "dense", home / "text.txt", tmp_path / "out", "--preset", "paper", "--active", "0.5"))
    used = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    wanted = {"preset": "paper", "split": "weights", "gate": "max", "stand_in": "zero", "thresholds": "global"}
    assert {key: used[key] for key in wanted} == wanted
    budget = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["budgets"][0]
    assert budget["taus"][0] == budget["taus"][1] > 0  # one threshold for all layers
    assert budget["measured"] == pytest.approx(0.5, abs=0.05)


def budgets_of(folder: Path) -> list[dict]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]["budgets"]


def converted(home: Path, d2dmoe, out: Path, *flags: str) -> dict:
    d2dmoe(*convert_argv(home / "dense", home / "text.txt", out, *flags))
    return json.loads((out / "results.json").read_text())


def test_the_training_free_preset_trains_nothing(home: Path, d2dmoe, tmp_path: Path) -> None:
    results = converted(home, d2dmoe, tmp_path / "out", "--preset", "training-free", "--active", "0.5")
    assert results["router_log"] == []
    assert budgets_of(tmp_path / "out")[0]["measured"] == pytest.approx(0.5, abs=0.05)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    scores = [value for name, value in weights.items() if name.endswith("router.score")]
    assert scores
    assert all(value.any() for value in scores)


def test_the_moefication_preset(home: Path, d2dmoe, tmp_path: Path) -> None:
    results = converted(home, d2dmoe, tmp_path / "out", "--preset", "moefication", "--active", "0.5")
    used = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    wanted = {"gate": "topk", "stand_in": "zero", "router_loss": "bce", "router_target": "activation"}
    assert {key: used[key] for key in wanted} == wanted
    assert results["router_log"][-1]["loss"] < results["router_log"][0]["loss"] or len(results["router_log"]) == 1


def test_goals_other_than_active_fractions(home: Path, d2dmoe, tmp_path: Path) -> None:
    results = converted(home, d2dmoe, tmp_path / "out", "--flops", "0.93", "--max-loss", "50%", "--gate", "share")
    budgets = budgets_of(tmp_path / "out")
    assert sorted(b["objective"] for b in budgets) == ["flops=0.93", "max-loss=0.5"]
    active = next(b["active"] for b in budgets if b["objective"] == "flops=0.93")
    row = next(r for r in results["rows"] if r["active"] == active)
    assert row["flops_fraction_model"] == pytest.approx(0.93, rel=0.02)


@pytest.mark.parametrize(
    "flags",
    [("--split", "shared_experts", "--shared-experts", "2"), ("--allocation", "sensitivity"), ("--gate", "absolute")],
    ids=lambda flags: flags[-1],
)
def test_other_methods_open_again(flags, home: Path, d2dmoe, tmp_path: Path) -> None:
    results = converted(home, d2dmoe, tmp_path / "out", *flags, "--active", "0.25,0.5")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")
    for row in results["rows"][:2]:
        with set_gate(model, active=row["active"]):
            assert row["active_fraction"] == pytest.approx(row["active"], rel=0.15)
            assert all(layer.gate_state.shared == 2 * ("2" in flags) for layer in layers(model))


@pytest.mark.filterwarnings("always:.*was healed in all its weights")
def test_healing_is_in_the_checkpoint_and_leaves_the_dense_twin(home: Path, d2dmoe, tmp_path: Path) -> None:
    heal = ("--active", "0.5", "--heal-tokens", "256", "--heal-learning-rate", "1e-2", "--heal")
    plain = converted(home, d2dmoe, tmp_path / "plain", *heal[:2])
    healed = converted(home, d2dmoe, tmp_path / "healed", *heal, "20")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "healed"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(re.search(r"constants|delta_|linear_", name) for name in changed)
    assert plain["rows"][-1] | {"ms_per_token": 0} == healed["rows"][-1] | {"ms_per_token": 0}
    assert plain["rows"][0]["metric"] != healed["rows"][0]["metric"]
    found = healed["healing"]
    assert "healing" not in plain
    assert (found["steps"], found["kept"]) == (20, found["relative"] < 1)
    assert healed["plan"]["stages"] == ["split", "routers", "calibrate", "heal", "evaluate", "save"]
    assert "1 is exactly the dense model" in (tmp_path / "healed" / "README.md").read_text()
    trained = converted(home, d2dmoe, tmp_path / "all", *heal, "1", "--heal-parameters", "all")
    assert trained["rows"][0]["dense"] == plain["rows"][0]["dense"]  # before it was healed
    evaluated = ("eval", "--model", tmp_path / "all", "--data", home / "text.txt", "--max-length", 32, "--active", 0.5)
    assert "was healed in all its weights" in d2dmoe(*evaluated).err
    assert "was healed" not in d2dmoe(*evaluated, "--original", home / "dense").err
    card = (tmp_path / "all" / "README.md").read_text()
    assert "it was healed in all its weights" in card
    assert "exactly the dense model" not in card


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ([], DEFAULTS),
        ([{"preset": "paper"}], {"gate": "max", "stand_in": "zero"}),
        ([{"preset": "paper", "gate": "topk"}], {"gate": "topk", "stand_in": "zero"}),
        ([{"preset": "paper"}, {"gate": "topk"}], {"gate": "topk", "stand_in": "zero"}),
        ([{"gate": "topk"}, {"preset": "paper"}], {"gate": "topk", "stand_in": "zero"}),
        ([{"preset": "paper"}, {"preset": "default"}], DEFAULTS),
        ([{"max_shard_size": "0.5GB"}], {"max_shard_size": "0.5GB"}),
        ([{"router_tokens": "1e5", "active": "0.1,0.2"}], {"router_tokens": 100_000, "active": [0.1, 0.2]}),
    ],
)
def test_precedence(given: list[dict], wanted: dict) -> None:
    config = resolve(ConvertConfig, *given)
    assert {key: getattr(config, key) for key in wanted} == wanted


# --- convert: the output folder --------------------------------------------------------------------------------------


def test_a_folder_in_use_is_replaced_only_when_asked(home: Path, d2dmoe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    for flags in ([], ["--resume"]):
        result = d2dmoe(*convert_argv(home / "dense", home / "text.txt", out, *flags), code=1)
        assert "is not empty" in result.err
        assert "--overwrite" in result.err
        assert names(tmp_path) == {"out"}
        assert (out / "notes.txt").read_text() == "mine"
    d2dmoe(*convert_argv(home / "dense", home / "text.txt", out, "--overwrite"))
    assert "notes.txt" not in names(out)
    assert weights(out) == weights(home / "first")
    assert names(tmp_path) == {"out"}


def test_folders_beside_the_output_are_not_touched(home: Path, d2dmoe, tmp_path: Path) -> None:
    """Names that the program could make up itself may be the user's own."""
    for name in ("out", "out.old", "out.tmp", "out.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text(name)
    for flags in ([], ["--overwrite"], ["--resume"]):
        result = d2dmoe(*convert_argv(home / "dense", home / "text.txt", tmp_path / "out", *flags), code=1)
        assert "out.partial was not made by d2dmoe; move it away" in result.err
    (tmp_path / "out.partial").rename(tmp_path / "mine.partial")
    d2dmoe(*convert_argv(home / "dense", home / "text.txt", tmp_path / "out", "--overwrite"))
    assert names(tmp_path) == {"out", "out.old", "out.tmp", "mine.partial"}
    for name in ("out.old", "out.tmp", "mine.partial"):
        assert (tmp_path / name / "notes.txt").exists()
    assert weights(tmp_path / "out") == weights(home / "first")


def test_a_failed_rename_puts_the_replaced_folder_back(
    home: Path, d2dmoe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    rename = os.replace

    def fail(source: Path, target: Path) -> None:
        if Path(source).name == "checkpoint":
            raise OSError(1, "Operation not permitted", str(target))
        rename(source, target)

    argv = convert_argv(home / "dense", home / "text.txt", tmp_path / "out", "--overwrite")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        d2dmoe(*argv, code=1)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    d2dmoe(*argv)
    assert weights(tmp_path / "out") == weights(home / "first")


def test_starting_again_keeps_the_replaced_folder_until_the_end(
    home: Path, killed: Path, d2dmoe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(killed / str(list(MOMENTS).index("/replaced")), tmp_path, dirs_exist_ok=True)
    assert names(tmp_path) == {"taken.partial"}
    monkeypatch.setattr("d2dmoe.pipeline.model.train_routers", lambda *_, **__: 1 / 0)
    d2dmoe(*convert_argv(home / "dense", home / "text.txt", tmp_path / "taken", "--overwrite"), code=1)
    assert (tmp_path / "taken" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("inside", ["model", "data", "here"])
def test_overwrite_never_takes_what_it_reads(
    inside: str, home: Path, d2dmoe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(home / "dense", tmp_path / "models" / "dense")
    (tmp_path / "texts").mkdir()
    shutil.copy(home / "text.txt", tmp_path / "texts")
    before = sorted(tmp_path.rglob("*"))
    output = {"model": "models", "data": "texts", "here": "."}[inside]
    result = d2dmoe(*convert_argv("models/dense", "texts/text.txt", output, "--overwrite"), code=1)
    assert "name another folder" in result.err
    assert sorted(tmp_path.rglob("*")) == before


# --- convert: interruption -------------------------------------------------------------------------------------------

# Endings of what has just got its final name when the kill comes, in order; `taken` is a folder that is replaced.
MOMENTS = {
    "recipe.json": "plain",
    "split.safetensors": "plain",
    "router-state": "plain",
    "routers.safetensors": "plain",
    "stand-ins.json": "plain",
    "stand-ins.safetensors": "plain",
    "/replaced": "taken",
    "/published": "published",
}


@pytest.fixture(scope="module")
def killed(home: Path) -> Path:
    """A folder with a subfolder for each moment, in which a conversion was killed at that moment."""
    root = home / "killed"
    jobs = {}
    for number, (ending, output) in enumerate(MOMENTS.items()):
        folder = root / str(number)
        folder.mkdir(parents=True)
        flags = []
        if output == "taken":
            (folder / output).mkdir()
            (folder / output / "notes.txt").write_text("mine")
            flags = ["--overwrite"]
        jobs[ending] = convert_argv(home / "dense", home / "text.txt", folder / output, *flags)
    run_killed(jobs, home)
    return root


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_conversion_is_resumed(moment: str, home: Path, killed: Path, d2dmoe, tmp_path: Path) -> None:
    shutil.copytree(killed / str(list(MOMENTS).index(moment)), tmp_path, dirs_exist_ok=True)
    out = tmp_path / MOMENTS[moment]
    left = {f"{out.name}.partial", *({"published"} if moment == "/published" else ())}
    assert names(tmp_path) == left
    argv = convert_argv(home / "dense", home / "text.txt", out)

    refused = d2dmoe(*argv, code=1)
    assert "--overwrite" in refused.err
    assert "is not empty" in refused.err if moment == "/published" else "--resume" in refused.err
    assert names(tmp_path) == left

    done = d2dmoe(*argv, "--resume")
    assert names(tmp_path) == {out.name}
    assert weights(out) == weights(home / "first")
    assert (out / "config.json").read_bytes() == (home / "first" / "config.json").read_bytes()
    results, reference = (json.loads((folder / "results.json").read_text()) for folder in (out, home / "first"))
    assert results["router_log"] == reference["router_log"]
    assert results["rows"][0]["metric"] == reference["rows"][0]["metric"]
    assert ("split transformer" in done.err) == (moment == "recipe.json")  # stages that were done are not repeated


@pytest.mark.parametrize(
    ("flags", "named"), [(["--seed", 5], "seed"), (["--experts", 16], "experts"), (["--active", "0.3"], "active")]
)
def test_a_changed_key_is_not_resumed(
    flags: list, named: str, home: Path, killed: Path, d2dmoe, tmp_path: Path
) -> None:
    shutil.copytree(killed / "1", tmp_path, dirs_exist_ok=True)
    before = sorted(tmp_path.rglob("*"))
    argv = convert_argv(home / "dense", home / "text.txt", tmp_path / "plain", *flags, "--resume")
    result = d2dmoe(*argv, code=1)
    assert f"{named} changed (" in result.err
    assert "--overwrite" in result.err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", ["model", "data"])
def test_other_files_are_not_resumed(kind: str, home: Path, d2dmoe, tmp_path: Path) -> None:
    """Nor are large ones with other times. Files that were copied again are the same."""
    shutil.copytree(home / "dense", tmp_path / "dense")
    shutil.copy(home / "text.txt", tmp_path)
    argv = convert_argv(tmp_path / "dense", tmp_path / "text.txt", tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("d2dmoe.pipeline.model.train_routers", lambda *_, **__: 1 / 0)
        d2dmoe(*argv, code=1)
        file = tmp_path / ("dense/model.safetensors" if kind == "model" else "text.txt")
        os.utime(file, (1, 1))
        assert "ZeroDivisionError" in d2dmoe(*argv, "--resume", code=1).err  # it went on, up to there
        patch.setattr("d2dmoe.files.DIGESTED", 10)
        os.utime(file, (2, 2))
        refused = [d2dmoe(*argv, "--resume", code=1)]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    refused.append(d2dmoe(*argv, "--resume", code=1))
    for result in refused:
        assert f"the files of --{kind} {tmp_path}" in result.err
        assert "--overwrite" in result.err


def test_a_killed_conversion_is_started_again_with_overwrite(home: Path, killed: Path, d2dmoe, tmp_path: Path) -> None:
    shutil.copytree(killed / "1", tmp_path, dirs_exist_ok=True)
    result = d2dmoe(*convert_argv(home / "dense", home / "text.txt", tmp_path / "plain", "--overwrite", "--seed", 5))
    assert "split transformer" in result.err
    assert names(tmp_path) == {"plain"}


def test_an_interrupt_tells_how_to_go_on(home: Path, d2dmoe, tmp_path: Path) -> None:
    def interrupt(*_, **__) -> None:
        raise KeyboardInterrupt

    argv = convert_argv(home / "dense", home / "text.txt", tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("d2dmoe.pipeline.model.calibrate", interrupt)
        result = d2dmoe(*argv, code=130)
    assert result.err.endswith("d2dmoe: interrupted; --resume goes on\n")
    d2dmoe(*argv, "--resume")
    assert weights(tmp_path / "out") == weights(home / "first")


def test_a_kill_from_outside(home: Path, d2dmoe, tmp_path: Path) -> None:
    """No knowledge of the code: `python -m d2dmoe convert` gets SIGKILL some time after its first stage."""
    argv = convert_argv(home / "dense", home / "text.txt", tmp_path / "out")
    process = subprocess.Popen(
        [sys.executable, "-m", "d2dmoe", *argv], env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "out.partial" / "split.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.stderr.read()
    process.stderr.close()
    d2dmoe(*argv, "--resume")
    assert weights(tmp_path / "out") == weights(home / "first")
    assert names(tmp_path) == {"out"}


# --- convert: the dry run --------------------------------------------------------------------------------------------


def test_dry_run_prints_the_plan_and_writes_nothing(
    home: Path, d2dmoe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--experts", 16, "--router-width", 128, "--stand-in", "mean", "--active", "0.25,0.5,0.75,1"]
    result = d2dmoe("convert", "--model", home / "dense", *flags, "--dry-run", "--json", "f.json")
    assert names(tmp_path) == {"f.json"}
    assert "| transformer.h.0.mlp | ffn | gelu_pytorch_tanh | 16->64 | 16 | 4 |" in result.out
    for word in ("stages: split, routers, calibrate", "parameters: ", "peak memory: ", "disk: ", "time: about "):
        assert word in result.out
    (row,) = figures(tmp_path / "f.json")["rows"]
    dense = sum(p.numel() for p in _load(home / "dense").parameters())
    assert (row["blocks"], row["dense_parameters"]) == (2, dense)
    assert row["added_parameters"] == 2 * (128 * (16 + 16) + 3 * 16 * 16)  # routers, and constants for three budgets


def _load(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.slow
def test_dry_run_of_seven_billion_parameters_takes_no_memory(tmp_path: Path) -> None:
    LlamaConfig(architectures=["LlamaForCausalLM"], dtype="bfloat16").save_pretrained(tmp_path / "llama")
    code = """
import sys, time
from pathlib import Path
import d2dmoe.pipeline.plan
from d2dmoe.cli import main
started = time.process_time()  # not what others do to the machine meanwhile
code = main(["convert", "--model", "llama", "--dry-run", "--json", "f.json"])
print(time.process_time() - started)
status = Path("/proc/self/status").read_text()  # getrusage counts the memory of the process that forked this one
print(next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024)
sys.exit(code)
"""
    result = run_python("-c", code, cwd=tmp_path)
    assert result.code == 0, result.err
    seconds, peak = (float(line) for line in result.out.splitlines()[-2:])
    assert seconds < 30
    assert peak < 1.5e9
    assert names(tmp_path) == {"llama", "f.json"}
    assert result.out.count("| glu | silu | 4096->11008 | 344 | 32 |") == 32
    (row,) = figures(tmp_path / "f.json")["rows"]
    assert row["dense_parameters"] == 6_738_415_616
    assert row["disk_bytes"] == 2 * (row["dense_parameters"] + row["added_parameters"])
    assert row["peak_memory_bytes"] > 4 * row["dense_parameters"]
    assert row["seconds"] > 1000


# --- list, env, eval -------------------------------------------------------------------------------------------------


def test_list_gpt2(home: Path, d2dmoe, tmp_path: Path) -> None:
    result = d2dmoe("list", "--model", home / "dense", "--json", tmp_path / "f.json")
    assert "| transformer.h.*.mlp | 2 | ffn | gelu_pytorch_tanh | 16->64 | yes |" in result.out
    rows = figures(tmp_path / "f.json")["rows"]
    assert all(set(row) >= LIST_KEYS for row in rows)
    assert [row["name"] for row in rows if row["converted"]] == ["transformer.h.0.mlp", "transformer.h.1.mlp"]
    assert rows[0]["parts"] == {"up": "transformer.h.0.mlp.c_fc", "gate": None, "down": "transformer.h.0.mlp.c_proj"}
    assert (rows[0]["kind"], rows[0]["d_model"], rows[0]["width"], rows[0]["why"]) == ("ffn", 16, 64, "")
    others = [row for row in rows if not row["converted"]]
    assert {row["name"] for row in others} > {"lm_head", "transformer.h.0.attn.c_attn"}
    assert [(row["name"], row["kind"]) for row in others if "--head" in row["why"]] == [("lm_head", "head")]
    assert all(row["why"] for row in others)


def test_list_bert(bert: Path, d2dmoe, tmp_path: Path) -> None:
    d2dmoe("list", "--model", bert, "--json", tmp_path / "f.json")
    rows = [row for row in figures(tmp_path / "f.json")["rows"] if row["converted"]]
    first = {"up": "bert.encoder.layer.0.intermediate.dense", "gate": None, "down": "bert.encoder.layer.0.output.dense"}
    assert len(rows) == 2
    assert (rows[0]["kind"], rows[0]["activation"], rows[0]["parts"]) == ("ffn", "gelu", first)


def test_list_llama(llama: Path, d2dmoe, tmp_path: Path) -> None:
    d2dmoe("list", "--model", llama, "--json", tmp_path / "f.json")
    rows = [row for row in figures(tmp_path / "f.json")["rows"] if row["converted"]]
    parts = {role: f"model.layers.1.mlp.{role}_proj" for role in ("up", "gate", "down")}
    assert len(rows) == 2
    assert (rows[1]["kind"], rows[1]["activation"], rows[1]["width"]) == ("glu", "silu", 40)
    assert rows[1]["parts"] == parts


def test_env(d2dmoe, tmp_path: Path) -> None:
    result = d2dmoe("env", "--json", tmp_path / "f.json")
    for fact in (__version__, torch.__version__, "transformers", "processor", "reference"):
        assert fact in result.out
    assert {"backend", "live", "why"} <= set(figures(tmp_path / "f.json")["rows"][0])


def test_eval_of_the_dense_and_the_converted_folder(home: Path, d2dmoe, tmp_path: Path) -> None:
    method = ["--gate", "topk", "--stand-in", "mean", "--allocation", "uniform", "--eval-tokens", 0]
    d2dmoe(*convert_argv(home / "dense", home / "text.txt", tmp_path / "topk", *method))
    flags = ["--data", home / "text.txt", "--max-length", 32, "--tokens", 2000, "--json", tmp_path / "f.json"]
    d2dmoe("eval", "--model", home / "dense", *flags)
    (dense,) = figures(tmp_path / "f.json")["rows"]
    assert set(dense) >= EVAL_KEYS
    assert dense["active_fraction"] == dense["flops_fraction_ffn"] == 1
    assert dense["metric"]["value"] == dense["dense"]["value"]
    assert dense["tokens"] == 2016  # full sequences of 32

    result = d2dmoe("eval", "--model", tmp_path / "topk", *flags, "--active", "0.25,0.5,1")
    rows = figures(tmp_path / "f.json")["rows"]
    assert len(result.out.splitlines()) == 2 + 3
    assert [row["active_fraction"] for row in rows] == pytest.approx([0.25, 0.5, 1.0])
    assert rows[2]["metric"]["value"] == pytest.approx(dense["metric"]["value"], rel=1e-5)
    for row in rows[:2]:
        assert row["metric"]["value"] != pytest.approx(dense["metric"]["value"], rel=1e-3)
        assert row["dense"]["value"] == pytest.approx(dense["metric"]["value"], rel=1e-5)
    assert rows[0]["flops_fraction_ffn"] < rows[1]["flops_fraction_ffn"]

    d2dmoe("eval", "--model", tmp_path / "topk", *flags, "--tau", "0,0.5")
    all_on, half = figures(tmp_path / "f.json")["rows"]
    assert (all_on["active_fraction"], half["active_fraction"]) == (1, 0.5)
    assert all_on["metric"] == rows[2]["metric"]
    assert half["metric"] == rows[1]["metric"]  # the threshold of the stored budget, and its stand-ins

    d2dmoe("eval", "--model", tmp_path / "topk", *flags)
    stored = figures(tmp_path / "f.json")["rows"]
    assert [row["active"] for row in stored] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.filterwarnings("always")
def test_eval_says_when_a_fraction_is_not_stored(home: Path, d2dmoe) -> None:
    flags = ["--data", home / "text.txt", "--max-length", 32, "--tokens", 200]
    result = d2dmoe("eval", "--model", home / "first", *flags, "--active", 0.4)
    assert "d2dmoe: note: active=0.4 is not a stored budget (0.25, 0.5, 0.75)" in result.err


def test_convert_and_eval_an_encoder(bert: Path, home: Path, d2dmoe, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in sentences(60)))
    d2dmoe(*convert_argv(bert, tmp_path / "t.jsonl", tmp_path / "out"))
    rows = figures(tmp_path / "out" / "results.json")["rows"]
    assert {row["metric"]["name"] for row in rows} == {"cosine_to_dense"}
    assert rows[-1]["metric"]["value"] == pytest.approx(1, abs=1e-5)
    assert 0 < rows[0]["metric"]["value"] < 0.9999


# --- the hub, and the program itself ---------------------------------------------------------------------------------


@pytest.mark.slow  # tests/test_hub_mirror.py has the model, and is not
def test_model_and_data_from_the_hub_equal_local_ones(home: Path, d2dmoe, tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for split, count in (("train", 150), ("validation", 30)):
        rows = [{"text": text} for text in sentences(count, seed=count)]
        (texts / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with hub_mirror({"org/tiny": home / "dense"}, {"org/texts": texts}) as endpoint:
        environment = mirror_environment(endpoint, tmp_path / "cache")
        argv = convert_argv("org/tiny", "org/texts", "checkpoints/tiny-d2dmoe")
        result = run_python("-m", "d2dmoe", *argv, cwd=tmp_path, environment=environment)
    assert result.code == 0, result.err
    later = run_python("-m", "d2dmoe", *argv, "--output-dir", "later", cwd=tmp_path, environment=environment)
    d2dmoe(*convert_argv(home / "dense", texts, tmp_path / "local"))
    hub, local = tmp_path / "checkpoints" / "tiny-d2dmoe", tmp_path / "local"
    assert weights(hub) == weights(local)
    assert later.code == 0, later.err  # the hub is gone, and what was downloaded before is found at once
    assert "Retrying" not in later.err
    assert weights(tmp_path / "later") == weights(hub)
    assert weights(hub) != weights(home / "first")  # the data matters
    metrics = [json.loads((folder / "results.json").read_text())["rows"][0]["metric"] for folder in (hub, local)]
    assert metrics[0] == metrics[1]  # the same held-out text
    card = ModelCard.load(hub / "README.md")
    assert (card.data.base_model, card.data.license) == ("org/tiny", "mit")


def test_version_as_a_module(tmp_path: Path) -> None:
    result = run_python("-m", "d2dmoe", "--version", cwd=tmp_path)
    assert (result.code, result.out) == (0, f"d2dmoe {__version__}\n")


def test_without_a_verb_the_usage_is_shown(d2dmoe) -> None:
    assert d2dmoe(code=2).out.startswith("usage: d2dmoe")


@pytest.mark.parametrize("verb", ["convert", "eval", "list", "env"])
def test_help_names_every_flag_once(verb: str, d2dmoe) -> None:
    text = d2dmoe(verb, "--help").out
    assert "--json" in text
    if verb == "convert":
        for name in set(vars(ConvertConfig())) - {"sparsify_options"}:  # any number of flags, --sparsify-…
            assert f"--{name.replace('_', '-')}" in text
