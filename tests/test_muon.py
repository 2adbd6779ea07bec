"""Muon for inner matrices and AdamW for the rest: the same as the two by themselves, and resumable."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_training import CONFIG, assert_same, batch_at, interrupt, loss_of, toy
from torch import nn
from torch.testing import assert_close
from zoo import tiny

from d2dmoe.muon import MuonWithAdamW, inner_matrices
from d2dmoe.training import train

MUON = replace(CONFIG, optimizer="muon", weight_decay=0.1)


def test_it_is_muon_and_adamw_side_by_side():
    config = replace(MUON, schedule="linear", adam_betas=(0.6, 0.8), clip=0)
    model, plain = toy(), toy()
    train(model, batch_at, loss_of, config)
    muon = torch.optim.Muon([plain[0].weight, plain[4].weight], weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    vectors = [p for p in plain.parameters() if p.ndim == 1]
    adamw = torch.optim.AdamW(vectors, betas=(0.6, 0.8), weight_decay=0)
    for step in range(12):
        plain.zero_grad()
        loss_of(plain, batch_at(step)).backward()
        for optimizer in (muon, adamw):
            optimizer.param_groups[0]["lr"] = 1e-2 * min(step / 3, (12 - step) / 9)
            optimizer.step()
    for (name, value), wanted in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert_close(value, wanted, msg=lambda m, n=name: f"{n}: {m}")
    assert not torch.equal(model[0].weight, toy()[0].weight)


@pytest.mark.parametrize("step", [5, 7, 11])
def test_interrupted_and_resumed_is_bit_equal(tmp_path, step):
    whole, resumed = toy(dropout=0.3), toy(dropout=0.3)
    train(whole, batch_at, loss_of, MUON)
    interrupt(MUON, tmp_path / "state", toy(dropout=0.3), step)
    train(resumed, batch_at, loss_of, MUON, state_dir=tmp_path / "state", resume=True)
    assert_same(resumed, whole)


@pytest.mark.parametrize(("family", "outside"), [("gpt2", {"wte", "wpe"}), ("bert-classifier", {"classifier"})])
def test_embeddings_and_heads_are_left_to_adamw(family, outside):
    model = tiny(family)
    inner = {id(p) for p in inner_matrices(model)}
    names = {name for name, p in model.named_parameters() if id(p) in inner}
    assert names
    assert all(p.ndim == 2 for p in inner_matrices(model))
    others = {name for name, p in model.named_parameters() if p.ndim == 2 and id(p) not in inner}
    assert outside <= {part for name in others for part in name.split(".")}
    assert all("embed" in name or outside & set(name.split(".")) for name in others)


def test_frozen_matrices_are_nobodys():
    model = toy()
    model[0].weight.requires_grad_(False)
    assert [id(p) for p in inner_matrices(model)] == [id(model[4].weight)]
    train(model, batch_at, loss_of, MUON)
    assert torch.equal(model[0].weight, toy()[0].weight)


def test_a_closure_is_refused():
    layer = nn.Linear(3, 2, bias=False)
    optimizer = MuonWithAdamW([layer.weight], [], lr=0.1, betas=(0.9, 0.99), weight_decay=0.0)
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: 0.0)
