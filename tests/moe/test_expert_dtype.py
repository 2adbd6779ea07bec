"""Models whose experts are computed in int8: one result everywhere, parameters and checkpoints as they were."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from test_weights import CHANGES, needs_native, small
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from zoo import tiny

from d2dmoe import UserError, dispatching, keep_dense, merge, set_expert_dtype, set_gate, use_gate
from d2dmoe.data.batches import Batches
from d2dmoe.discovery import dummy_inputs
from d2dmoe.kernels import use_backend
from d2dmoe.measure.evaluate import evaluate
from d2dmoe.measure.pairs import make_pair
from d2dmoe.moe.layer import GateState, layers
from d2dmoe.moe.memory import twin_in

CLOSE = {torch.float32: {"rtol": 1e-4, "atol": 1e-4}, torch.bfloat16: {"rtol": 0.02, "atol": 0.02}}
STEP = {"rtol": 1e-4, "atol": 3e-3}  # where another order of sums may round a token or a hidden value to the next step


INT8 = pytest.mark.parametrize("expert_dtype", ["int8", "int8-dynamic"])


def in_int8(dtype: torch.dtype = torch.float32, expert_dtype: str = "int8") -> torch.nn.Module:
    model = small().to(dtype)
    set_expert_dtype(model, expert_dtype)
    return model


def by_reference(model: torch.nn.Module, inputs: dict) -> torch.Tensor:
    with use_backend("reference"):
        return model(**inputs).logits


@needs_native
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("active", [0.25, 0.5, 0.75, 1])
@INT8
@torch.no_grad()
def test_the_library_computes_what_pytorch_does(dtype, active, expert_dtype):
    model = in_int8(dtype, expert_dtype)
    set_gate(model, active=active)
    for layer in layers(model):
        layer.observer = lambda *_: None  # an observed layer selects in Python, where rounding is the same
        layer.observer.needs_hidden = False
        x = torch.randn(7, 32).to(dtype)
        y = layer(x)
        with use_backend("reference"):
            assert_close(y, layer(x), **CLOSE[dtype])
        layer.expert_dtype = None
        layer.prepared.invalidate()
        assert not torch.equal(layer(x), y)
        assert torch.equal(layer(x), copy.deepcopy(layer)(x))


@needs_native
@pytest.mark.parametrize("active", [0.25, 1])
@pytest.mark.parametrize("name", CHANGES)
@INT8
@torch.no_grad()
def test_outputs_follow_the_weights(name, active, expert_dtype):
    model = in_int8(expert_dtype=expert_dtype)
    inputs = dummy_inputs(model)
    set_gate(model, active=active)
    model(**inputs)
    for change in CHANGES[name]:
        change(model)
        y = model(**inputs).logits
        if y.dtype == torch.float32:
            close = STEP if expert_dtype == "int8-dynamic" else CLOSE[y.dtype]
            assert_close(y, by_reference(model, inputs), **close)
        assert torch.equal(model(**inputs).logits, y)
        assert torch.equal(copy.deepcopy(model)(**inputs).logits, y)


def rounded_weights(layer) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What the library holds of the experts of a layer, and not of its router: quads and scales."""
    return [made for _, made, _ in layer.prepared.tiles.values() if isinstance(made, tuple)]


@needs_native
@torch.no_grad()
def test_budgets_share_what_is_rounded_and_old_weights_go():
    model = in_int8()
    layer, inputs = layers(model)[0], dummy_inputs(model)
    for active in (0.25, 0.5, 1):
        with use_gate(model, active=active):
            model(**inputs)
    assert len(rounded_weights(layer)) == 1 + 3  # up, and a down projection for each
    layer.up_weight.mul_(2)
    with use_gate(model, active=0.5):
        model(**inputs)
    assert len(rounded_weights(layer)) == 2


@needs_native
@INT8
@torch.no_grad()
def test_other_ways_round_alike(expert_dtype):
    model = in_int8(expert_dtype=expert_dtype)
    inputs, close = dummy_inputs(model), STEP if expert_dtype == "int8-dynamic" else CLOSE[torch.float32]
    set_gate(model, active=0.5)
    y = model(**inputs).logits
    keep_dense(model)
    with dispatching("auto"):
        assert_close(model(**inputs).logits, y, **close)
    keep_dense(model, False)
    with FlopCounterMode(display=False):
        assert_close(model(**inputs).logits, y, **close)
    layer, x = layers(model)[0], torch.randn(5, 32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), layer(x), **close)
    exported = torch.export.export(layer, (x,)).module()
    assert_close(exported(x), layer(x), **close)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(layer(x).float(), layer(x).float(), **CLOSE[torch.bfloat16])
    assert_close(merge(model)(**inputs).logits, y, **close)


@INT8
def test_gradients_pass_the_rounding(expert_dtype):
    """Where none are wanted nothing changes; where they are, the parameters learn for the rounded weights."""
    model = in_int8(expert_dtype=expert_dtype)
    layer, x = layers(model)[0], torch.randn(5, 32)
    set_gate(model, active=0.5)
    with torch.no_grad():
        expected = layer(x)
    y = layer(x)
    assert y.requires_grad
    assert_close(y.detach(), expected, **CLOSE[y.dtype])
    y.square().sum().backward()
    grads = {n: p.grad for n, p in layer.named_parameters() if n in ("up_weight", "down_weight", "up_bias")}
    plain = copy.deepcopy(layer)
    plain.zero_grad()
    plain.expert_dtype = None
    plain(x).square().sum().backward()
    for name, grad in grads.items():
        other = plain.get_parameter(name).grad
        assert (grad - other).norm() < 0.05 * other.norm(), name
        assert not torch.equal(grad, other)


@pytest.mark.parametrize("glu", [False, True], ids=["ffn", "glu"])
@torch.no_grad()
def test_the_bytes_that_are_said(glu):
    _, layer = make_pair(30, 64, 8, glu, None, torch.float32)
    layer.expert_dtype, layer.gate_state = "int8", GateState("topk", 0.5)
    layer(torch.randn(2, 30))
    assert layer.int8_bytes() == 64 * (32 + 4) * (2 if glu else 1) + 64 * (30 + 4)
    for quads, scale in rounded_weights(layer):
        assert quads.nbytes in (64 * 30, 64 * 32)
        assert scale.nbytes == 64 * 4
    model = in_int8()
    assert set_expert_dtype(model, "int8") == sum(layer.int8_bytes() for layer in layers(model))
    assert set_expert_dtype(model, None) == 0


def test_checkpoints_stay_as_they_are(tmp_path):
    model, plain = in_int8(), small()
    for name, one in (("int8", model), ("plain", plain)):
        one(**dummy_inputs(one))
        one.save_pretrained(tmp_path / name)
    files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("int8", "plain")]
    assert files[0] == files[1]
    for file in files[0]:
        assert (tmp_path / "int8" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes(), file


def test_what_is_refused():
    model = small()
    with pytest.raises(UserError, match=r'expert dtype .int4.: give "int8", "int8-dynamic", or None'):
        set_expert_dtype(model, "int4")
    with pytest.raises(UserError, match="not converted"):
        set_expert_dtype(tiny("gpt2"), "int8")


@torch.no_grad()
def test_copies_that_share_the_parameters():
    model = in_int8()
    twin = twin_in(model, None)
    assert {id(p) for p in twin.parameters()} == {id(p) for p in model.parameters()}
    assert [layer.expert_dtype for layer in (*layers(twin), *layers(model))] == [None] * 2 + ["int8"] * 2


@torch.no_grad()
def test_quality_is_compared_with_the_dense_model_without_int8():
    model = small()
    for layer in layers(model):  # of a size that counts beside the residual stream
        layer.up_weight.mul_(10)
        layer.down_weight.mul_(10)
    batches = Batches([{"input_ids": torch.randint(5, 99, (12,))} for _ in range(4)], 4)
    plain = evaluate(model, batches, [{"active": 1}])[0]
    set_expert_dtype(model, "int8")
    quarter, everything = evaluate(model, batches, [{"active": 0.25}, {"active": 1}])
    assert quarter["dense"] == everything["dense"] == plain["dense"]
    assert everything["active_fraction"] == 1
    assert everything["metric"]["value"] != plain["metric"]["value"]
    assert quarter["expert_dtype"] == "int8"
    assert "expert_dtype" not in plain


def test_the_verbs(home, tmp_path, d2dmoe):
    flags = ["--data", home / "text.txt", "--active", 0.5, "--expert-dtype", "int8", "--tokens", 100]
    d2dmoe("eval", "--model", home / "first", *flags, "--json", tmp_path / "e.json")
    assert [row["expert_dtype"] for row in json.loads((tmp_path / "e.json").read_text())["rows"]] == ["int8"]
    assert "has no experts" in d2dmoe("eval", "--model", home / "dense", *flags, code=1).err
    few = ["--seconds", 0.01, "--columns", "eager", "--expert-dtype", "int8", "--threads", 1]
    said = d2dmoe("bench", "--layer", "d=32,f=64,experts=8", "--tokens", 1, "--copies", 2, *few).out
    assert "int8 ms" in said
    assert "int8 x" in said
    model = ["--model", home / "first", "--batch", 1, "--length", 4, "--active", 0.5]
    assert "int8 ms" in d2dmoe("bench", *model, *few).out
    assert "--copies 2: must be" in d2dmoe("bench", *model, "--copies", 2, *few, code=1).err
