"""Fine-tuning a converted model: what learns, and that plain DDP works."""

from __future__ import annotations

import copy
import os
from datetime import timedelta

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_memory import small
from torch import multiprocessing
from torch.testing import assert_close

from d2dmoe import UserError, set_gate, trainable
from d2dmoe.moe.layer import layers


def batch(seed: int) -> torch.Tensor:
    return torch.randint(5, 60, (4, 8), generator=torch.Generator().manual_seed(seed))


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> None:
    optimizer.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


def fresh(kind: dict, active: float) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = trainable(small(), **kind).eval()  # no dropout, so that processes agree
    set_gate(model, active=active)
    return model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def moved(before: torch.nn.Module, after: torch.nn.Module) -> set[str]:
    pairs = zip(before.named_parameters(), after.named_parameters(), strict=True)
    return {name.rpartition("mlp.")[2] for (name, a), (_, b) in pairs if "mlp" in name and not torch.equal(a, b)}


EXPERTS = {"up_weight", "up_bias", "down_weight", "down_bias"}
ROUTERS = {"router.hidden", "router.score"}
STAND_INS = {"constants", "delta_in", "delta_out", "linear_in", "linear_out"}


@pytest.mark.parametrize(
    ("kind", "active", "learn"),
    [
        ({}, 0.5, EXPERTS),
        ({}, 1, EXPERTS),
        ({"routers": True}, 0.5, EXPERTS | ROUTERS),
        ({"stand_ins": True}, 0.25, EXPERTS | STAND_INS),
    ],
    ids=["default", "everything on", "routers", "stand-ins"],
)
def test_what_learns(kind, active, learn):
    model, optimizer = fresh(kind, active)
    before = copy.deepcopy(model)
    for seed in range(2):
        step(model, optimizer, batch(seed))
    assert moved(before, model) == learn


def process(rank: int, kind: dict, active: float, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # whatever this machine calls itself
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    torch.set_num_threads(1)
    model, optimizer = fresh(kind, active)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    for seed in range(3):
        step(wrapped, optimizer, batch(seed)[2 * rank : 2 * rank + 2])
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # taking gloo's threads down in order has hung


def test_plain_ddp_equals_one_process(tmp_path):
    multiprocessing.spawn(process, ({"routers": True}, 0.5, str(tmp_path)), nprocs=2)
    model, optimizer = fresh({"routers": True}, 0.5)
    for seed in range(3):
        step(model, optimizer, batch(seed))
    ours = model.state_dict()
    for rank in range(2):
        theirs = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in ours.items():
            assert_close(theirs[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_a_trained_copy_of_a_block_has_the_gate_of_its_block():
    model = small()
    adapted = get_peft_model(model, LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=["mlp"]))
    assert len(layers(adapted)) == 2 * 2
    set_gate(adapted, active=0.25)
    assert {layer.gate_state.tau for layer in layers(adapted)} == {0.75}
    with set_gate(adapted, active=0.5, layers=[-1]):
        assert [layer.gate_state.tau for layer in layers(adapted)] == [0.75, 0.75, 0.5, 0.5]
    with pytest.raises(UserError, match=r"no converted layer 2; there are 2"):
        set_gate(adapted, active=0.5, layers=2)
