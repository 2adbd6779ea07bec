"""What only a GPU can show: nothing is left behind on the CPU. Run with `make test-gpu`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cli_support import GPT2, convert_argv, run_in_process, save_model, sentences
from test_convert import QUICK, token_batches
from test_training import CONFIG, batch_at, loss_of, toy
from torch.testing import assert_close
from zoo import tiny

from d2dmoe.convert import convert_model
from d2dmoe.discovery import dummy_inputs
from d2dmoe.moe.gating import set_gate
from d2dmoe.training import train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]


def test_training_moves_model_and_batches():
    model = toy()
    log = train(model, batch_at, loss_of, CONFIG)
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    assert log[-1]["loss"] < log[0]["loss"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["gpt2", "bert", "phi3", "t5-gated"])
@pytest.mark.parametrize("gate", ["topk", "share"])
def test_a_model_is_converted_where_it_is(name, device, gate):
    model = tiny(name).to(device)
    inputs = dummy_inputs(model)
    with torch.no_grad():
        dense = model(**inputs)[0]
    convert_model(model, replace(QUICK, gate=gate, heal=2, heal_tokens=64), token_batches())
    assert {p.device.type for p in model.parameters()} == {device}
    with torch.no_grad(), set_gate(model, active=1):
        assert_close(model(**inputs)[0], dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda:0"])
def test_convert_on_a_device(device, tmp_path: Path, capsys):
    save_model("GPT2LMHeadModel", tmp_path / "dense", **GPT2)
    (tmp_path / "text.txt").write_text("\n".join(sentences(200)))
    argv = convert_argv(tmp_path / "dense", tmp_path / "text.txt", tmp_path / "out", "--device", device)
    result = run_in_process(capsys, *argv)
    assert result.code == 0, result.err
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [row["active_fraction"] for row in rows] == pytest.approx([0.25, 0.5, 0.75, 1.0], abs=0.05)
