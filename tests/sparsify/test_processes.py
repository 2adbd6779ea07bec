"""Several processes train as one with the batches of all of them."""

from __future__ import annotations

import json
import os

import pytest
import torch
from cli_support import GPT2, names, run_python, save_model, sentences
from conftest import ROOT
from safetensors.torch import load_file

from d2dmoe.discovery.blocks import discover
from d2dmoe.sparsify.masks import token_counts, token_masks
from d2dmoe.sparsify.options import SparsityConfig
from d2dmoe.sparsify.terms import SparsityTerm
from sparsify.support import collate, samples, tiny

TWO = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]  # what accelerate starts on GPUs
PLAIN = (
    "--max-length", 32, "--sequences", "documents", "--train-sampling-strategy", "sequential", "--max-steps", 3,
    "--optim", "sgd", "--learning-rate", 0.1, "--lr-scheduler-type", "constant", "--warmup-steps", 0, "--max-grad-norm",
    0, "--activation", "relu", "--alpha", 0.01, "--save-steps", 100, "--eval-tokens", 300, "--device", "cpu",
)  # fmt: skip
SHARDED = """
import sys
sys.path.insert(0, {tests!r})
import torch
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from sparsify.test_processes import step, tiny
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
model = tiny("LlamaForCausalLM", torch.float32)
for layer in model.model.layers:
    fully_shard(layer)
fully_shard(model)
step(model, slice(4 * rank, 4 * rank + 4), processes=2)
tensors = {{k: p.full_tensor().detach().clone() for k, p in model.named_parameters()}}
if rank == 0:
    save_file(tensors, "two.safetensors")
torch.distributed.destroy_process_group()
"""


def step(model: torch.nn.Module, part: slice, processes: int) -> None:
    """One SGD step on the penalty and the task loss of this process's rows, weighted by their share of all tokens."""
    items = samples("LlamaForCausalLM", 8)
    batch, whole = (collate("LlamaForCausalLM", rows) for rows in (items[part], items))
    share = float(token_counts(batch)[0] / token_counts(whole)[0]) * processes
    term = SparsityTerm(model.train(), discover(tiny("LlamaForCausalLM")).blocks, SparsityConfig(locality=0.2))
    with term.collecting(token_masks(batch)) as found:
        loss = model(**batch).loss
    targets, all_targets = ((b["labels"][:, 1:] >= 0).sum() for b in (batch, whole))
    (loss * (targets / all_targets * processes) + torch.stack(found["main"]).mean() * share).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad


@pytest.fixture
def place(tmp_path):
    save_model("GPT2LMHeadModel", tmp_path / "dense", **GPT2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    lines = sentences(60)  # some are cut, so that the processes have different numbers of tokens
    rows = [json.dumps({"text": line[: 9 + 7 * i % 31]}) for i, line in enumerate(lines)]
    (tmp_path / "text.jsonl").write_text("\n".join(rows))
    return tmp_path


@pytest.mark.timeout(240)
@pytest.mark.parametrize("more", [(), ("--lora-rank", 2)], ids=["full", "lora"])
def test_two_processes_are_one_with_twice_the_batch(place, more):
    argv = ["-m", "d2dmoe", "sparsify", "--model", "dense", "--data", "text.jsonl", *PLAIN, *more]
    one = run_python(*argv, "--batch-size", 8, "--output-dir", "one", cwd=place)
    assert one.code == 0, one.err
    argv += ["--batch-size", 4, "--output-dir", "two", "--json", "two.json"]
    two = run_python(*TWO, *argv, cwd=place, timeout=200)
    assert two.code == 0, two.err
    ours, wanted, before = (load_file(place / n / "model.safetensors") for n in ("two", "one", "dense"))
    for key, value in wanted.items():
        torch.testing.assert_close(ours[key], value)
    assert max(float((wanted[k] - before[k]).abs().max()) for k in wanted) > 1e-3
    assert two.out.count("| after |") == 1
    assert {"dense", "one", "two", "text.jsonl", "two.json"} == names(place)
    assert json.loads((place / "two.json").read_text())["processes"] == 2


@pytest.mark.timeout(240)
def test_a_sharded_model_has_the_gradient_of_a_whole_one(tmp_path):
    (tmp_path / "script.py").write_text(SHARDED.format(tests=str(ROOT / "tests")))
    result = run_python(*TWO, tmp_path / "script.py", cwd=tmp_path, environment={**os.environ}, timeout=200)
    assert result.code == 0, result.err
    model = tiny("LlamaForCausalLM", torch.float32)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    step(model, slice(0, 8), processes=1)
    found = load_file(tmp_path / "two.safetensors")
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(found[key], parameter.detach(), msg=lambda text, key=key: f"{key}: {text}")
    assert any(float((before[k] - v).abs().max()) > 1e-2 for k, v in found.items())


def test_sharding_without_gpus_is_refused(place):
    argv = ["-m", "d2dmoe", "sparsify", "--model", "dense", "--data", "text.jsonl", *PLAIN, "--fsdp"]
    result = run_python(*argv, "--output-dir", "out", cwd=place)
    assert result.code == 1
    assert "--fsdp: accelerate shards a model over GPUs only" in result.err
    assert names(place) == {"dense", "text.jsonl"}
