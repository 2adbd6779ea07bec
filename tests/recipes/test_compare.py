"""The recipe that makes the quality table: its figures, and that it can be stopped and started again."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import statistics
import sys
from pathlib import Path

import pytest
import yaml
from cli_support import BERT, GPT2, WORDS, save_model, sentences
from conftest import ROOT

from d2dmoe.config import PRESETS

SPEC = importlib.util.spec_from_file_location("recipe_compare", ROOT / "recipes" / "compare.py")
recipe = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = recipe
SPEC.loader.exec_module(recipe)

SMALL = {"experts": 8, "router_width": 8, "router_tokens": 400, "router_batch": 16, "max_length": 32,
         "calibration_tokens": 400}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model and a classifier, and a log of two methods and two seeds of each."""
    home = tmp_path_factory.mktemp("compare")
    classes = dict(zip(WORDS[:3], range(3), strict=True))
    save_model("GPT2LMHeadModel", home / "lm", **GPT2)
    names = {"id2label": {i: n for n, i in classes.items()}, "label2id": classes}
    save_model("BertForSequenceClassification", home / "classifier", **BERT, **names)
    for name, seed in (("seen", 1), ("unseen", 2)):
        rows = [f"{text};{WORDS[len(text) % 3]}" for text in sentences(60, seed)]
        (home / f"{name}.txt").write_text("\n".join(["text;label_name", *rows]))
    models = [{"name": n, "model": "{data}/" + n, "data": "{data}/seen.txt", "eval_data": "{data}/unseen.txt", **SMALL}
              for n in ("lm", "classifier")]  # fmt: skip
    methods = {"paper": {"preset": "paper"}, "mine": {"preset": "default", "stand_in": "mean"}}
    content = {"seeds": [0, 1], "active": [0.25, 0.5], "methods": methods, "models": models}
    (home / "q.yaml").write_text(yaml.safe_dump(content))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("D2DMOE_DATA", str(home))
        assert recipe.main(["--config", str(home / "q.yaml"), "--log", str(home / "log.jsonl")]) == 0
    return home


@pytest.fixture
def run(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("D2DMOE_DATA", str(home))

    def main(*more: object, log: Path = home / "log.jsonl") -> str:
        capsys.readouterr()
        assert recipe.main([str(a) for a in ("--config", home / "q.yaml", "--log", log, *more)]) == 0
        return capsys.readouterr().out

    return main


def entries(log: Path) -> list[dict]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_every_run_is_in_the_log(home):
    done = entries(home / "log.jsonl")
    assert {(e["model"], e["method"], e["seed"]) for e in done} == {
        (m, p, s) for m in ("lm", "classifier") for p in ("paper", "mine") for s in (0, 1)
    }
    assert {e["rows"][0]["metric"]["name"] for e in done if e["model"] == "classifier"} == {"accuracy"}
    rows = [[(row["active"], row.get("oracle", False)) for row in e["rows"]] for e in done]
    assert rows == [[(0.25, False), (0.5, False), (0.5, True)]] * 8


def test_the_table_is_means_over_seeds_and_their_ratio(home, run, monkeypatch):
    monkeypatch.setattr(recipe, "convert_and_evaluate", lambda *_: pytest.fail("it is in the log"))
    lines = [line.strip("| ").split(" | ") for line in run().splitlines() if line.startswith("|")]
    figures = ["measured active", "model FLOPs", "loss to oracle's at 0.5", "minutes"]
    assert lines[0] == ["model", "method", "seeds", "0.25", "0.5", *figures]
    table = {tuple(line[:2]): line[3] for line in lines[2:]}
    done = entries(home / "log.jsonl")

    def rows(model: str, method: str) -> list[dict]:
        return [e["rows"][0] for e in done if (e["model"], e["method"]) == (model, method)]

    lost = {m: [math.log(r["metric"]["value"] / r["dense"]["value"]) for r in rows("lm", m)] for m in ("mine", "paper")}
    mean = {method: statistics.mean(values) for method, values in lost.items()}
    spread = abs(lost["mine"][0] - lost["mine"][1]) / math.sqrt(2)
    start = f"{mean['mine']:.4f} ± {spread:.4f} ({mean['mine'] / mean['paper']:.2f}×"
    assert table["lm", "mine"].startswith(start)
    assert table["lm", "paper"].split("(")[1] == "1.00×; 1.00×)"  # at its own FLOPs it is itself
    kl = statistics.mean(r["metrics"]["kl_to_dense"] for r in rows("classifier", "paper"))
    accuracy = statistics.mean(r["metric"]["value"] for r in rows("classifier", "paper"))
    assert table["classifier", "paper"].startswith(f"{kl:.4f} ± ")
    assert table["classifier", "paper"].endswith(f"(1.00×; 1.00×), {100 * accuracy:.2f} %")
    true = [e["rows"][2] for e in done if (e["model"], e["method"]) == ("lm", "mine")]
    oracle = statistics.mean(math.log(r["metric"]["value"] / r["dense"]["value"]) for r in true)
    half = [e["rows"][1] for e in done if (e["model"], e["method"]) == ("lm", "mine")]
    routed = statistics.mean(math.log(r["metric"]["value"] / r["dense"]["value"]) for r in half)
    assert {tuple(line[:2]): line[-2] for line in lines[2:]}["lm", "mine"] == f"{routed / oracle:.2f}"


def test_the_paper_is_interpolated_in_the_logarithm_and_not_beyond_its_points():
    def row(active: float, flops: float, loss: float) -> dict:
        metric = {"metric": {"name": "embedding", "value": 1 - loss}}
        return {"active": active, "flops_fraction_model": flops, "metrics": {}, **metric}

    paper = [{"rows": [row(0.25, 0.6, 0.4), row(0.5, 0.8, 0.1)]}]
    assert recipe.paper_at_flops(paper, 0.6) == pytest.approx(0.4)
    assert recipe.paper_at_flops(paper, 0.7) == pytest.approx(0.2)
    assert recipe.paper_at_flops(paper, 0.59) is None
    assert recipe.paper_at_flops(paper, 0.81) is None


def test_a_line_that_was_cut_short_is_run_again_and_nothing_else(home, run, tmp_path):
    log = tmp_path / "log.jsonl"
    whole = (home / "log.jsonl").read_text()
    log.write_text(whole[:-200])
    table = run(log=log)
    lines = log.read_text().splitlines()
    assert "\n".join(lines[:7]) == "\n".join(whole.splitlines()[:7])
    assert len(lines) == 9
    last, before = json.loads(lines[8]), entries(home / "log.jsonl")[7]
    assert [row["metric"] for row in last["rows"]] == [row["metric"] for row in before["rows"]]
    assert [line.split(" | ")[:5] for line in table.splitlines()] == [
        line.split(" | ")[:5] for line in run().splitlines()
    ]


def test_a_changed_recipe_is_run_again(home, run, monkeypatch):
    asked = []

    def fake(wanted):
        asked.append(wanted)
        return {**wanted.identity, "minutes": 1.0, "rows": entries(home / "log.jsonl")[0]["rows"]}

    monkeypatch.setattr(recipe, "convert_and_evaluate", fake)
    monkeypatch.setattr(recipe, "append", lambda *_: None)
    content = yaml.safe_load((home / "q.yaml").read_text())
    content["methods"]["mine"]["gate"] = "max"
    (home / "changed.yaml").write_text(yaml.safe_dump(content))
    run("--config", home / "changed.yaml", "--only", "lm", "--seeds", "1")
    assert [(r.model, r.method, r.seed, r.recipe["gate"]) for r in asked] == [("lm", "mine", 1, "max")]


def test_a_changed_default_is_run_again_and_a_moved_folder_is_not(home, run, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(recipe, "convert_and_evaluate", lambda wanted: asked.append(wanted) or pytest.fail("ran"))
    moved = tmp_path / "elsewhere" / "lm"
    shutil.copytree(home / "lm", moved)
    run("--only", "lm", "--folder", f"lm={moved}")
    monkeypatch.setitem(PRESETS["default"], "split", "random")
    with pytest.raises(pytest.fail.Exception):
        run("--only", "lm")
    assert [r.method for r in asked] == ["mine"]


def test_a_model_can_have_a_method_its_own_way(home, monkeypatch):
    monkeypatch.setenv("D2DMOE_DATA", str(home))
    content = yaml.safe_load((home / "q.yaml").read_text())
    content["models"][0]["methods"] = {"mine": {"stand_in": "constants"}}
    stand_ins = {(r.model, r.method): r.config.stand_in for r in recipe.runs_of(content, {})}
    assert stand_ins["lm", "mine"] == "constants"
    assert (stand_ins["lm", "paper"], stand_ins["classifier", "mine"]) == ("zero", "mean")


def test_flags_describe_one_model(home, monkeypatch, capsys):
    done = entries(home / "log.jsonl")[0]
    monkeypatch.setattr(recipe, "_done", lambda run, log: {**done, **run.identity})
    argv = ["--model", home / "lm", "--data", home / "seen.txt", "--eval-data", home / "unseen.txt", "--seeds", 0]
    assert recipe.main([str(a) for a in [*argv, "--active", "0.25,0.5", "--experts", 8]]) == 0
    out = capsys.readouterr().out
    assert "| lm | paper | 1 |" in out
    assert "| lm | default | 1 |" in out
    assert "* dense lm: perplexity " in out


@pytest.mark.parametrize("extra", [{"splti": "random"}, {"split": "dice"}])
def test_a_wrong_key_is_found_before_anything_runs(extra, home, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("D2DMOE_DATA", str(home))
    monkeypatch.setattr(recipe, "convert_and_evaluate", lambda *_: pytest.fail("something ran"))
    content = yaml.safe_load((home / "q.yaml").read_text())
    content["methods"]["new"] = extra
    (tmp_path / "q.yaml").write_text(yaml.safe_dump(content))
    assert recipe.main(["--config", str(tmp_path / "q.yaml"), "--log", str(tmp_path / "l.jsonl")]) == 1
    assert "split" in capsys.readouterr().err
