"""Linear maps beside the experts in int8: one result everywhere, parameters, names and checkpoints as they were."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from test_weights import needs_native, small
from torch import nn
from zoo import tiny

from d2dmoe import ConvertConfig, UserError, set_expert_dtype, set_gate, set_linear_dtype
from d2dmoe.config.projections import ProjectionState
from d2dmoe.convert import convert_model
from d2dmoe.data.batches import Batches
from d2dmoe.discovery import dummy_inputs
from d2dmoe.kernels import use_backend
from d2dmoe.kernels.quads import rotated
from d2dmoe.measure.evaluate import evaluate
from d2dmoe.moe import int8_linear, int8_plans, projection
from d2dmoe.moe.int8_linear import Int8Map
from d2dmoe.moe.layer import layers
from d2dmoe.moe.projection import DynamicProjection

CLOSE = {torch.float32: 1e-2, torch.bfloat16: 0.1}  # relative error; a value between two steps goes to either
DTYPE = pytest.mark.parametrize("linear_dtype", ["int8", "int8-dynamic"])


@pytest.fixture(autouse=True)
def small_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models of these tests are tiny."""
    monkeypatch.setattr(int8_linear, "LEAST", 1)


def texts(rows: int, vocabulary: int = 60) -> Batches:
    ids = torch.randint(5, vocabulary, (rows, 12), generator=torch.Generator().manual_seed(4)).tolist()
    return Batches([{"input_ids": row} for row in ids], 4)


def first(output) -> torch.Tensor:
    return next(v for v in output.values() if isinstance(v, torch.Tensor))


def apart(y: torch.Tensor, expected: torch.Tensor) -> float:
    return float((y - expected).float().norm() / expected.float().norm())


@needs_native
@DTYPE
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("name", ["gpt2", "bert", "llama", "falcon", "vit", "t5"])
@torch.no_grad()
def test_the_library_computes_what_pytorch_does(name, dtype, linear_dtype):
    model = tiny(name).to(dtype)
    inputs = dummy_inputs(model)
    dense, kinds = first(model(**inputs)), [type(m) for m in model.modules()]
    taken = set_linear_dtype(model, linear_dtype)
    maps = [m for m in model.modules() if isinstance(m, Int8Map)]
    assert len(maps) == sum(isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D" for m in tiny(name).modules())
    assert taken == sum(m.weight.numel() + 4 * m.matrix().shape[0] for m in maps)
    y = first(model(**inputs))
    with use_backend("reference"):
        assert apart(y, first(model(**inputs))) < CLOSE[dtype]
    assert 0 < apart(y, dense) < 0.1
    set_linear_dtype(model, None)
    assert [type(m) for m in model.modules()] == kinds
    assert torch.equal(first(model(**inputs)), dense)


@needs_native
@DTYPE
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)], ids=str)
@torch.no_grad()
def test_each_map_is_the_formula(dtype, near, linear_dtype):
    model = tiny("gpt2").to(dtype)
    set_linear_dtype(model, linear_dtype)
    for layer in (m for m in model.modules() if isinstance(m, Int8Map)):
        x = torch.randn(5, layer.matrix().shape[1]).to(dtype)
        given, dynamic = [x, layer.matrix()], linear_dtype == "int8-dynamic"
        given = [_whole(rotated(t)) for t in given] if dynamic else [x.double(), _whole(given[1])]
        bias = None if layer.bias is None else layer.bias.double()
        assert apart(layer(x).double(), nn.functional.linear(*given, bias)) < near


def _whole(x: torch.Tensor) -> torch.Tensor:
    scale = x.float().abs().amax(-1, keepdim=True) / 127
    return (x.float() / scale).round().double() * scale.double()


@needs_native
@torch.no_grad()
def test_outputs_follow_the_weights_and_copies_keep_the_setting():
    model = tiny("gpt2")
    set_linear_dtype(model, "int8")
    inputs, layer = dummy_inputs(model), model.transformer.h[0].attn.c_attn
    changes = [
        lambda: layer.weight.mul_(1.5), lambda: layer.weight.data.mul_(1.5), lambda: layer.bias.data.add_(1),
        lambda: setattr(layer, "weight", nn.Parameter(torch.randn_like(layer.weight))),
        lambda: model.load_state_dict(tiny("gpt2").state_dict()), lambda: model.to(torch.bfloat16),
    ]  # fmt: skip
    for change in changes:
        before = first(model(**inputs))
        change()
        y = first(model(**inputs))
        assert not torch.equal(y, before)
        with use_backend("reference"):
            assert apart(y, first(model(**inputs))) < CLOSE[y.dtype]
        twin = copy.deepcopy(model)
        assert twin.transformer.h[0].attn.c_attn.linear_dtype == "int8"
        assert torch.equal(first(twin(**inputs)), y)


@needs_native
@pytest.mark.parametrize("folded", [0, int8_linear.LEAST], ids=["factors", "folded"])
@pytest.mark.parametrize(
    "attention", ["low-rank", "channels", "heads", pytest.param("low-rank:o", marks=pytest.mark.slow)]
)
def test_converted_models(attention, folded, tmp_path, monkeypatch):
    monkeypatch.setattr(projection, "FOLDED", folded)
    model = tiny("gpt2")
    quick = {"experts": 8, "router_width": 8, "router_tokens": 64, "router_batch": 16, "calibration_tokens": 400}
    config = ConvertConfig(
        **quick, active=[0.5], attention=attention, attention_active=0.5, head="svd-softmax", head_active=0.5
    )
    convert_model(model, config, texts(60))
    projected = [m for m in model.modules() if isinstance(m, DynamicProjection)]
    inputs = {"input_ids": torch.arange(12)[None]}
    plain = model(**inputs).logits.detach()
    assert set_linear_dtype(model, "int8") > 0
    assert not any(isinstance(m, Int8Map) for m in projected)
    assert not any(isinstance(m, Int8Map) for layer in layers(model) for m in layer.modules())
    with torch.no_grad():
        rounded = model(**inputs).logits
        with use_backend("reference"):
            assert apart(rounded, model(**inputs).logits) < 1e-3
        for layer in projected:  # each at its setting
            x = torch.randn(3, layer.projection.inputs)
            y = layer(x)
            layer.linear_dtype = None
            assert 0 < apart(y, layer(x)) < 0.05
            layer.linear_dtype = "int8"
            assert torch.equal(layer(x), y)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(**inputs).logits, rounded)
        set_linear_dtype(twin, None)
        assert apart(twin(**inputs).logits, plain) < 1e-5  # which was computed by steps with gradients
        layer, x = projected[0], torch.randn(3, projected[0].projection.inputs)
        for name in ("weight", *layer.ADDED[:3]):  # factors and plans follow
            for change in (lambda value: value.data.mul_(2), lambda value: value.mul_(0.5)):
                change(getattr(layer, name))
                with use_backend("reference"):
                    expected = layer(x)
                assert apart(layer(x), expected) < 1e-3
    assert 0 < apart(rounded, plain) < 0.1
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert not any(isinstance(m, Int8Map) for m in again.modules())
    set_gate(again, active=0.5)
    assert apart(again(**inputs).logits, plain) < 1e-6  # weights that lie elsewhere in memory may sum in another order
    set_expert_dtype(model, "int8")
    text = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached, whole = (model.generate(**inputs, **text, use_cache=use) for use in (True, False))
    assert torch.equal(cached, whole)


@needs_native
@torch.no_grad()
def test_factors_are_multiplied_out_once_for_each_setting(monkeypatch):
    made = []
    plan = int8_plans.LinearPlan
    monkeypatch.setattr(int8_plans, "LinearPlan", lambda *a, **k: made.append(1) or plan(*a, **k))
    model = tiny("bert")
    quick = {"experts": 8, "router_width": 8, "router_tokens": 64, "router_batch": 16, "calibration_tokens": 400}
    convert_model(model, ConvertConfig(**quick, active=[0.5], attention="low-rank:o", attention_active=0.9), texts(60))
    set_linear_dtype(model, "int8-dynamic")
    layer = next(m for m in model.modules() if isinstance(m, DynamicProjection) and m.low_rank_in.shape[1] > 7)
    x, seen = torch.randn(3, layer.projection.inputs), {}
    for rank in (3, 7) * 3:
        layer.gate_state = ProjectionState("low-rank", (rank,))
        seen.setdefault(rank, layer(x))
        assert torch.equal(layer(x), seen[rank])
    assert len(made) == 2
    assert not torch.equal(*seen.values())


def test_gradients_pass_the_rounding():
    model = tiny("bert").train()
    set_linear_dtype(model, "int8-dynamic")
    first(model(**dummy_inputs(model))).square().sum().backward()
    for layer in (m for m in model.modules() if isinstance(m, Int8Map) and m.weight.grad is not None):
        assert layer.weight.grad.abs().sum() > 0


def test_small_and_strange_maps_stay_as_they_are(monkeypatch):
    monkeypatch.undo()
    model = tiny("bert")
    assert set_linear_dtype(model, "int8") == 0
    monkeypatch.setattr(int8_linear, "LEAST", 1)

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    odd = nn.Sequential(nn.Linear(8, 8), Doubled(8, 8))
    set_linear_dtype(odd, "int8")
    assert [isinstance(m, Int8Map) for m in odd] == [True, False]
    with pytest.raises(UserError, match="linear dtype 'int4'"):
        set_linear_dtype(odd, "int4")


@needs_native
@DTYPE
def test_evaluation_compares_with_the_model_as_it_was(linear_dtype):
    data = texts(8)
    dense = tiny("gpt2")
    (plain,) = evaluate(dense, data, [])
    set_linear_dtype(dense, linear_dtype)
    (row,) = evaluate(dense, data, [])
    assert row["linear_dtype"] == linear_dtype
    assert row["dense"]["value"] == plain["metric"]["value"]
    assert row["metric"]["value"] != plain["metric"]["value"]
    model = small()
    ids = texts(8, model.config.vocab_size)
    before = evaluate(model, ids, [{"active": 0.5}])
    set_linear_dtype(model, linear_dtype)
    after = evaluate(model, ids, [{"active": 0.5}])
    assert before[0]["dense"] == after[0]["dense"]
    assert before[0]["metric"] != after[0]["metric"]


@needs_native
def test_the_verbs(home, tmp_path, d2dmoe):
    flags = ["--data", home / "text.txt", "--linear-dtype", "int8", "--tokens", 100, "--json", tmp_path / "e.json"]
    for name in ("first", "dense"):
        d2dmoe("eval", "--model", home / name, *flags)
        rows = json.loads((tmp_path / "e.json").read_text())["rows"]
        assert {row["linear_dtype"] for row in rows} == {"int8"}
    few = ["--seconds", 0.01, "--columns", "eager", "--threads", 1, "--linear-dtype", "int8"]
    model = ["bench", "--model", home / "first", "--batch", 1, "--length", 4, "--active", 0.5, *few]
    said = d2dmoe(*model, "--expert-dtype", "int8").out
    assert all(column in said for column in ("all int8 ms", "dense int8 ms", "all int8 x", "dense int8 x"))
    assert "own, others int8 ms" in d2dmoe(*model).out
    assert "has experts only" in d2dmoe("bench", "--layer", "d=32,f=64,experts=8", *few, code=1).err
