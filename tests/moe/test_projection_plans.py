"""Projections on few tokens go by the native library, and by readable steps wherever somebody has to see these."""

from __future__ import annotations

import copy

import pytest
import torch
from test_projection import by_formula
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from d2dmoe.config.projections import Projection, ProjectionState
from d2dmoe.kernels import ProjectionPlan, forget_ways, native, use_backend
from d2dmoe.moe import few_tokens
from d2dmoe.moe.few_tokens import MOST
from d2dmoe.moe.gate import gates_here
from d2dmoe.moe.projected import make_projection
from d2dmoe.moe.projection import DynamicProjection

pytestmark = pytest.mark.skipif(not native.live()[0], reason=native.live()[1])
STATES = {
    "low-rank": ProjectionState("low-rank", (5, 3, 0)),
    "channels": ProjectionState("channels", (), 0.7),
    "channels and low-rank": ProjectionState("channels", (2, 0, 4), 0.7),
}
BY_STATE = pytest.mark.parametrize("state", STATES.values(), ids=STATES)


def layer_of(kind: str = "linear", *, bias: bool = True, dtype: torch.dtype = torch.float32) -> DynamicProjection:
    """A fused projection 24 -> 24 + 12 + 12 with random values everywhere."""
    torch.manual_seed(1)
    dense = nn.Linear(24, 48, bias=bias) if kind == "linear" else Conv1D(48, 24)
    layer = make_projection(dense, Projection("c", "qkv", 0, 24, 48, [24, 12, 12], rank=8), 0)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.4
        parameter.requires_grad_(False)
    layer.channel_norms.data = layer.channel_norms.data.abs() + 1
    return layer.to(dtype).eval()


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """The token counts that went by the library."""
    seen, call = [], ProjectionPlan.__call__
    monkeypatch.setattr(ProjectionPlan, "__call__", lambda plan, x: seen.append(x.numel() // 24) or call(plan, x))
    return seen


@BY_STATE
@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("bias", [True, False])
def test_few_tokens_by_the_library_many_by_torch(kind, bias, state, calls, monkeypatch):
    layer = layer_of(kind, bias=bias)
    layer.gate_state, most = state, MOST[torch.float32, state.method]
    monkeypatch.setattr(few_tokens, "TIMED", most)
    for shape in ((24,), (1, 1, 24), (2, 3, 24), (most, 24), (most + 1, 24), (0, 24)):
        x = torch.randn(shape)
        with use_backend("reference"):
            expected = layer(x)
        assert not calls
        y = layer(x)
        assert_close(y, expected, rtol=1e-5, atol=1e-5)
        assert_close(y, by_formula(layer, x, state), rtol=1e-4, atol=1e-4)
        tokens = x.numel() // 24
        assert calls == [tokens] * (0 < tokens <= most), shape
        calls.clear()


@pytest.mark.parametrize("faster", ["library", "torch"])
def test_a_number_between_goes_the_faster_way(faster, calls, monkeypatch):
    layer, state = layer_of(), STATES["low-rank"]
    layer.gate_state, asked = state, []

    def choose(place, ways, x):
        asked.append((place, len(x)))
        results = [way(x) for way in ways.values()]
        assert_close(*results, rtol=1e-5, atol=1e-5)
        calls.clear()
        return faster

    monkeypatch.setattr(few_tokens, "choose_way", choose)
    for tokens in (8, 9, 256, 257):
        x = torch.randn(1, tokens, 24)
        assert_close(layer(x), by_formula(layer, x, state), rtol=1e-4, atol=1e-4)
        assert calls == [tokens] * (tokens == 8 or (tokens < 257 and faster == "library"))
        calls.clear()
    assert asked == [(("low-rank", 24, 48, 3, 3, torch.float32), tokens) for tokens in (9, 256)]


def test_the_faster_way_is_timed_once_and_kept(calls):
    layer, x = layer_of(), torch.randn(20, 24)
    layer.gate_state = STATES["low-rank"]
    forget_ways()
    layer(x)
    timed = len(calls)
    assert timed >= 2  # warming up, and at least one round
    layer(x)
    assert len(calls) <= timed + 1
    forget_ways()


@BY_STATE
def test_bf16(state, calls):
    layer, exact = layer_of(dtype=torch.bfloat16), layer_of(dtype=torch.bfloat16).double()
    layer.gate_state, x = state, torch.randn(3, 24).bfloat16()
    keep = x.abs() * layer.channel_norms >= state.threshold
    exact.channels = lambda *_: keep  # the same channels, then everything in fp64
    exact.gate_state = state
    y, expected = layer(x), exact._readable(x.double(), state)
    assert calls == [3]
    assert y.dtype == torch.bfloat16
    assert (y.double() - expected).norm() / expected.norm() < 2e-2  # factors in bf16


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_everything_on_is_dense_bit_for_bit(kind, calls):
    layer, x = layer_of(kind), torch.randn(1, 24)
    dense = super(DynamicProjection, layer).forward(x)
    for state in (ProjectionState(), ProjectionState("channels", (), 0.0)):
        layer.gate_state = state
        assert torch.equal(layer(x), dense)
    assert not calls


@pytest.mark.parametrize("name", ["weight", "bias", "low_rank_out"])
def test_changed_weights_by_torchs_products(name, monkeypatch, calls):
    monkeypatch.setattr(few_tokens, "way_taken", lambda *_: "torch")
    layer, x = layer_of(), torch.randn(20, 24)
    layer.gate_state = STATES["low-rank"]
    layer(x)
    for change in (lambda t: t.data.mul_(2), lambda t: t.add_(0.5), lambda t: setattr(t, "data", torch.rand_like(t))):
        change(getattr(layer, name))
        assert_close(layer(x), by_formula(layer, x, layer.gate_state), rtol=1e-4, atol=1e-4)
    assert not calls


@BY_STATE
@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("change", ["data", "in place", "one value", "replaced", "moved", "load", "copy", "double"])
def test_changed_weights(kind, state, change, calls):
    layer, x = layer_of(kind), torch.randn(2, 24)
    layer.gate_state = state
    layer(x)
    for name in ("weight", "bias", "low_rank_out", "channel_norms"):
        tensor, new = getattr(layer, name), torch.rand_like(getattr(layer, name)) + 0.5
        if change == "data":
            tensor.data.copy_(new)
        elif change == "in place":
            tensor.copy_(new)
        elif change == "one value":
            tensor.view(-1)[3] += 5
        elif change == "replaced":
            setattr(layer, name, nn.Parameter(new, requires_grad=False))
        elif change == "moved":
            tensor.data = new
        elif change == "load":
            layer.load_state_dict({**layer.state_dict(), name: new})
        elif change == "copy":
            layer = copy.deepcopy(layer)
            getattr(layer, name).data.mul_(2)
        else:
            layer.double().float()
        assert_close(layer(x), by_formula(layer, x, state), rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert len(calls) >= 5  # at least one for each change


def test_budgets_share_the_turned_weights_and_take_turns():
    layer, x = layer_of("linear"), torch.randn(2, 24)
    for threshold in (0.3, 0.7, 1.1, 0.3):
        with gates_here({layer: ProjectionState("channels", (), threshold)}):
            assert_close(layer(x), by_formula(layer, x, layer.gate_state), rtol=1e-4, atol=1e-4)
    assert len(layer.few_tokens._plans) == 3
    assert layer.few_tokens.extra_bytes() == layer.weight.nbytes
    assert len({ways.plan.keep[0]["weight"].data_ptr() for ways in layer.few_tokens._plans.values()}) == 1
    for threshold in range(1, 20):
        with gates_here({layer: ProjectionState("channels", (), threshold / 20)}):
            layer(x)
    assert len(layer.few_tokens._plans) == 8


@BY_STATE
def test_a_merged_projection(state, calls):
    layer, x = layer_of("linear"), torch.randn(2, 24)
    layer.gate_state = state
    y = layer(x)
    layer.merge()
    assert torch.equal(layer(x), y)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    assert calls == [2, 2, 2]
    if state.method == "low-rank":
        layer.merged_second_0.data.mul_(2)
        assert not torch.equal(layer(x), y)


@BY_STATE
def test_gradients_autocast_modes_and_hooks_see_every_step(state, calls):
    layer, x = layer_of("conv"), torch.randn(2, 24)
    layer.gate_state, seen = state, []
    expected = layer(x)
    calls.clear()
    grown = x.clone().requires_grad_()
    layer(grown).sum().backward()
    assert grown.grad is not None
    layer.weight.requires_grad_()
    assert layer(x).requires_grad
    layer.weight.requires_grad_(False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert_close(torch.func.vmap(layer)(x[:, None])[:, 0], expected, rtol=1e-4, atol=1e-5)
    traced = torch.jit.trace(layer, (x,), check_trace=False)
    assert_close(traced(x), expected, rtol=1e-4, atol=1e-5)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() > 0
    layer.observer = lambda _, rows, keep: seen.append((rows.shape, None if keep is None else keep.shape))
    layer(x)
    assert seen == [((2, 24), None if state.method == "low-rank" else (2, 24))]
    assert not calls


@BY_STATE
def test_compiled_and_exported(state, calls):
    layer, x = layer_of("conv"), torch.randn(2, 24)
    layer.gate_state = state
    expected = layer(x)
    calls.clear()
    with torch.no_grad():
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
        exported = torch.export.export(layer, (x,)).module()
        assert_close(exported(x), expected, rtol=1e-4, atol=1e-5)
    assert not calls


@BY_STATE
def test_other_tensors_go_the_readable_way(state, calls):
    layer = layer_of()
    layer.gate_state = state
    assert layer.to("meta")(torch.randn(2, 24, device="meta")).device.type == "meta"
    layer = layer_of()
    layer.gate_state = state
    layer.channel_norms = nn.Parameter(layer.channel_norms.double(), requires_grad=False)
    layer(torch.randn(2, 24))
    layer = layer_of()
    layer.gate_state = state
    torch.nn.utils.parametrizations.weight_norm(layer)
    with torch.no_grad():
        layer(torch.randn(2, 24))
    assert not calls
    with torch.device("meta"):
        assert layer_of_state(state)(torch.zeros(2, 24, device="cpu")).device.type == "cpu"


def layer_of_state(state: ProjectionState) -> DynamicProjection:
    with torch.device("cpu"):
        layer = layer_of()
    layer.gate_state = state
    return layer


@BY_STATE
def test_an_offloaded_projection(state, calls):
    accelerate = pytest.importorskip("accelerate")
    layer, x = layer_of(), torch.randn(2, 24)
    layer.gate_state = state
    expected = layer(x)
    calls.clear()
    accelerate.cpu_offload(layer, execution_device=torch.device("cpu"))
    assert layer.weight.device.type == "meta"
    with torch.no_grad():
        assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert not calls
