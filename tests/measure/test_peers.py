"""`bench --rivals`: every way to run the model in one table, and what is left out is said."""

from __future__ import annotations

import json

import pytest
import torch
from zoo import tiny

from d2dmoe.measure import peers
from d2dmoe.measure.peers import Last


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """What compiles for minutes is a test of its package; the others need none, or fail as they would without it."""

    def broken(dense, inputs):
        raise RuntimeError("no such thing\nhere")

    few = {name: peers.PEERS[name] for name in ("bf16", "int8-dynamic, our kernels")}
    monkeypatch.setattr(peers, "PEERS", {**few, "absent": (broken, ("no_such_package",)), "broken": (broken, ())})


def test_the_verb(without_compiler, home, tmp_path, d2dmoe):
    argv = ["bench", "--model", home / "first", "--data", home / "text.txt", "--length", 8, "--active", 0.5, "--rivals"]
    said = d2dmoe(
        *argv, "--batch", "1,2", "--threads", 1, "--clock", "cpu", "--seconds", 0.01, "--json", tmp_path / "r"
    )
    assert "absent is left out: not installed: no_such_package" in said.err
    assert "broken is left out: no such thing" in said.err
    assert "batch 1" in said.out
    assert "batch 2" in said.out
    rows = json.loads((tmp_path / "r").read_text())["rows"]
    one = {row["column"]: row for row in rows if row["batch"] == 1}
    forms = [f"0.5 active, {form}" for form in ("fp32", "bf16", "int8", "int8-dynamic")]
    assert [*one] == ["dense", "bf16", "int8-dynamic, our kernels", *forms]
    assert one["dense"]["speedup"] == one["dense"]["close"] == one["dense"]["active_fraction"] == 1
    assert 0 < one["0.5 active, fp32"]["active_fraction"] < 1
    assert all(0 <= row["close"] <= 1 for row in rows)
    assert all(row["speedup"] == pytest.approx(one["dense"]["ms"] / row["ms"]) for row in one.values())


@pytest.mark.parametrize("flags", [["--layer", "d=32,f=64,experts=8"], ["--expert-dtype", "int8"], ["--keep-dense"]])
def test_what_does_not_go_together_is_said(flags, home, d2dmoe):
    model = [] if flags[0] == "--layer" else ["--model", home / "first"]
    assert "--rivals and --" in d2dmoe("bench", *model, *flags, "--rivals", code=1).err


def test_a_dense_model_is_refused(home, d2dmoe):
    assert "not converted" in d2dmoe("bench", "--model", home / "dense", "--rivals", code=1).err


@torch.no_grad()
def test_the_main_output_is_what_counts():
    ids = torch.arange(6)[None]
    model = tiny("gpt2")
    assert torch.equal(Last(model, ["input_ids"])(ids), model(ids, logits_to_keep=1).logits)
    model = tiny("bert-classifier")
    assert torch.equal(Last(model, ["input_ids"])(ids), model(ids).logits)


def test_closeness():
    logits = torch.tensor([[[0.0, 2.0, 1.0]], [[3.0, 2.0, 1.0]]])
    other = torch.tensor([[[0.0, 1.0, 2.0]], [[9.0, 2.0, 1.0]]])
    assert peers._close([logits], [logits]) == 1
    assert peers._close([other], [logits]) == 0.5
    hidden = torch.randn(2, 5, 8)
    assert peers._close([2 * hidden], [hidden]) == pytest.approx(1)
    assert peers._close([-hidden], [hidden]) == pytest.approx(-1)
