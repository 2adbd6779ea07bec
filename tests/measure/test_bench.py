"""`d2dmoe bench`: its rows, its correctness gate, and the rivals' outputs. No figure is checked: machines differ."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from cli_support import GPT2, save_model
from conftest import randomise_routers
from torch.testing import assert_close
from transformers import GPT2LMHeadModel
from zoo import tiny

from d2dmoe.cli import main
from d2dmoe.config import Budget, D2DMoEConfig, DataConfig, UserError
from d2dmoe.discovery import discover
from d2dmoe.kernels import use_backend
from d2dmoe.measure import bench, peers
from d2dmoe.measure.pairs import make_pair, parse_layer
from d2dmoe.measure.prompts import real_prompts
from d2dmoe.measure.rivals import RIVAL_FUNCTIONS
from d2dmoe.measure.timing import measure
from d2dmoe.moe.layer import GateState, layers
from d2dmoe.moe.loader import attach


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


@pytest.mark.parametrize(
    ("name", "tokens", "phases"),
    [("vit", None, {"prefill"}), ("t5", 6, {"prefill"}), ("bert", 6, {"prefill"}), ("llama", 6, {"prefill", "decode"})],
)
def test_models_of_every_kind_of_input(name, tokens, phases):
    dense = tiny(name).eval()
    model = copy.deepcopy(dense)
    blocks = discover(model).blocks
    for block in blocks:
        block.experts = 8
    attach(model, D2DMoEConfig(blocks=blocks, router_width=8, gate="topk"),
           [torch.arange(b.width) for b in blocks], budgets=0)  # fmt: skip
    randomise_routers(model)
    rows = bench.bench_model(
        model, dense, batches=[1, 3], length=6, settings=[{"active": 0.5}], seconds=0.001, columns=("eager",)
    )
    assert {row["phase"] for row in rows} == phases
    if tokens is None:  # patches and the class token
        config = dense.config
        tokens = (config.image_size // config.patch_size) ** 2 + 1
    found = {(row["phase"], row["batch"]): row for row in rows}
    assert [found["prefill", batch]["tokens"] for batch in (1, 3)] == [tokens, 3 * tokens]
    assert all(row["active_fraction"] == pytest.approx(0.5) and row["sparse_ms"] > 0 for row in rows)
    if "decode" in phases:
        assert [found["decode", batch]["tokens"] for batch in (1, 3)] == [1, 3]


# --- the picture -----------------------------------------------------------------------------------------------------

QUALITY = {0.25: 90.0, 0.5: 70.0}
DENSE_QUALITY = 60.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted GPT-2 with two budgets, and the quality that a conversion would have recorded."""
    folder = save_model("GPT2LMHeadModel", tmp_path_factory.mktemp("bench") / "model", tokenizer=False, **GPT2)
    model = GPT2LMHeadModel.from_pretrained(folder)
    blocks = discover(model).blocks
    for block in blocks:
        block.experts = 8
    budgets = [Budget(active, [1 - active] * len(blocks)) for active in QUALITY]
    attach(model, D2DMoEConfig(blocks=blocks, router_width=8, gate="topk", budgets=budgets),
           [torch.arange(b.width) for b in blocks], budgets=0)  # fmt: skip
    randomise_routers(model)
    model.save_pretrained(folder)
    rows = [
        {
            "active": active, "active_fraction": active + 0.01, "metric": {"name": "perplexity", "value": value},
            "dense": {"value": DENSE_QUALITY},
        }
        for active, value in QUALITY.items()
    ]  # fmt: skip
    (folder / "results.json").write_text(json.dumps({"rows": rows}))
    return folder


BENCH = ("--length", "8", "--seconds", "0.01", "--threads", "1", "--columns", "eager")


def test_the_plot_shows_recorded_quality_at_measured_times(folder, tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    argv = ["bench", "--model", str(folder), "--batch", "1,2", *BENCH, "--json", str(tmp_path / "b.json")]
    assert main([*argv, "--plot", str(tmp_path / "p.svg")]) == 0
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    titles = [axes.get_title() for axes in drawn[0].axes]
    assert titles == ["prefill, 1 × 8 tokens", "decode, 1 × 1 token", "prefill, 2 × 8 tokens", "decode, 2 × 1 token"]
    for number, axes in enumerate(drawn[0].axes):
        quarter, half = rows[2 * number : 2 * number + 2]
        converted, dense = axes.lines
        assert converted.get_xydata().tolist() == [[quarter["sparse_ms"], 90.0], [half["sparse_ms"], 70.0]]
        both = (quarter["dense_ms"] + half["dense_ms"]) / 2
        assert dense.get_xydata().tolist() == [[pytest.approx(both), DENSE_QUALITY]]
        assert [text.get_text() for text in axes.texts] == ["25%", "50%"]
    assert drawn[0].axes[0].get_ylabel() == "perplexity"


def test_the_profile_has_a_line_for_each_model(folder, tmp_path, capsys):
    rounded = ["--expert-dtype", "int8", "--linear-dtype", "int8"]
    argv = ["bench", "--model", str(folder), "--batch", "1", *BENCH, *rounded, "--json", str(tmp_path / "b.json")]
    assert main([*argv, "--profile"]) == 0
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    for row in rows:
        assert [*row["parts"]] == ["eager", "sparse", "all int8", "dense int8"]
        assert all(0 < ms < 1000 for parts in row["parts"].values() for ms in parts.values())
    printed = capsys.readouterr().out.partition("blocks ms")[2]
    assert [line.split("|")[3].strip() for line in printed.splitlines()[2:]] == [
        "eager", "sparse", "all int8", "dense int8", "sparse", "all int8",
    ] * 2  # fmt: skip


def test_a_single_layer_has_no_parts(d2dmoe):
    assert "--profile" in d2dmoe("bench", "--layer", "d=32,f=64,experts=8", "--profile", code=1).err


# --- real text -------------------------------------------------------------------------------------------------------


@pytest.fixture
def text(folder, tmp_path) -> Path:
    """Token ids in two rows of 16 and 19."""
    file = tmp_path / "ids.jsonl"
    file.write_text("".join(json.dumps({"input_ids": list(ids)}) + "\n" for ids in (range(1, 17), range(30, 49))))
    return file


def test_data_is_what_is_timed(folder, text, monkeypatch, capsys):
    seen = []
    forward = GPT2LMHeadModel.forward

    def watched(self, input_ids=None, **options):
        seen.append(input_ids)
        return forward(self, input_ids=input_ids, **options)

    monkeypatch.setattr(GPT2LMHeadModel, "forward", watched)
    active = ["--active", "0.5"]
    assert main(["bench", "--model", str(folder), "--batch", "2", *BENCH, *active, "--data", str(text)]) == 0
    pieces = [list(range(first, first + 8)) for first in (1, 9, 30, 38)]
    batches = {tuple(map(tuple, ids.tolist())) for ids in seen if ids.shape == (2, 8)}
    assert batches == {tuple(map(tuple, pieces[:2])), tuple(map(tuple, pieces[2:]))}
    assert "prefill" in capsys.readouterr().out


@torch.no_grad()
def test_the_active_fraction_is_that_of_the_data(folder, text):
    model = GPT2LMHeadModel.from_pretrained(folder)
    for layer in layers(model):
        layer.gate_state = GateState("max", 0.9)  # as many experts as each token asks for
    prompts = [{"input_ids": torch.arange(first, first + 8)[None]} for first in range(1, 80, 8)]
    each = [bench.active_fraction(model, [prompt]) for prompt in prompts]
    assert bench.active_fraction(model, prompts) == pytest.approx(sum(each) / len(each))
    assert len(set(each)) > 1


def test_pieces_are_no_longer_than_the_model_can_take(folder, tmp_path):
    config = GPT2LMHeadModel.from_pretrained(folder).config
    file, limit = tmp_path / "long.jsonl", config.n_positions
    file.write_text(json.dumps({"input_ids": [n % 50 for n in range(5 * limit)]}))
    prompts = real_prompts(str(folder), config, None, DataConfig(data=str(file), max_length=4 * limit), 1)
    (first, *_) = prompts(GPT2LMHeadModel(config), 1)
    assert first["input_ids"].shape == (1, limit)


@pytest.mark.parametrize("rivals", [[], ["--rivals"]], ids=["", "rivals"])
def test_texts_longer_than_the_model_takes_are_refused(rivals, folder, monkeypatch, capsys):
    limit = GPT2LMHeadModel.from_pretrained(folder).config.n_positions
    lengths = []
    monkeypatch.setattr(bench, "bench_model", lambda *_, length, **__: lengths.append(length) or [])
    monkeypatch.setattr(peers, "bench_peers", lambda *_, length, **__: lengths.append(length) or [])
    most = limit - (not rivals)  # decoding adds a token
    for length in (most, most + 1):
        code = main(["bench", "--model", str(folder), "--length", str(length), *rivals])
        assert code == (length > most)
    assert f"--length {most + 1}: the model takes {limit} tokens" in capsys.readouterr().err
    main(["bench", "--model", str(folder), *rivals])
    assert lengths == [most, min(most, 128)]


DATA_REFUSED = {
    "a layer": (["--layer", "d=8,f=16,experts=4"], "a single layer has random inputs"),
    "too little": (["--batch", "5"], "4 pieces of 8 tokens, and --batch 5 takes as many"),
}


@pytest.mark.parametrize("case", DATA_REFUSED)
def test_data_that_cannot_be_timed_is_refused(case, folder, text, monkeypatch, capsys):
    words, said = DATA_REFUSED[case]
    for function in ("bench_layer", "bench_model"):
        monkeypatch.setattr(bench, function, lambda *_, **__: pytest.fail("timed"))
    what = words if "--layer" in words else ["--model", str(folder), *words]
    assert main(["bench", *what, *BENCH, "--data", str(text)]) == 1
    assert said in capsys.readouterr().err


def test_encoder_decoders_are_timed_on_random_tokens_only():
    config = tiny("t5").config
    with pytest.raises(UserError, match="encoder-decoder"):
        real_prompts("t5", config, None, DataConfig(data="x.txt"), 1)


PLOTS_REFUSED = {
    "a layer": (["--layer", "d=8,f=16,experts=4"], "p.png", "--plot draws the quality of a model"),
    "not recorded": (["--active", "0.25,0.3"], "p.png", "records no quality at --active 0.3"),
    "suffix": ([], "p.txt", "must end in one of .png"),
}


@pytest.mark.parametrize("case", PLOTS_REFUSED)
def test_plots_that_cannot_be_drawn_are_refused_before_anything_is_timed(case, folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    words, name, said = PLOTS_REFUSED[case]
    for function in ("bench_layer", "bench_model"):
        monkeypatch.setattr(bench, function, lambda *_, **__: pytest.fail("timed"))
    what = words if "--layer" in words else ["--model", str(folder), *words]
    assert main(["bench", *what, *BENCH, "--plot", str(tmp_path / name)]) == 1
    assert said in capsys.readouterr().err


BAD_NUMBERS = {
    "seconds": ["nan", "inf", "0", "-1"],
    "threads": ["100000", "-1"],
    "tokens": ["0", "1.5", "-3", "nan", "inf"],
    "batch": ["0", "2.5"],
    "length": ["0", "-1"],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD_NUMBERS.items() for v in values], ids=str)
def test_numbers_that_cannot_be_measured_are_refused(name, value, d2dmoe):
    refused = d2dmoe("bench", "--layer", "d=32,f=64,experts=8", f"--{name}={value}", code=1)
    assert f"--{name} " in refused.err
    assert "must be" in refused.err


@pytest.mark.parametrize(("experts", "active", "ran"), [(10, 0.25, 3), (10, 0.35, 4), (8, 0.3125, 3), (6, 0.25, 2)])
def test_the_fraction_is_that_of_the_experts_that_run(experts, active, ran):
    (row,) = bench.bench_layer(
        {"d": 8, "width": 4 * experts, "experts": experts, "glu": False, "act": None}, tokens=[3], actives=[active],
        dtype=torch.float32, seconds=0.001, columns=("eager",),
    )  # fmt: skip
    assert row["active_fraction"] == pytest.approx(ran / experts)
