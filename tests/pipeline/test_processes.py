"""Conversions by several processes: the same checkpoint folder, written once."""

import json

import pytest
import torch
from cli_support import convert_argv, names, run_in_process, run_python, weights
from safetensors.torch import load_file
from torch import nn

from d2dmoe.config import TrainingConfig
from d2dmoe.training import train

SCRIPT = """
import os, sys
sys.path.insert(0, {tests!r})
from accelerate import PartialState
from safetensors.torch import save_file
PartialState(cpu=True)
from pipeline.test_processes import trained
found = trained(1)
if PartialState().is_main_process:
    save_file(found, "two.safetensors")
os._exit(0)  # as the command does: a thread of Gloo may abort a process that shuts down
"""
LAUNCH = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]  # as accelerate's, without MPI


class Regression(nn.Module):
    """Two linear maps of which each step uses one, as healing does with its budgets."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.maps = nn.ModuleList([nn.Linear(5, 2), nn.Linear(5, 2)])

    def forward(self, batch):
        x, y, which = batch
        return (self.maps[which](x) - y).square().mean()


def trained(accumulation: int) -> dict[str, torch.Tensor]:
    """Weights after six steps of two micro-batches."""

    def batch_at(number: int):
        g = torch.Generator().manual_seed(number)
        x = torch.randn(8, 5, generator=g)
        return x, x[:, :2] * 2 + 1, number // 2 % 2

    model, config = Regression(), TrainingConfig(steps=6, accumulation=accumulation, save_every=0)
    train(model, batch_at, lambda model, batch: model(batch), config, in_turn=True)
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.timeout(240)
def test_two_processes_are_one_with_twice_the_micro_batches(tmp_path):
    from conftest import ROOT

    (tmp_path / "script.py").write_text(SCRIPT.format(tests=str(ROOT / "tests")))
    result = run_python(*LAUNCH, tmp_path / "script.py", cwd=tmp_path, timeout=200)
    assert result.code == 0, result.err
    two = load_file(tmp_path / "two.safetensors")
    for key, value in trained(2).items():
        torch.testing.assert_close(two[key], value)


@pytest.mark.timeout(240)
def test_a_launched_conversion_writes_one_whole_checkpoint(home, capsys, tmp_path):
    argv = convert_argv(home / "dense", home / "text.txt", "out", "--heal", "4", "--heal-tokens", "64", "--device",
                        "cpu", "--router-tokens", "400", "--active", "0.25,0.5", "--json", "out.json")  # fmt: skip
    result = run_python(*LAUNCH, "-m", "d2dmoe", *argv, cwd=tmp_path, timeout=200)
    assert result.code == 0, result.err
    assert result.out.count("| active |") == 1
    assert names(tmp_path) == {"out", "out.json"}
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["active"] for row in rows] == [0.25, 0.5, 1.0]
    found = run_in_process(capsys, "eval", "--model", tmp_path / "out", "--data", home / "text.txt", "--active", "1",
                           "--max-length", "32", "--part", "held_out", "--tokens", "500")  # fmt: skip
    assert found.code == 0, found.err
    assert f"{rows[-1]['metric']['value']:.4g}" in found.out
    assert weights(tmp_path / "out") != weights(home / "first")
