"""`recipes/run.py`: every form of every recipe is a list of valid command lines, and a run goes on where it stopped."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import pytest
import yaml
from cli_support import GPT2, save_model, sentences
from conftest import ROOT

sys.path.insert(0, str(ROOT / "recipes"))
import run as recipes

from d2dmoe.cli import app, main
from d2dmoe.cli.flags import given
from d2dmoe.config import ConvertConfig, UserError, resolve
from d2dmoe.sparsify.options import SparsifyConfig, further_options, resolve_sparsify, training_arguments

FORMS = [(name, form) for name in recipes.names() for form in recipes.FORMS]


def parsed(words: list[str]) -> argparse.Namespace:
    arguments, arguments_left = app._parser().parse_known_args(words)
    arguments.further = arguments_left
    return arguments


@pytest.mark.parametrize(("name", "form"), FORMS, ids=[f"{name}-{form}" for name, form in FORMS])
def test_every_command_is_one_that_the_program_takes(name, form, tmp_path):
    steps = recipes.open_recipe(name, form).steps
    assert len({step.name for step in steps}) == len(steps)
    for step in steps:
        if step.command[1:3] != ["-m", "d2dmoe"]:
            script, *words = step.command[1:]
            assert Path(script).is_file()
            assert all(word in Path(script).read_text() for word in words if word.startswith("--"))
            continue
        arguments = parsed(step.command[3:])
        verb = step.command[3]
        if verb == "sparsify":
            flags = {**given(arguments, SparsifyConfig), **further_options(arguments.further)}
            training_arguments(*reversed(resolve_sparsify(flags)), str(tmp_path))
        else:
            assert not arguments.further, step.shown
        if verb == "convert":
            resolve(ConvertConfig, given(arguments, ConvertConfig))


@pytest.mark.parametrize("name", recipes.names())
def test_each_recipe_says_what_it_is(name):
    content = yaml.safe_load((ROOT / "recipes" / name / "recipe.yaml").read_text())
    assert set(content) <= {"about", "authors", "model", "base", "data", "noise", "tokens", "full", "quick", "paper",
                            *recipes.SECTIONS}  # fmt: skip
    for form in ("quick", "paper"):
        assert set(content[form]) <= {"model", "base", "data", "tokens", *recipes.SECTIONS}


def test_the_readme_shows_what_is_recorded():
    assert recipes.recorded_table() in (ROOT / "recipes" / "README.md").read_text()


def test_an_outcome_is_kept_and_shown(tmp_path, monkeypatch):
    recorded = json.loads((ROOT / "recipes" / "bert_emotion" / "outcome.json").read_text())["full"]
    (tmp_path / "bert_emotion").mkdir()
    for name in ("README.md", "bert_emotion/recipe.yaml"):
        (tmp_path / name).write_text((ROOT / "recipes" / name).read_text())
    monkeypatch.setattr(recipes, "HERE", tmp_path)
    for points in (recorded["points"][:1], recorded["points"][:2]):
        recipes.record("bert_emotion", "quick", {**recorded, "points": points})
    text = (tmp_path / "README.md").read_text()
    assert text.count("### bert_emotion --quick") == text.count(recipes.BEGIN) == text.count(recipes.END) == 1
    assert recipes.recorded_table() in text
    assert text.partition(recipes.END)[2] == (ROOT / "recipes" / "README.md").read_text().partition(recipes.END)[2]
    lines = [line for line in text.splitlines() if line.startswith(("| 0.1 |", "| 0.25 |", "| 0.5 |"))]
    assert len([line for line in lines if line.startswith("| 0.1 |")]) == 1


@pytest.mark.parametrize("form", ["full", "quick"])
def test_base_data_and_seed_are_the_users(form, tmp_path):
    recipe = recipes.open_recipe("bert_emotion", form, base="my/model", data="my.txt", seed=3)
    steps = {step.name: step.shown for step in recipe.steps}
    assert "base" not in steps
    assert "--model my/model --data my.txt" in steps["sparsify"]
    assert all("--seed 3" in steps[name] for name in ("sparsify", "convert-ours", "convert-theirs"))
    assert "--data my.txt" in steps["eval-ours"]
    assert "--part held_out" in steps["eval-ours"]  # it is the text that was trained on
    other = recipes.open_recipe("bert_emotion", form, data="my.txt", eval_data="other.txt")
    shown = {step.name: step.shown for step in other.steps}["eval-ours"]
    assert "--data other.txt" in shown
    assert "--part" not in shown


def test_what_is_wrong_is_said(tmp_path, monkeypatch, capsys):
    assert recipes.main(["bert"]) == 1
    assert "bert: no such recipe; there are bert_emotion" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    recipe = recipes.open_recipe("gpt2_wikitext2", base="missing")
    recipe.folder.mkdir(parents=True)
    step = recipe.steps[0]
    step.product.write_text("{}")
    (recipe.folder / "steps.json").write_text(json.dumps({step.name: {"command": "another"}}))
    with pytest.raises(UserError, match="holds what `another` has made"):
        recipes.run(recipe)


def test_a_plan_of_the_authors_settings(tmp_path, capsys):
    """A BERT-base of which only the config is there, as the hub would give it first."""
    from transformers import BertConfig

    config = BertConfig(architectures=["BertForSequenceClassification"], num_labels=6)
    config.save_pretrained(tmp_path / "bert")
    argv = ["bert_emotion", "--paper", "--dry-run", "--base", str(tmp_path / "bert"), "--tflops", "10"]
    assert recipes.main(argv) == 0
    out = capsys.readouterr().out
    assert "parameters: 109 million" in out
    # 2,500 steps of 64 sentences of 19 tokens, six FLOPs for each token and parameter
    assert "sparsify: 3 million tokens, 0.1 hours at 10 TFLOP/s; 1.8 GB" in out
    assert "--experts 128 --router-width 128" in out.replace("\n", " ")


def test_a_run_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    """All steps, by a small model and in this process."""
    monkeypatch.chdir(tmp_path)
    save_model("GPT2LMHeadModel", tmp_path / "dense", **GPT2)
    Path("text.txt").write_text("\n".join(sentences(200)))
    ran: list[str] = []

    def execute(step):
        ran.append(step.name)
        if len(ran) == 3:
            raise UserError("stopped")
        assert main(step.command[3:]) == 0
        return {"command": step.recorded, "minutes": 0.1, "peak_mb": 100 + len(ran)}

    monkeypatch.setattr(recipes, "execute", execute)
    recipe = recipes.open_recipe("gpt2_wikitext2", "quick", base="dense", data="text.txt")
    small = {"max_length": 32, "batch_size": 8}
    recipe.sections |= {
        "convert": {**small, "active": [0.25, 0.5], "experts": 4, "router_tokens": 600, "calibration_tokens": 600,
                    "router_batch": 64, "router_width": 4, "eval_tokens": 300, "device": "cpu"},
        "eval": {**small, "tokens": 300, "part": "held_out"}, "bench": {"batch": [1], "length": 8, "seconds": 0.01,
                                                                        "columns": "eager"},
    }  # fmt: skip
    with pytest.raises(UserError, match="stopped"):
        recipes.run(recipe)
    found = recipes.run(recipe)
    names = [step.name for step in recipe.steps]
    assert ran == [*names[:3], *names[2:]]
    assert recipes.run(recipe)["points"] == found["points"]
    assert len(ran) == len(names) + 1  # nothing more
    rows = json.loads(Path(recipe.folder, "eval-ours.json").read_text())["rows"]
    assert [point["active"] for point in found["points"]] == [0.25, 0.5]
    assert found["points"][0]["ours"] == rows[0]["metric"]["value"] != found["points"][0]["theirs"]
    assert found["points"][1]["times"][0]["speedup"] > 0
    assert {t["phase"] for t in found["points"][0]["times"]} == {"prefill", "decode"}
    assert all(t["int8"] > 0 < t["dense_int8"] for t in found["points"][0]["times"])
    assert json.loads(Path(recipe.folder, "eval-int8.json").read_text())["rows"][0]["expert_dtype"] == "int8-dynamic"
    assert found["points"][0]["int8"] == pytest.approx(found["points"][0]["ours"], rel=0.05)
    assert found["peak_mb"] == 100 + len(ran)
    assert f"| 0.5 | {rows[1]['active_fraction']:.3f} |" in recipes.outcome_table(found)
    assert "milliseconds go at a budget of 0." in recipes.outcome_table(found)
    assert Path(recipe.folder, "report.html").exists()
    assert str(tmp_path) not in json.dumps(found)


@pytest.mark.parametrize(
    ("metric", "qualities", "shown"),
    [("accuracy", (0.90, 0.92, 0.93), "0.25, the smallest"), ("perplexity", (70, 60.4, 60.1), "0.25, the smallest"),
     ("accuracy", (0.5, 0.6, 0.7), "0.5, the largest, and none keeps 99 %")],
)  # fmt: skip
def test_the_profile_is_of_the_smallest_budget_that_keeps_the_quality(metric, qualities, shown):
    times = {"phase": "prefill", "batch": 1, "parts": {"eager": {"blocks": 3.0}, "sparse": {"blocks": 1.25}}}
    points = [
        {"active": active, "ours": quality, "ours_active_fraction": active, "times": [times]}
        for active, quality in zip((0.1, 0.25, 0.5), qualities, strict=True)
    ]
    base = {"accuracy": 0.925, "perplexity": 60.0}[metric]
    text = recipes.profile_table({"base": base, "metric": metric, "points": points})
    assert shown in text
    assert "| 1.25 |" in text


def test_a_step_is_a_process_whose_memory_is_told(tmp_path):
    code = f"open({str(tmp_path / 'done')!r}, 'w').close(); x = bytearray(200_000_000)"
    step = recipes.Step("one", [sys.executable, "-c", code], tmp_path / "done")
    told = recipes.execute(step)
    assert told["peak_mb"] > 190
    assert (tmp_path / "done").exists()
    with pytest.raises(UserError, match="step two ended with code 3"):
        recipes.execute(recipes.Step("two", [sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "no"))


@pytest.mark.slow
@pytest.mark.parametrize("name", recipes.names())
def test_the_quick_form_finds_what_is_recorded(name, tmp_path, data_dir, monkeypatch):
    """Quality within the stated noise; on a machine like that of the record, minutes within a half as well."""
    file = ROOT / "recipes" / name / "outcome.json"
    recorded = json.loads(file.read_text()).get("quick") if file.exists() else None
    if recorded is None:
        pytest.skip(f"no quick outcome of {name} is recorded")
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", str(recorded["machine"]["threads"]))
    found = recipes.run(recipes.open_recipe(name, "quick", folder=str(tmp_path / "run")))
    noise = yaml.safe_load((ROOT / "recipes" / name / "recipe.yaml").read_text())["noise"]
    for ours, theirs in zip(found["points"], recorded["points"], strict=True):
        assert ours["ours"] == pytest.approx(theirs["ours"], rel=noise)
        assert ours["ours_flops_fraction_model"] == pytest.approx(theirs["ours_flops_fraction_model"], abs=0.03)
    if found["machine"]["processor"] == recorded["machine"]["processor"]:
        assert found["minutes"] == pytest.approx(recorded["minutes"], rel=0.5)
