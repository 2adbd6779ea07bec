"""The longest sequence that a model takes, found in what it looks up for positions, and rows longer than that."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cli_support import BERT, convert_argv, save_model
from zoo import CASES, tiny

from d2dmoe.config import DataConfig
from d2dmoe.discovery import dummy_inputs, skeleton
from d2dmoe.discovery.positions import fit_to_positions, position_limit

LIMITS = {"roberta": 63, "mpnet": 62, "clip": 64, "siglip": 64}  # of 64, counted from behind the padding token 0 or 1
TEXT = [c.name for c in CASES if getattr(tiny(c.name), "main_input_name", "") == "input_ids"]


def runs(model: torch.nn.Module, length: int) -> bool:
    inputs = dummy_inputs(model)
    for name in ("input_ids", "decoder_input_ids"):
        if name in inputs:
            inputs[name] = torch.full((2, length), 7)
    try:
        model(**inputs)
    except (IndexError, RuntimeError, ValueError):
        return False
    return True


@pytest.mark.parametrize("name", TEXT)
@torch.no_grad()
def test_the_limit_is_the_length_from_which_on_the_model_fails(name):
    model = tiny(name)
    limit = position_limit(skeleton(type(model), model.config))
    if limit is None:  # the config's limit holds
        assert runs(model, 64)
    else:
        assert limit == LIMITS.get(name, 64)
        assert runs(model, limit)
        assert not runs(model, limit + 1)


@pytest.mark.parametrize(("asked", "given"), [(512, 32), (33, 32), (32, 32), (31, 31), (8, 8)])
def test_roberta_takes_two_tokens_less_than_its_config_says(asked, given):
    from transformers import RobertaConfig, RobertaForMaskedLM

    sizes = {**BERT, "max_position_embeddings": 34, "pad_token_id": 1}
    config = RobertaConfig(**sizes)
    data = DataConfig(max_length=asked)
    assert fit_to_positions(data, RobertaForMaskedLM, config) == replace(data, max_length=given)


@pytest.mark.parametrize("suffix", ["ids", "text"])
def test_rows_longer_than_the_limit_are_cut_to_it(suffix: str, d2dmoe, tmp_path: Path) -> None:
    sizes = {**BERT, "max_position_embeddings": 34, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    save_model("RobertaForMaskedLM", tmp_path / "roberta", **sizes)
    rows = [[3 + (i * j) % 250 for j in range(1, 20 + 3 * i)] for i in range(60)]
    content = [{"text": " ".join(map(str, row))} if suffix == "text" else {"input_ids": row} for row in rows]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    argv = convert_argv(tmp_path / "roberta", tmp_path / "t.jsonl", tmp_path / "out", "--max-length", 512)
    d2dmoe(*argv)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["rows"][-1]["active_fraction"] == 1
    if suffix == "ids":
        evaluation = ("eval", "--model", tmp_path / "out", "--data", tmp_path / "t.jsonl", "--max-length", 512)
        d2dmoe(*evaluation, "--json", tmp_path / "f.json")
        pieces = [len(row[i : i + 32]) for row in rows for i in range(0, len(row), 32)]
        counted = json.loads((tmp_path / "f.json").read_text())["rows"][0]["tokens"]
        assert counted == sum(n for n in pieces if n > 1)
