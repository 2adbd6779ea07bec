"""`recipes/train_sparse.py`: the YAML is valid, and what is trained already is not trained again."""

import os
import sys
from pathlib import Path

import pytest
import yaml
from cli_support import GPT2, save_model, sentences
from conftest import ROOT

sys.path.insert(0, str(ROOT / "recipes"))
import compare
import train_sparse as recipe

YAMLS = sorted((ROOT / "recipes").glob("sparsity*.yaml"))


@pytest.mark.parametrize("file", YAMLS, ids=[path.stem for path in YAMLS])
def test_every_training_and_conversion_of_the_file_is_valid(file, monkeypatch):
    content = yaml.safe_load(file.read_text())
    found = recipe.trainings(content, content["seeds"])
    assert len(found) == len(content["seeds"]) * len(content["sparsify"])
    assert len({keys["output_dir"] for _, _, keys in found}) == len(found)
    monkeypatch.setattr(compare.hub, "read_config", lambda name: None)  # the folders are not there yet
    folders = {keys["output_dir"] for _, _, keys in found}
    for run in compare.runs_of(content, {}):
        assert not run.config.model.startswith(content["folder"]) or run.config.model in folders


def test_trained_once(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model("GPT2LMHeadModel", tmp_path / "dense", **GPT2)
    (tmp_path / "text.txt").write_text("\n".join(sentences(100)))
    training = {"model": "dense", "data": "text.txt", "max_length": 32, "max_steps": 4, "eval_tokens": 300,
                "device": "cpu"}  # fmt: skip
    content = {
        "seeds": [3], "folder": "out", "training": training,
        "sparsify": {"none": {"regulariser": "none"}, "l1": {"regulariser": "l1", "alpha": "1e-2"}},
    }  # fmt: skip
    Path("small.yaml").write_text(yaml.safe_dump(content))
    assert recipe.main(["--config", "small.yaml"]) == 0
    table = capsys.readouterr().out
    assert table.count("| none | 3 |") == table.count("| l1 | 3 |") == 1
    times = [os.stat(f"out/{name}-3/model.safetensors").st_mtime_ns for name in ("none", "l1")]
    assert recipe.main(["--config", "small.yaml"]) == 0
    assert capsys.readouterr().out == table
    assert times == [os.stat(f"out/{name}-3/model.safetensors").st_mtime_ns for name in ("none", "l1")]
    content["training"]["alpha"] = -1
    content["sparsify"] = {"none": {}}
    Path("wrong.yaml").write_text(yaml.safe_dump(content))
    assert recipe.main(["--config", "wrong.yaml"]) == 1
    assert "--alpha -1" in capsys.readouterr().err
