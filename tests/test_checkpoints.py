"""The models that travel with the repository: small, whole, and, where converted, dense and skipping as they should."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from conftest import ROOT

import d2dmoe
from d2dmoe.cli import main
from d2dmoe.discovery import dummy_inputs
from d2dmoe.moe.gating import stored_config

FOLDERS = sorted(
    path.parent for path in (ROOT / "checkpoints").glob("*/config.json") if "d2dmoe" not in path.parent.name
)
CONVERTED = [folder for folder in FOLDERS if "quantization_config" in json.loads((folder / "config.json").read_text())]


def size(folder) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_they_are_small():
    assert all(size(folder) <= 20e6 for folder in FOLDERS)
    assert sum(map(size, FOLDERS)) <= 60e6


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_each_has_a_card_and_no_pickle(folder):
    assert (folder / "README.md").is_file()
    assert not [f for f in folder.rglob("*") if f.suffix in (".bin", ".pt", ".pkl", ".pickle")]


@pytest.mark.parametrize("folder", CONVERTED, ids=lambda folder: folder.name)
def test_converted_ones_verify_and_skip(folder, capsys):
    assert main(["verify", str(folder)]) == 0
    kind = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    model = kind.from_pretrained(folder).eval()
    inputs, found = dummy_inputs(model), []
    with torch.no_grad():
        for active in (1.0, *stored_config(model).budgets.actives):
            with d2dmoe.set_gate(model, active=active):
                found.append(model(**inputs).logits)
    assert all(logits.isfinite().all() for logits in found)
    assert not any(torch.equal(found[0], logits) for logits in found[1:])
