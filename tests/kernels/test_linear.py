"""Linear maps in int8 by the native library, against the formula in fp64 on the weights that int8 stands for."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_int8 import ISAS, rotation
from test_operator import BF16_ERROR, DTYPES, LIBRARY, at_once, needs_native

from d2dmoe.kernels import LinearPlan, StaleWeights
from d2dmoe.kernels.cpu import linear

pytestmark = needs_native
ROUNDS = pytest.mark.parametrize("rounds", [False, True], ids=["int8", "int8-dynamic"])


def problem(
    tokens: int, inputs: int, outputs: int, *, bias: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Tokens, weights and bias that bf16 holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, inputs), (outputs, inputs), (outputs,)]
    x, weight, b = (torch.randn(shape, generator=generator).bfloat16().to(dtype) for shape in shapes)
    return x, weight, b if bias else None


def whole_rows(x: torch.Tensor) -> torch.Tensor:
    """In fp64, every row in whole multiples, up to 127, of a scale of its own."""
    scale = x.float().abs().amax(-1, keepdim=True) / 127
    return (x.float() / scale.masked_fill(scale == 0, 1)).round().double() * scale.double()


def check(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, rounds: bool, isa: int | None = None
) -> None:
    y = LinearPlan(weight, bias, rounds=rounds, kernels=isa)(x)
    if rounds:
        matrix = rotation(x.shape[1])
        expected = whole_rows(x.double() @ matrix) @ whole_rows(weight.double() @ matrix).T
    else:
        expected = x.double() @ whole_rows(weight).T
    expected = expected if bias is None else expected + bias.double()
    assert y.dtype == x.dtype
    assert y.shape == expected.shape
    error = (y.double() - expected).norm() / expected.norm().clamp_min(1e-9)
    # a value just between two steps may be rounded to either of them
    assert error < (BF16_ERROR if y.dtype == torch.bfloat16 else 1e-3 if rounds else 1e-5), f"{error:.1e}"


@ISAS
@ROUNDS
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_odd_shapes(isa, rounds, dtype, data):
    dtype = DTYPES[dtype]
    tokens, inputs, outputs = (data.draw(st.integers(1, most)) for most in (150, 90, 200))
    check(*problem(tokens, inputs, outputs, bias=data.draw(st.booleans()), dtype=dtype), rounds, isa)


@ISAS
@ROUNDS
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_some_columns_are_read_and_outputs_lie_apart(isa, rounds, dtype, data):
    tokens, inputs, outputs = (data.draw(st.integers(1, most)) for most in (60, 40, 150))
    x, weight, bias = problem(tokens, inputs, outputs, dtype=DTYPES[dtype])
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    wide = torch.randn(tokens, inputs + data.draw(st.integers(0, 20)), generator=generator).to(x.dtype)
    gather = torch.randperm(wide.shape[1], generator=generator)[:inputs]
    there = torch.rand(outputs + 50, generator=generator) < 0.7
    places = there.cumsum(0) - 1
    spread = torch.where(there & (places < outputs), places, -1)
    wide[:, gather] = x
    y = LinearPlan(weight, bias, rounds=rounds, gather=gather, width=wide.shape[1], spread=spread, kernels=isa)(wide)
    thin = LinearPlan(weight, bias, rounds=rounds, kernels=isa)(x)
    assert torch.equal(y, torch.where(spread < 0, 0, thin[:, spread.clamp_min(0)]))


@pytest.mark.parametrize("spread", [[-1, -1], [0, 63, 64, 65, -1, 3, -1], [-1, 2, 3, 130, 131, -1, -1, 0]])
def test_runs_are_pieces_of_one_panel(spread):
    runs, first_run = linear.runs_of(torch.tensor(spread), 140)
    found = [None] * len(spread)
    for panel in range(3):
        for place, column, count in runs[first_run[panel] : first_run[panel + 1]].tolist():
            assert place < 0 or place // 64 == (place + count - 1) // 64 == panel
            found[column : column + count] = [-1] * count if place < 0 else range(place, place + count)
    assert found == spread
    assert first_run[-1] == len(runs)


@ROUNDS
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(rounds, threads):
    x, weight, bias = problem(450, 96, 300)  # more than a tile of tokens
    plan, before = LinearPlan(weight, bias, rounds=rounds), torch.get_num_threads()
    alone = torch.cat([plan(row) for row in x.split(1)])
    try:
        torch.set_num_threads(threads)
        y = plan(x)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(y, plan(x))
    if rounds:  # sums of integers, by whatever instructions
        assert torch.equal(y, alone)
    assert (y - alone).abs().max() < 1e-3


@ROUNDS
def test_python_threads_at_once(rounds):
    x, weight, bias = problem(65, 96, 300)
    plan, found = LinearPlan(weight, bias, rounds=rounds), []
    expected = plan(x)
    at_once(lambda: found.append(plan(x)))
    assert len(found) == 4
    assert all(torch.equal(y, expected) for y in found)


@ROUNDS
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_passes_through(rounds, value):
    x, weight, bias = problem(3, 40, 70)
    x[1, 7], weight[5, 3] = value, value
    y = LinearPlan(weight, bias, rounds=rounds)(x)
    assert not y[:, 5].isfinite().any()
    assert not y[1].isfinite().any()
    others = torch.ones_like(y, dtype=torch.bool)
    others[1], others[:, 5] = False, False
    assert y[others].isfinite().all()


def test_shapes_and_no_tokens():
    x, weight, bias = problem(6, 33, 70)
    plan = LinearPlan(weight, bias)
    assert plan(x.view(2, 3, 33)).shape == (2, 3, 70)
    assert torch.equal(plan(x.view(2, 3, 33)).view(6, 70), plan(x))
    assert plan(x[:0]).shape == (0, 70)
    wide = torch.randn(6, 66)
    assert torch.equal(plan(wide[:, ::2]), plan(wide[:, ::2].contiguous()))
    assert plan.nbytes == 128 * 36 + 4 * 128


def test_bad_input_is_refused_before_the_library():
    x, weight, bias = problem(2, 33, 70)
    plan = LinearPlan(weight, bias)
    for wrong in (x[:, :32], x.double(), x.to("meta")):
        with pytest.raises(ValueError, match="for a map of 33"):
            plan(wrong)
    with pytest.raises(RuntimeError, match="on the device meta"):
        LinearPlan(weight.to("meta"), bias)


def test_changed_weights_are_seen():
    for which in (0, 1):
        x, *tensors = problem(2, 33, 70)
        plan = LinearPlan(*tensors)
        plan(x)
        tensors[which].data.mul_(2)
        with pytest.raises(StaleWeights):
            plan(x)


@ROUNDS
def test_no_memory_is_an_error_of_the_caller(rounds):
    x, weight, bias = problem(64, 5000, 8)
    plan = LinearPlan(weight, bias, rounds=rounds)
    LIBRARY.d2dmoe_limit_allocations(0)
    try:
        with pytest.raises(MemoryError, match="no memory for 64 tokens"):
            plan(x)
    finally:
        LIBRARY.d2dmoe_limit_allocations(-1)
    check(x, weight, bias, rounds)


def test_struct_is_as_large_here_as_there():
    assert ctypes.sizeof(linear._Linear) == LIBRARY.d2dmoe_linear_bytes()
