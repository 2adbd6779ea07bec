"""Every verb on a checkpoint of `--attention mlp`, which holds no dense model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from cli_support import GPT2, convert_argv, run_in_process, save_model, sentences, weights
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

import d2dmoe
from d2dmoe.cli import main
from d2dmoe.pipeline.folder import CHECKS

NETWORKS = ("--attention", "mlp", "--attention-tokens", 4000, "--attention-batch", 64, "--heal", 2, "--active", 0.5)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("networks")
    (root / "text.txt").write_text("\n".join(sentences(120)))
    save_model("GPT2LMHeadModel", root / "dense", **GPT2)
    argv = convert_argv(root / "dense", root / "text.txt", root / "first", *NETWORKS, "--preset", "paper",
                        "--stand-in", "constants")  # fmt: skip
    assert main(argv) == 0
    return root


def test_figures_are_against_the_dense_model(root):
    rows = json.loads((root / "first" / "results.json").read_text())["rows"]
    half, full = rows
    assert (half["active"], full["active"]) == (0.5, 1.0)
    assert half["dense"] == full["dense"]
    assert full["metric"]["value"] != full["dense"]["value"]
    assert 1 <= full["flops_fraction_attention"] < 1.2


def test_the_card_says_that_there_is_no_dense_model(root):
    card = (root / "first" / "README.md").read_text()
    assert "2 feed-forward blocks and 4 networks in the places of projections around attention" in card
    assert "and not the dense model" in card
    assert "Without `import d2dmoe` it does not open" in card
    assert "opens as the dense model" not in card
    assert "all experts on" in (root / "first" / "report.html").read_text()


def test_verify(root, capsys, tmp_path):
    result = run_in_process(capsys, "verify", root / "first", "--json", tmp_path / "rows.json")
    assert result.code == 0, result.err
    found = {row["check"]: row["found"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert [*found] == [*CHECKS]
    assert found["dense twin"] == "none: 4 projections around attention are networks (--attention mlp)"
    assert found["experts"] == "6 layers, 18 tensors bit-equal"
    assert found["all on equals dense"].startswith("not compared")


def test_export_and_list_refuse(root, capsys, tmp_path):
    result = run_in_process(capsys, "export", "--dense", root / "first", tmp_path / "out")
    assert result.code == 1
    assert "holds no dense model" in result.err
    assert "use the model it was made from" in result.err
    result = run_in_process(capsys, "list", "--model", root / "first")
    assert result.code == 1
    assert "give the dense model it came from" in result.err


def test_an_adapter_of_a_replaced_projection_is_refused(root, capsys, tmp_path):
    peft = pytest.importorskip("peft")
    for target, code in (("c_attn", 1), ("c_fc", 0)):
        model = peft.get_peft_model(
            GPT2LMHeadModel.from_pretrained(root / "dense"),
            peft.LoraConfig(target_modules=[target], fan_in_fan_out=True),
        )
        model.save_pretrained(tmp_path / target)
        result = run_in_process(capsys, "export", "--adapter", tmp_path / target, "--model", root / "first",
                                tmp_path / f"{target}-out")  # fmt: skip
        assert result.code == code, result.err
        if code:
            assert "in whose place a network stands (--attention mlp); train one without c_attn" in result.err


@pytest.mark.filterwarnings("always:.*holds no dense model")
def test_eval_and_bench_say_what_dense_is(root, capsys):
    result = run_in_process(capsys, "eval", "--model", root / "first", "--data", root / "text.txt",
                            "--max-length", 32)  # fmt: skip
    assert result.code == 0, result.err
    assert "what is called dense here is this model with all experts on" in result.err
    assert "attention FLOPs" in result.out
    result = run_in_process(capsys, "bench", "--model", root / "first", "--batch", 1, "--length", 8,
                            "--seconds", 0.05, "--columns", "eager")  # fmt: skip
    assert result.code == 0, result.err
    assert "dense times are of one with its shapes and random weights" in result.err
    assert "decode" in result.out


def test_merge(root):
    model = AutoModelForCausalLM.from_pretrained(root / "first")
    d2dmoe.set_gate(model, active=0.5)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        before = model(ids).logits
        d2dmoe.merge(model)
        assert torch.allclose(model(ids).logits, before, atol=1e-5)


def test_a_stripped_folder_does_not_open_as_the_dense_model(root, capsys, tmp_path):
    """Another program was told to ignore the sizes, and saved: its projections are random."""
    shutil.copytree(root / "first", tmp_path / "copy")
    dense = load_file(root / "dense" / "model.safetensors")
    save_file(dense, tmp_path / "copy" / "model.safetensors", metadata={"format": "pt"})
    result = run_in_process(capsys, "verify", tmp_path / "copy")
    assert result.code == 1
    assert "the networks in the places of projections" in result.err


def test_resuming_takes_the_networks_that_are_there(root, capsys, monkeypatch):
    argv = convert_argv(root / "dense", root / "text.txt", root / "again", *NETWORKS, "--preset", "paper",
                        "--stand-in", "constants")  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr("d2dmoe.pipeline.model.train_routers", lambda *_, **__: 1 / 0)
        assert run_in_process(capsys, *argv).code == 1
    assert (root / "again.partial" / "networks.safetensors").is_file()
    monkeypatch.setattr("d2dmoe.pipeline.model.distil_networks", lambda *_, **__: 1 / 0)
    result = run_in_process(capsys, *argv, "--resume")
    assert result.code == 0, result.err
    assert weights(root / "again") == weights(root / "first")


def test_a_plan(root, capsys):
    result = run_in_process(capsys, "convert", "--model", root / "dense", "--attention", "mlp:o", "--dry-run")
    assert result.code == 0, result.err
    assert "stages: networks, split" in result.out
    assert "| transformer.h.0.attn.c_proj | attention | relu | 16->8 | 8 | 1 |" in result.out
    assert "c_attn" not in result.out


def test_a_model_without_attention_is_refused(root, capsys, tmp_path):
    save_model("GPT2LMHeadModel", tmp_path / "dense", **GPT2)
    result = run_in_process(capsys, *convert_argv(tmp_path / "dense", root / "text.txt", tmp_path / "out",
                                                  "--attention", "mlp:q"))  # fmt: skip
    assert result.code == 1
    assert "a fused one is converted with all its roles" in result.err
