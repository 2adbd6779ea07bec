"""`d2dmoe bench`: its rows, its correctness gate, and the rivals' outputs. No figure is checked: machines differ."""

from __future__ import annotations

import json

import pytest
import torch
from torch.testing import assert_close

from d2dmoe.cli import main
from d2dmoe.config import UserError
from d2dmoe.kernels import use_backend
from d2dmoe.measure import bench
from d2dmoe.measure.pairs import make_pair, parse_layer
from d2dmoe.measure.rivals import RIVAL_FUNCTIONS
from d2dmoe.measure.timing import measure
from d2dmoe.moe.layer import GateState


@pytest.mark.parametrize("glu", [False, True], ids=["ffn", "glu"])
@pytest.mark.parametrize("rival", RIVAL_FUNCTIONS)
@torch.no_grad()
def test_rivals_compute_the_same(rival, glu):
    _, layer = make_pair(32, 64, 8, glu, None, torch.float32)
    layer.gate_state = GateState("topk", 0.5)
    x = torch.randn(9, 32)
    with use_backend("reference"):
        assert_close(RIVAL_FUNCTIONS[rival](layer, x), layer(x), rtol=1e-4, atol=1e-5)


def test_layer_rows_and_table(tmp_path, capsys):
    command = "bench --layer d=32,f=64,experts=8 --tokens 1,5 --active 0.25,1 --seconds 0.01 --columns eager,loop"
    assert main([*command.split(), "--json", str(tmp_path / "b.json")]) == 0
    written = json.loads((tmp_path / "b.json").read_text())
    rows = written["rows"]
    assert [(r["tokens"], r["active_fraction"]) for r in rows] == [(1, 0.25), (1, 1.0), (5, 0.25), (5, 1.0)]
    keys = {
        "device",
        "dtype",
        "phase",
        "tokens",
        "active_fraction",
        "backend",
        "dense_ms",
        "sparse_ms",
        "speedup",
        "ideal",
    }
    for row in rows:
        assert keys <= row.keys()
        assert row["phase"] == "layer"
        assert row["speedup"] == pytest.approx(row["dense_ms"] / row["sparse_ms"])
        assert row["ideal"] == 1 / row["active_fraction"]
    assert "loop" in rows[0]["ms"]
    assert "loop ms" in capsys.readouterr().out


@torch.no_grad()
def test_nothing_is_timed_when_outputs_differ():
    dense, layer = make_pair(32, 64, 8, False, None, torch.float32)
    layer.gate_state = GateState("topk", 0.5)
    bench.check_layer(dense, layer, torch.randn(4, 32))
    layer.down_weight[3] += 0.1
    with pytest.raises(RuntimeError, match="not timed"):
        bench.check_layer(dense, layer, torch.randn(4, 32))


@pytest.mark.parametrize("text", ["", "d=8", "d=8,f=16,experts=3", "d=8,f=16,experts=x", "d=8,f=16,experts=4,z=1"])
def test_layers_that_are_none(text):
    with pytest.raises(UserError, match="--layer"):
        parse_layer(text)


def test_measured_in_turn_and_often_enough():
    calls = []
    functions = {name: lambda x, n=name: calls.append((n, x)) for name in "ab"}
    times = measure(functions, [0, 1, 2], seconds=0.001)
    assert min(len(t) for t in times.values()) >= 5
    assert {x for _, x in calls} == {0, 1, 2}


def test_cpu_clock_wants_one_thread(capsys):
    threads = torch.get_num_threads()
    try:
        assert main(["bench", "--layer", "d=8,f=16,experts=4", "--clock", "cpu", "--threads", "2"]) == 1
    finally:
        torch.set_num_threads(threads)
    assert "--threads 1" in capsys.readouterr().err
