"""The layer against the formula of DESIGN.md section 2, written as loops over tokens, experts and neurons in fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.testing import assert_close

from d2dmoe.config import Block, can_split
from d2dmoe.moe.layer import DynamicFFN, GateState
from d2dmoe.moe.packing import LAYOUTS, NEURONS_LAST, pack, unpack

D_MODEL, D_OUT, EXPERTS, SIZE, TOKENS, BUDGETS = 5, 7, 6, 3, 9, 2
WIDTH = EXPERTS * SIZE
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "ffn": lambda z: 0.5 * z * (1 + torch.erf(z / 2**0.5)),
    "glu": lambda z: z / (1 + torch.exp(-z)),
}
MODULES = {"ffn": torch.nn.functional.gelu, "glu": torch.nn.functional.silu}


class Dense:
    """A dense block with random weights, as a model would hold it: rows of `up` and `gate`, columns of `down`."""

    def __init__(self, kind: str, bias: bool, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.kind, self.bias = kind, bias
        self.up, self.down = random(WIDTH, D_MODEL), random(D_OUT, WIDTH)
        self.gate = random(WIDTH, D_MODEL) if kind == "glu" else None
        self.up_bias = random(WIDTH) if bias else None
        self.gate_bias = random(WIDTH) if bias and kind == "glu" else None
        self.down_bias = random(D_OUT) if bias else None
        self.constants = 3 * random(BUDGETS, EXPERTS, D_OUT)

    def layer(self, dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> DynamicFFN:
        """The same block as experts."""
        block = Block(
            name="mlp", kind=self.kind, activation="gelu", d_model=D_MODEL, width=WIDTH, up="up",
            gate="gate" if self.kind == "glu" else None, down="down", experts=EXPERTS,
        )  # fmt: skip
        layer = DynamicFFN(
            block, d_out=D_OUT, biases=(self.bias, self.bias, self.bias), act=MODULES[self.kind], router_width=16,
            budgets=BUDGETS, dropout=dropout, dtype=dtype,
        )  # fmt: skip
        layer.router.reset(1)
        state = {
            "up_weight": pack(self.up, EXPERTS, "up_linear"),
            "down_weight": pack(self.down, EXPERTS, "down_linear"),
            "constants": self.constants,
        }
        state |= {"gate_weight": pack(self.gate, EXPERTS, "up_linear")} if self.gate is not None else {}
        state |= {"up_bias": pack(self.up_bias, EXPERTS, "bias"), "down_bias": self.down_bias} if self.bias else {}
        state |= {"gate_bias": pack(self.gate_bias, EXPERTS, "bias")} if self.gate_bias is not None else {}
        state |= {f"router.{name}": value for name, value in layer.router.state_dict().items()}
        layer.load_state_dict(state, strict=True)
        return layer.eval()

    def neuron(self, n: int, x: torch.Tensor) -> torch.Tensor:
        """What neuron `n` adds to the output for one token ``(d_model,)``."""
        up = (self.up[n] * x).sum() + (self.up_bias[n] if self.bias else 0)
        act = ACTIVATIONS[self.kind]
        if self.gate is None:
            hidden = act(up)
        else:
            hidden = act((self.gate[n] * x).sum() + (self.gate_bias[n] if self.bias else 0)) * up
        return hidden * self.down[:, n]

    def expert(self, e: int, x: torch.Tensor) -> torch.Tensor:
        """`E_e(x)`."""
        return sum(self.neuron(n, x) for n in range(e * SIZE, (e + 1) * SIZE))

    def output(self, x: torch.Tensor, run: torch.Tensor, constants: torch.Tensor | None) -> torch.Tensor:
        """`y = b2 + sum over run E_e(x) + sum over skipped c_e`, for tokens ``(tokens, d_model)``."""
        rows = []
        for token, mask in zip(x, run.tolist(), strict=True):
            y = self.down_bias.clone() if self.bias else torch.zeros(D_OUT, dtype=torch.float64)
            for e in range(EXPERTS):
                if mask[e]:
                    y = y + self.expert(e, token)
                elif constants is not None:
                    y = y + constants[e]
            rows.append(y)
        return torch.stack(rows) if rows else torch.zeros(0, D_OUT, dtype=torch.float64)


def expected_run(layer: DynamicFFN, x: torch.Tensor, tau: float) -> torch.Tensor:
    """The sets of the paper's gate: `r_e >= tau max_j r_j` and `r_e > 0`, with `r = |R2 relu(R1 x)|`."""
    scores = (torch.relu(x.double() @ layer.router.hidden.T.double()) @ layer.router.score.T.double()).abs()
    return (scores >= tau * scores.max(1, keepdim=True).values) & (scores > 0)


KINDS = pytest.mark.parametrize("kind", ["ffn", "glu"])
BIASES = pytest.mark.parametrize("bias", [False, True], ids=["nobias", "bias"])


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(TOKENS, D_MODEL, dtype=torch.float64)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("experts", "size", "d"), [(1, 1, 1), (3, 5, 7), (11, 1, 3), (1, 13, 5), (7, 9, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_unpack_undoes_pack(layout, experts, size, d, dtype):
    width = experts * size
    shape = {"bias": (width,), "up_linear": (width, d), "up_conv1d": (d, width), "down_linear": (d, width)}
    dense = torch.randn(shape.get(layout, (width, d))).to(dtype)
    packed = pack(dense, experts, layout)
    by_neuron = {"bias": dense, "up_linear": dense, "down_conv1d": dense}.get(layout)
    by_neuron = dense.T if by_neuron is None else by_neuron
    for e in range(experts):
        for n in range(size):
            here = packed[e, n] if layout.startswith(("bias", "down")) else packed[e, :, n]
            assert torch.equal(here, by_neuron[e * size + n])
    back = unpack(packed, layout, width)
    assert back.dtype == dtype
    assert packed.is_contiguous()
    assert back.is_contiguous()
    assert torch.equal(back, dense)
    assert torch.equal(pack(back, experts, layout), packed)


def test_unknown_layout_is_refused():
    with pytest.raises(ValueError, match="sideways"):
        pack(torch.zeros(4, 4), 2, "sideways")
    with pytest.raises(ValueError, match="sideways"):
        unpack(torch.zeros(2, 2, 4), "sideways", 4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("experts", "width", "d"), [(2, 3, 1), (3, 7, 5), (6, 16, 3), (7, 64, 2)], ids=str)
def test_the_last_expert_is_filled_up_with_zeros(layout, experts, width, d):
    shape = {"bias": (width,), "up_conv1d": (d, width), "down_linear": (d, width)}.get(layout, (width, d))
    dense = torch.randn(shape)
    packed = pack(dense, experts, layout)
    size = -(-width // experts)
    by_slot = packed.transpose(1, 2) if layout.startswith("up") else packed
    assert by_slot.shape[:2] == (experts, size)
    by_slot = by_slot.flatten(0, 1)
    assert torch.equal(by_slot[:width], dense.T if layout in NEURONS_LAST else dense)
    assert not by_slot[width:].any()
    assert len(by_slot) > width
    assert torch.equal(unpack(packed, layout, width), dense)
    assert unpack(packed, layout, width).is_contiguous()


@pytest.mark.parametrize(("experts", "width"), [(7, 10), (11, 10), (0, 4), (33, 64)], ids=str)
def test_an_expert_of_nothing_but_padding_is_refused(experts, width):
    assert not can_split(width, experts)
    with pytest.raises(ValueError, match=f"{experts} experts do not fit {width} neurons"):
        pack(torch.zeros(width, 2), experts, "up_linear")


@KINDS
@BIASES
@pytest.mark.parametrize("stand_in", [None, 0, 1], ids=["zero", "first", "second"])
def test_gated_output_is_the_formula(kind, bias, stand_in, x):
    dense = Dense(kind, bias)
    layer = dense.layer()
    layer.gate_state = GateState("max", 0.5, stand_in)
    run = expected_run(layer, x, 0.5)
    assert 0 < run.float().mean() < 0.9
    constants = None if stand_in is None else dense.constants[stand_in]
    assert_close(layer(x).detach(), dense.output(x, run, constants))


@KINDS
@BIASES
def test_all_experts_on_is_the_dense_block(kind, bias, x):
    dense = Dense(kind, bias)
    layer = dense.layer()
    layer.gate_state = GateState("max", 0.0, 1)  # stand-ins there, but off
    act = ACTIVATIONS[kind]
    up = torch.nn.functional.linear(x, dense.up, dense.up_bias)
    hidden = act(up) if dense.gate is None else act(torch.nn.functional.linear(x, dense.gate, dense.gate_bias)) * up
    assert_close(layer(x).detach(), torch.nn.functional.linear(hidden, dense.down, dense.down_bias))
    assert_close(layer(x).detach(), dense.output(x, torch.ones(TOKENS, EXPERTS), None))
    layer.gate_state = GateState("max", 1e-12, 1)  # on, and so low that every expert runs
    assert_close(layer(x).detach(), dense.output(x, torch.ones(TOKENS, EXPERTS), None))


@KINDS
@BIASES
@pytest.mark.parametrize("gate", ["max", "topk"])
def test_no_expert_on_leaves_bias_and_stand_ins(kind, bias, gate, x):
    dense = Dense(kind, bias)
    layer = dense.layer()
    layer.router.score.data.zero_()  # a score of 0 never runs
    for stand_in, rest in ((None, torch.zeros(D_OUT, dtype=torch.float64)), (1, dense.constants[1].sum(0))):
        layer.gate_state = GateState(gate, 0.3, stand_in)
        expected = rest + (dense.down_bias if bias else 0)
        assert_close(layer(x).detach(), expected.expand(TOKENS, -1))


@KINDS
@pytest.mark.parametrize("tau", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)], ids=str)
def test_no_tokens(kind, tau, shape):
    layer = Dense(kind, True).layer()
    layer.gate_state = GateState("max", tau, 0)
    assert layer(torch.zeros(*shape, D_MODEL, dtype=torch.float64)).shape == (*shape, D_OUT)


@KINDS
def test_leading_dimensions_and_keyword_do_not_matter(kind):
    layer = Dense(kind, True).layer()
    layer.gate_state = GateState("topk", 0.5, 0)
    x = torch.randn(2, 3, 4, D_MODEL, dtype=torch.float64)
    flat = layer(x.reshape(-1, D_MODEL))
    assert_close(layer(x), flat.reshape(2, 3, 4, D_OUT))
    assert_close(layer(hidden_states=x), flat.reshape(2, 3, 4, D_OUT))


@KINDS
def test_tokens_do_not_see_each_other(kind, x):
    layer = Dense(kind, True).layer()
    layer.gate_state = GateState("max", 0.6, 0)
    together = layer(x)
    for t in range(TOKENS):
        assert_close(layer(x[t : t + 1])[0], together[t])


@KINDS
def test_fp32_agrees_with_the_fp64_loops(kind, x):
    dense = Dense(kind, True)
    layer = dense.layer(torch.float32)
    layer.gate_state = GateState("max", 0.5, 0)
    y = layer(x.float())
    assert_close(
        y.detach().double(), dense.output(x, expected_run(layer, x, 0.5), dense.constants[0]), rtol=1e-5, atol=1e-5
    )


@KINDS
def test_oracle_selects_by_true_norms(kind, x):
    dense = Dense(kind, True)
    layer = dense.layer()
    layer.gate_state = GateState("topk", 0.5, None, oracle=True)
    norms = torch.stack([torch.stack([dense.expert(e, token).norm() for e in range(EXPERTS)]) for token in x])
    run = norms >= norms.topk(EXPERTS // 2).values[:, -1:]
    assert_close(layer(x).detach(), dense.output(x, run, None))


@KINDS
def test_observer_sees_what_the_layer_does(kind, x):
    layer = Dense(kind, True).layer()
    layer.gate_state = GateState("max", 0.5, 0)
    calls = []
    layer.observer = lambda *call: calls.append(call)
    layer(x.reshape(3, 3, D_MODEL))
    ((seen, inputs, hidden, scores, run),) = calls
    assert seen is layer
    assert torch.equal(inputs, x)
    assert hidden.shape == (EXPERTS, TOKENS, SIZE)
    assert_close(scores, layer.router(x))
    assert torch.equal(run, expected_run(layer, x, 0.5))


@KINDS
@BIASES
def test_gradients_with_the_gate_on(kind, bias):
    dense = Dense(kind, bias)
    layer = dense.layer()
    layer.gate_state = GateState("max", 0.5, 0)
    x = torch.randn(3, D_MODEL, dtype=torch.float64, requires_grad=True)
    run = expected_run(layer, x.detach(), 0.5)
    assert run.any()
    assert not run.all()
    names = [n for n, _ in layer.named_parameters() if not n.startswith("router.")]
    values = [layer.get_parameter(n).detach().clone().requires_grad_() for n in names]

    def output(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x,))

    assert torch.autograd.gradcheck(output, (x, *values))


@KINDS
def test_gradients_reach_what_ran_and_nothing_else(kind, x):
    dense = Dense(kind, True)
    layer = dense.layer()
    layer.router.score.data[2] = 0  # expert 2 never runs
    layer.gate_state = GateState("max", 0.5, 1)
    run = expected_run(layer, x, 0.5)
    assert not run[:, 2].any()
    layer(x).sum().backward()
    reached = run.any(0)
    assert reached.sum() >= 2
    for name in ("up_weight", "down_weight", "up_bias", *(("gate_weight", "gate_bias") if kind == "glu" else ())):
        assert torch.equal(getattr(layer, name).grad.flatten(1).abs().sum(1) > 0, reached), name
    assert_close(layer.down_bias.grad, torch.full((D_OUT,), float(TOKENS), dtype=torch.float64))
    skipped = (~run).sum(0).double()[:, None].expand(-1, D_OUT)
    assert_close(layer.constants.grad, torch.stack([torch.zeros_like(skipped), skipped]))


def test_dropout_acts_in_training_only(x):
    layer = Dense("ffn", True).layer(dropout=0.5)
    plain = layer(x)
    dropped = layer.train()(x)
    kept = dropped != 0
    assert 0.2 < kept.float().mean() < 0.8
    assert_close(dropped[kept], 2 * plain[kept])
    assert torch.equal(layer.eval()(x), plain)
