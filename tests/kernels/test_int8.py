"""Experts in int8 through the library, against the definition in fp64 on the weights that int8 stands for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_operator import BF16_ERROR, DTYPES, LIBRARY, check, kernels, needs_native, problem, team
from torch.testing import assert_close

from d2dmoe.kernels import down_product, hidden_activations, native, rounded, rounded_rows
from d2dmoe.kernels.operator import ACTIVATIONS, ARGUMENTS, TENSORS
from d2dmoe.kernels.quads import in_quads, rotated

INPUTS = {"up_weight": 1, "gate_weight": 1, "down_weight": 2}
FP32 = [(number, name) for number, name in kernels() if not LIBRARY.d2dmoe_kernels_bf16(number)]
ISAS = pytest.mark.parametrize("isa", [n for n, _ in FP32], ids=[name for _, name in FP32])


def rotation(n: int) -> torch.Tensor:
    """What tokens of `n` inputs are multiplied by where they are rounded: blocks of 64, of 16, and ones."""
    blocks, left = [], n
    for size in (64, 16):
        flips = [sum((i >> bit & 3) == 3 for bit in (0, 2, 4)) for i in range(size)]
        signs = [[(-1.0) ** ((i & j).bit_count() + flips[i]) for j in range(size)] for i in range(size)]
        blocks += [torch.tensor(signs, dtype=torch.float64) / size**0.5] * (left // size)
        left %= size
    return torch.block_diag(*blocks, torch.eye(left, dtype=torch.float64))


def modelled(arguments: dict, rotates: bool = False) -> dict:
    """With weights in fp64 that are whole multiples, up to 127, of the scale of their neuron."""
    found = dict(arguments)
    for name, dim in INPUTS.items():
        weight = arguments[name]
        if weight is not None:
            if rotates and dim == 1:
                weight = rotation(weight.shape[1]).T @ weight.double()
            scale = weight.float().abs().amax(dim, keepdim=True) / 127
            whole = (weight.float() / scale.masked_fill(scale == 0, 1)).round()
            assert whole.abs().max() <= 127
            found[name] = whole.double() * scale.double()
    return found


def by_native(arguments: dict, isa: int | None = None, expert_dtype: str = "int8") -> torch.Tensor:
    tensors = {name: arguments[name] for name in TENSORS}
    plan = native.Plan(tensors, *(arguments[name] for name in ARGUMENTS[13:]), kernels=isa, expert_dtype=expert_dtype)
    return plan(arguments["x"], arguments["run"])


def whole_rows(x: torch.Tensor) -> torch.Tensor:
    """Every row in whole multiples, up to 127, of a scale of its own."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale.masked_fill(scale == 0, 1)).round() * scale


def check_rounded(arguments: dict, isa: int | None = None, name: str = "y") -> None:
    """With rounded tokens and hidden values. Sums in another order can round a hidden value to the next step."""
    y, weights = by_native(arguments, isa, "int8-dynamic"), modelled(arguments, rotates=True)
    act, wide = ACTIVATIONS[arguments["activation"]], {n: None if t is None else t.double() for n, t in weights.items()
                                                       if isinstance(t, torch.Tensor) or t is None}  # fmt: skip
    matrix = rotation(wide["x"].shape[1])
    x = whole_rows((wide["x"] @ matrix).float()).double()
    names = ("up_weight", "up_bias", "gate_weight", "gate_bias")
    hidden = hidden_activations(x, *(wide[n] for n in names), act)
    scale = arguments["down_weight"].float().abs().amax(2)[:, None] / 127
    hidden = whole_rows(hidden * scale.double())
    whole = (wide["down_weight"] / scale.transpose(1, 2).masked_fill(scale.transpose(1, 2) == 0, 1)).round()
    expected = down_product(hidden, whole, wide["down_bias"], arguments["run"], wide["constants"])
    if wide["linear_in"] is not None:
        into, out = (matrix.T @ wide["linear_in"]).float(), arguments["linear_out"].float()
        scale, whole = out.abs().amax(1) / 127, whole_rows(out).double()
        hidden = x @ whole_rows(into.T).T.double()
        whole = whole / scale.double().masked_fill(scale == 0, 1)[:, None]
        expected = expected + whole_rows(hidden * scale.double()) @ whole
    assert not y.isnan().any(), name
    error = (y.double() - expected).norm() / expected.norm().clamp_min(1e-9)
    assert error < (BF16_ERROR if y.dtype == torch.bfloat16 else 1e-3), f"{name}: {error:.1e}"


@needs_native
@ISAS
@pytest.mark.parametrize("expert_dtype", ["int8", "int8-dynamic"])
@pytest.mark.parametrize(("threads", "groups"), [(2, 2), (5, 2), (7, 3)])
def test_threads_share_tokens_and_experts(isa, expert_dtype, threads, groups, monkeypatch):
    monkeypatch.setenv("D2DMOE_GROUPS", str(groups))
    with team(threads):
        for tokens in (65, 200):
            arguments = problem(tokens, 64, 32, 9, 40, glu=tokens == 200, rank=9)
            if expert_dtype == "int8":
                check(by_native(arguments, isa), modelled(arguments), f"{tokens}")
            else:
                check_rounded(arguments, isa, f"{tokens}")
            assert torch.equal(*(by_native(arguments, isa, expert_dtype) for _ in range(2)))


@needs_native
@ISAS
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_odd_shapes(isa, dtype, data):
    shape = [data.draw(st.integers(low, high)) for low, high in ((0, 90), (1, 70), (1, 70), (1, 9), (1, 70))]
    arguments = problem(
        *shape, glu=data.draw(st.booleans()), bias=data.draw(st.booleans()), constants=data.draw(st.booleans()),
        rank=data.draw(st.integers(0, 5)), activation=data.draw(st.sampled_from(sorted(ACTIVATIONS))),
        dtype=DTYPES[dtype], seed=data.draw(st.integers(0, 9)),
    )  # fmt: skip
    if data.draw(st.booleans()):  # zero neurons fill up the last expert
        for name, dim in INPUTS.items():
            if arguments[name] is not None:
                arguments[name][-1].narrow(3 - dim - 1, shape[2] // 2, shape[2] - shape[2] // 2).zero_()
    check(by_native(arguments, isa), modelled(arguments), f"{shape}")
    if shape[0]:
        check_rounded(arguments, isa, f"{shape}")


@needs_native
@ISAS
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("glu", [False, True], ids=["ffn", "glu"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 16, 64, 131])
def test_fast_shapes(isa, threads, glu, tokens):
    with team(threads):
        for dtype in DTYPES.values():
            arguments = problem(tokens, 64, 32, 6, 128, glu=glu, dtype=dtype)
            check(by_native(arguments, isa), modelled(arguments), f"{dtype}")
            check_rounded(arguments, isa, f"{dtype}")
            everything = {"run": None, "tau": 0.0, "constants": None, "linear_in": None, "linear_out": None}
            check(by_native(arguments | everything, isa), modelled(arguments | everything), f"{dtype}, everything")


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 40, 90])
@pytest.mark.parametrize("expert_dtype", ["int8", "int8-dynamic"])
@ISAS
@pytest.mark.parametrize("d", [37, 96])
def test_the_same_experts_run(dtype, tokens, isa, expert_dtype, d):
    """What is chosen is what fp64 chooses, with tokens rounded as well in the router's first product."""
    arguments = problem(tokens, d, 8, 12, 16, glu=False, dtype=DTYPES[dtype]) | {"gate": "topk", "tau": 0.6}
    router = [arguments[name] for name in ("x", "router_hidden", "router_score")]
    if expert_dtype == "int8-dynamic":
        router[:2] = (whole_rows(rotated(t)) for t in router[:2])
    x, into, out = (t.double() for t in router)
    scores = (torch.relu(x @ into.T) @ out.T).abs()
    clear = (scores.sort().values.diff() > 1e-5 * scores.amax(1, True)).all(1)
    assert clear.any()
    kept = scores >= scores.sort(descending=True).values[:, 4:5]
    y = by_native(arguments | {"run": None}, isa, expert_dtype)
    if expert_dtype == "int8":
        check(y[clear], modelled(arguments) | {"x": arguments["x"][clear], "run": kept[clear]})
    else:
        assert_close(y[clear], by_native(arguments | {"run": kept}, isa, expert_dtype)[clear])


@needs_native
@pytest.mark.parametrize("tokens", [2, 6, 70])
@pytest.mark.parametrize("name", ["x", *INPUTS])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(tokens, name, value):
    """In all outputs of the tokens that it reaches, and in no others."""
    arguments = problem(tokens, 20, 12, 4, 24, glu=True, rank=0)
    arguments["run"][0], arguments["run"][1] = False, True
    place = (1, 3) if name == "x" else (0, 3, 2)
    arguments[name][place] = value
    reached = torch.arange(tokens) == 1 if name == "x" else arguments["run"][:, 0]
    y = by_native(arguments)
    assert y[reached].isnan().all()
    dynamic = by_native(arguments, None, "int8-dynamic")
    assert dynamic[reached].isnan().all()
    assert not dynamic[~reached].isnan().any()
    rest = {n: arguments[n][~reached] for n in ("x", "run")}
    check(y[~reached], modelled({n: v.nan_to_num(0, 0, 0) if n in INPUTS else v for n, v in arguments.items()}) | rest)


@needs_native
@pytest.mark.parametrize("tokens", [1, 6, 70])
def test_rows_without_a_scale(tokens):
    """Tokens of zeros, experts whose hidden values are all zero, and values of every size at once."""
    arguments = problem(tokens, 20, 12, 4, 24, glu=False, bias=False, activation="relu", rank=0)
    arguments["run"][:] = True
    arguments["up_weight"][1] = 0
    arguments["x"][0] = 0
    check_rounded(arguments)
    arguments["x"] *= torch.logspace(-30, 20, tokens)[:, None]
    assert by_native(arguments, None, "int8-dynamic").isfinite().all()


@needs_native
@pytest.mark.parametrize("tokens", [3, 200])
def test_no_memory_in_any_thread_is_an_error_of_the_caller(tokens):
    """Also where threads wait for each other's rounded tokens."""
    arguments = problem(tokens, 3000, 24, 5, 50, glu=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for left in range(2 + (tokens == 3)):
            LIBRARY.d2dmoe_limit_allocations(left)
            with pytest.raises(MemoryError, match=f"no memory for {tokens} tokens"):
                by_native(arguments, None, "int8-dynamic")
            LIBRARY.d2dmoe_limit_allocations(-1)
            check_rounded(arguments)
    finally:
        LIBRARY.d2dmoe_limit_allocations(-1)
        torch.set_num_threads(before)


def test_rounding():
    """The largest weight of a neuron is kept, zeros stay zero, an error is at most half a step, gradients pass."""
    weight = torch.randn(3, 5, 4)
    weight[1, :, 2] = 0
    weight[2, 1, 1] = float("nan")
    for name, dim in INPUTS.items():
        given = weight.clone().requires_grad_()
        y = rounded(given, name)
        y.nan_to_num().sum().backward()
        assert given.grad[:2].eq(1).all()
        y, largest = y.detach(), weight.abs().amax(dim, keepdim=True).expand_as(weight)
        whole = ~largest.isnan()
        assert y[~whole].isnan().all()
        assert ((y - weight)[whole].abs() <= largest[whole] / 254 * 1.0001).all()
        top = whole & (weight.abs() == largest)
        assert_close(y[top], weight[top])
        assert (y[1, :, 2] == 0).all()
    assert rounded(weight.bfloat16(), "up_weight").dtype == torch.bfloat16


@pytest.mark.parametrize("n", [1, 15, 16, 47, 64, 80, 147])
def test_rotation(n):
    """The same products in other coordinates, where one large value does not set the steps for all others."""
    x, weight = torch.randn(3, n, dtype=torch.float64), torch.randn(2, n, 5, dtype=torch.float64)
    assert_close(rotated(x), x @ rotation(n))
    assert_close(rotated(x) @ rotated(weight, 1), x @ weight)
    assert_close(rotated(x).square().sum(), x.square().sum())
    assert rotated(x.bfloat16()).dtype == torch.float32
    for block in (16, 64):  # one value, and a constant
        assert_close(rotated(torch.eye(block)[3]).abs(), torch.full((block,), block**-0.5))
        assert_close(rotated(torch.ones(block)).abs(), torch.ones(block))
    x = torch.randn(200, 64)
    x[:, 5] = 30
    step = {rotate: (rounded_rows(x, rotate) - (rotated(x) if rotate else x)).norm() for rotate in (False, True)}
    assert step[True] < 0.4 * step[False]
    given = x.clone().requires_grad_()
    rounded_rows(given, rotate=True).square().sum().backward()
    assert_close(given.grad, 2 * x, rtol=0.1, atol=0.3)


def test_quads():
    weight = torch.arange(1.0, 6)[None, :, None] * torch.tensor([1.0, -10])  # (1, 5, 2)
    quads, scale = in_quads(weight, "up_weight")
    assert_close(scale, torch.tensor([[5 / 127, 50 / 127]]))
    whole = (torch.arange(1.0, 6) * 127 / 5).round().int().tolist()
    assert quads.shape == (1, 2, 2, 4)
    assert (quads.int() - 128).tolist() == [
        [[whole[:4], [-n for n in whole[:4]]], [[whole[4], 0, 0, 0], [-whole[4], 0, 0, 0]]]
    ]
    quads, scale = in_quads(weight, "down_weight")
    assert_close(scale, torch.arange(1.0, 6)[None] * 10 / 127)
    assert (quads[0, 0, 0].int() - 128).tolist() == [13] * 4


CPUINFO = Path("/proc/cpuinfo")
SAVED = """
import sys
import torch
from test_int8 import by_native
from test_operator import LIBRARY, problem
found = []
for glu, size, d_out in ((False, 32, 128), (True, 64, 48), (True, 40, 33)):
    arguments = problem(131, 320, size, 3, d_out, glu=glu) | {"linear_in": None, "linear_out": None}
    found += [by_native(arguments, expert_dtype="int8-dynamic")]
    found += [by_native(arguments | {"run": None, "tau": 0.0, "constants": None}, expert_dtype="int8-dynamic")]
torch.save(found, sys.argv[1])
print([LIBRARY.d2dmoe_int8_tiles(320, size) for size in (32, 40, 57)])
"""


@needs_native
@pytest.mark.skipif(not CPUINFO.exists() or "amx_int8" not in CPUINFO.read_text(), reason="needs AMX-int8")
def test_tiles_give_the_same_as_vectors(tmp_path):
    found = {}
    for tiles in ("0", "1"):
        file = tmp_path / f"{tiles}.pt"
        variables = {**os.environ, "D2DMOE_AMX_INT8": tiles, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        ran = subprocess.run(
            [sys.executable, "-c", SAVED, str(file)], env=variables, check=True, stdout=subprocess.PIPE, text=True
        )
        assert ran.stdout.strip() == ("[1, 1, 1]" if tiles == "1" else "[0, 0, 0]")
        found[tiles] = torch.load(file, weights_only=True)
    assert len(found["0"]) == 6
    for vectors, tiles in zip(found["0"], found["1"], strict=True):
        assert (vectors - tiles).norm() / vectors.norm() < 1e-3  # sums in another order can round the next hidden value
