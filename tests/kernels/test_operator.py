"""Every backend through the public operator, against the definition in fp64."""

from __future__ import annotations

import copy
import ctypes
import os
import threading
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from d2dmoe.config import Block
from d2dmoe.kernels import activation_name, backends, native, use_backend
from d2dmoe.kernels.gates import GATES, select
from d2dmoe.kernels.operator import ACTIVATIONS, ARGUMENTS, TENSORS, dynamic_ffn_flops, reference
from d2dmoe.measure.pairs import make_pair
from d2dmoe.moe.layer import DynamicFFN, GateState

LIBRARY = native.library()[0]
needs_native = pytest.mark.skipif(LIBRARY is None, reason=native.library()[1])
OPERATOR = torch.ops.d2dmoe.dynamic_ffn.default
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BF16_ERROR = 5e-3  # relative RMSE, see conftest.py


def kernels() -> list[tuple[int, str]]:
    """Every instruction set that this processor has."""
    if LIBRARY is None:
        return []
    return [(number, LIBRARY.d2dmoe_kernels_name(number).decode()) for number in native.kernel_numbers(LIBRARY)]


ISAS = pytest.mark.parametrize("isa", [n for n, _ in kernels()], ids=[name for _, name in kernels()])


def problem(
    tokens: int,
    d: int,
    size: int,
    experts: int,
    d_out: int,
    *,
    glu: bool,
    activation: str = "gelu",
    bias: bool = True,
    constants: bool = True,
    rank: int = 3,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict:
    """Arguments of the operator, by name; values that bf16 holds exactly."""  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale).bfloat16().to(dtype)

    return {
        "x": random(tokens, d), "run": torch.rand((tokens, experts), generator=generator) < 0.4,
        "router_hidden": random(7, d), "router_score": random(experts, 7),
        "up_weight": random(experts, d, size, scale=d**-0.5), "up_bias": random(experts, size) if bias else None,
        "gate_weight": random(experts, d, size, scale=d**-0.5) if glu else None,
        "gate_bias": random(experts, size) if glu and bias else None,
        "down_weight": random(experts, size, d_out, scale=(experts * size) ** -0.5),
        "down_bias": random(d_out) if bias else None, "constants": random(experts, d_out) if constants else None,
        "linear_in": random(d, rank, scale=d**-0.5) if rank else None,
        "linear_out": random(rank, d_out) if rank else None,
        "activation": activation, "gate": "max", "tau": 0.5, "min_experts": 0, "max_experts": 0, "shared": 0,
    }  # fmt: skip


def widened(arguments: dict) -> list:
    """The same in fp64."""
    return [v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in arguments.values()]


def check(y: torch.Tensor, arguments: dict, name: str = "y") -> None:
    """Against the definition in fp64, at the tolerances of conftest.py."""
    expected = reference(*widened(arguments))
    assert y.shape == expected.shape, name
    assert not y.isnan().any(), name
    if y.dtype == torch.bfloat16:
        rmse = (y.double() - expected).norm() / expected.norm().clamp_min(1e-9)
        assert rmse <= BF16_ERROR, f"{name}: relative RMSE {rmse:.2e}"
    else:
        assert_close(y.double(), expected, rtol=1.3e-6, atol=1e-5, msg=lambda m: f"{name}: {m}")


def by_native(arguments: dict, isa: int | None = None, *, tiles: bool = False) -> torch.Tensor:
    """Straight through the library, into memory full of NaN."""
    tensors = {name: arguments[name] for name in TENSORS}
    plan = native.Plan(tensors, *(arguments[name] for name in ARGUMENTS[13:]), kernels=isa, tiles={} if tiles else None)
    empty = torch.empty
    torch.empty = lambda *a, **k: (
        torch.full(*a[:1], float("nan"), **k) if k["dtype"].is_floating_point else empty(*a, **k)
    )
    try:
        return plan(arguments["x"], arguments["run"])
    finally:
        torch.empty = empty


def usable(isa: int, dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 or not LIBRARY.d2dmoe_kernels_bf16(isa)


@needs_native
@ISAS
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_odd_shapes(isa, dtype, data):
    if not usable(isa, DTYPES[dtype]):
        return
    shape = [data.draw(st.integers(low, high)) for low, high in ((0, 90), (1, 70), (1, 70), (1, 9), (1, 70))]
    arguments = problem(
        *shape, glu=data.draw(st.booleans()), bias=data.draw(st.booleans()), constants=data.draw(st.booleans()),
        rank=data.draw(st.integers(0, 5)), activation=data.draw(st.sampled_from(sorted(ACTIVATIONS))),
        dtype=DTYPES[dtype], seed=data.draw(st.integers(0, 9)),
    )  # fmt: skip
    check(by_native(arguments, isa, tiles=data.draw(st.booleans())), arguments, f"{shape}")


@needs_native
@ISAS
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 63, 64, 65, 131, 300])
@pytest.mark.parametrize("glu", [False, True], ids=["ffn", "glu"])
def test_fast_shapes(isa, tokens, glu):
    for dtype in DTYPES.values():
        if usable(isa, dtype):
            arguments = problem(tokens, 64, 32, 6, 128, glu=glu, dtype=dtype)
            for tiles in (False, True):
                check(by_native(arguments, isa, tiles=tiles), arguments, f"{dtype}, tiles={tiles}")


@needs_native
@ISAS
@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("shape", [(300, 256, 96, 12, 1056), (600, 64, 40, 30, 72)], ids=str)
def test_groups_of_experts_and_blocks_of_columns(isa, tiles, shape):
    """More than the buffers of the AMX kernels hold at once; some experts with hardly a token."""
    arguments = problem(*shape, glu=True, dtype=torch.bfloat16)
    arguments["run"][:, 1::3] &= torch.rand(shape[0], len(arguments["run"][0, 1::3])) < 0.02
    check(by_native(arguments, isa, tiles=tiles), arguments)
    everything = {"run": None, "tau": 0.0, "constants": None, "linear_in": None, "linear_out": None}
    check(by_native(arguments | everything, isa, tiles=tiles), arguments | everything, "everything")


@needs_native
@ISAS
@pytest.mark.parametrize("tokens", [16, 63, 100])
@pytest.mark.parametrize(("d", "width"), [(64, 16), (544, 40), (1056, 70)])
def test_router_in_bf16(isa, tokens, d, width):
    """Wide enough for whole tiles, deeper than one chunk of them."""
    arguments = problem(tokens, d, 8, 12, 16, glu=False, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    arguments |= {
        "router_hidden": torch.randn((width, d), generator=generator).bfloat16(),
        "router_score": torch.randn((12, width), generator=generator).bfloat16(), "gate": "topk", "tau": 0.6,
    }  # fmt: skip
    hidden = torch.relu(arguments["x"].double() @ arguments["router_hidden"].double().T)
    scores = (hidden @ arguments["router_score"].double().T).abs()
    clear = (scores.sort().values.diff() > 1e-5 * scores.amax(1, True)).all(1)
    assert clear.float().mean() > 0.9
    y = by_native(arguments | {"run": None}, isa)
    chosen = {"x": arguments["x"][clear], "run": select(scores, "topk", 0.6)[clear]}
    check(y[clear], arguments | chosen)


@needs_native
@ISAS
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("d", "width", "experts"), [(64, 16, 32), (33, 37, 13), (7, 130, 3), (100, 1, 65)])
def test_router_laid_out_by_input(isa, threads, d, width, experts):
    """For so many tokens that it is used, and for fewer, by threads that share the columns; twice the same bits."""
    if not usable(isa, torch.float32):
        pytest.skip("fp32 is another table's")
    with team(threads):
        for tokens in (1, 7, 8, 63, 64, 65, 200):
            arguments = problem(tokens, d, 8, experts, 16, glu=False, seed=tokens)
            generator = torch.Generator().manual_seed(1)
            arguments |= {
                "router_hidden": torch.randn((width, d), generator=generator),
                "router_score": torch.randn((experts, width), generator=generator), "gate": "topk", "tau": 0.6,
            }  # fmt: skip
            hidden = torch.relu(arguments["x"].double() @ arguments["router_hidden"].double().T)
            scores = (hidden @ arguments["router_score"].double().T).abs()
            clear = (scores.sort().values.diff() > 1e-5 * scores.amax(1, True)).all(1)
            assert clear.float().mean() > 0.5 or width == 1
            y = by_native(arguments | {"run": None}, isa, tiles=True)
            check(y[clear], arguments | {"x": arguments["x"][clear], "run": select(scores, "topk", 0.6)[clear]})
            assert torch.equal(by_native(arguments | {"run": None}, isa, tiles=True), y)


@contextmanager
def team(threads: int):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def at_once(work: Callable[[], object], callers: int = 4) -> None:
    """Call it from several Python threads."""
    threads = [threading.Thread(target=work) for _ in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@needs_native
@ISAS
@pytest.mark.parametrize(("threads", "groups"), [(2, 2), (3, 2), (5, 3), (6, 2), (8, None)])
def test_threads_share_tokens_and_experts(isa, threads, groups, monkeypatch):
    """Tiles of tokens times groups of experts, threads left over, routers of each thread's own tokens or of all."""
    if groups:
        monkeypatch.setenv("D2DMOE_GROUPS", str(groups))
    for dtype in DTYPES.values():
        if not usable(isa, dtype):
            continue
        for tokens in (65, 127, 200):
            arguments = problem(tokens, 48, 24, 9, 40, glu=tokens == 127, dtype=dtype, rank=9)
            hidden = torch.relu(arguments["x"].double() @ arguments["router_hidden"].double().T)
            scores = (hidden @ arguments["router_score"].double().T).abs()
            clear = (scores.sort().values.diff() > 1e-5 * scores.amax(1, True)).all(1)
            routed = arguments | {"run": None, "gate": "topk", "tau": 0.6}
            chosen = {"x": arguments["x"][clear], "run": select(scores, "topk", 0.6)[clear]}
            nothing = {"run": torch.zeros_like(arguments["run"])}
            with team(threads):
                for tiles in (False, True):
                    check(by_native(arguments, isa, tiles=tiles), arguments, f"{tokens} {dtype}")
                    y = by_native(routed, isa, tiles=tiles)
                    check(y[clear], routed | chosen, f"{tokens} {dtype} routed")
                    assert torch.equal(by_native(routed, isa, tiles=tiles), y)
                check(by_native(arguments | nothing, isa), arguments | nothing, f"{tokens} {dtype} none")


@needs_native
def test_a_router_laid_out_by_input_is_shared_counted_and_watched():
    arguments, known = problem(20, 40, 24, 5, 50, glu=False), {}
    tensors, settings = {n: arguments[n] for n in TENSORS}, [arguments[n] for n in ARGUMENTS[13:]]
    plans = [native.Plan(tensors, *settings, tiles=known) for _ in range(2)]
    assert plans[0].layer.router_up == plans[1].layer.router_up
    assert plans[0].extra_bytes == arguments["router_hidden"].nbytes + arguments["router_score"].nbytes
    assert native.Plan(tensors, *settings).extra_bytes == 0
    for name in ("router_hidden", "router_score"):
        plan = native.Plan(tensors, *settings, tiles=known)
        arguments[name].data.mul_(2)
        with pytest.raises(native.StaleWeights):
            plan(arguments["x"])


@needs_native
def test_tiles_are_kept_for_many_tokens_and_counted():
    numbers = [n for n, _ in kernels() if LIBRARY.d2dmoe_kernels_tiles(n)]
    if not numbers:
        pytest.skip("no AMX here")
    few, many = (problem(n, 40, 24, 5, 50, glu=True, dtype=torch.bfloat16) for n in (3, 70))
    plan = native.Plan({n: few[n] for n in TENSORS}, *(few[n] for n in ARGUMENTS[13:]), kernels=numbers[0], tiles={})
    check(plan(few["x"], few["run"]), few)
    assert plan.extra_bytes == 0
    check(plan(many["x"], many["run"]), few | {"x": many["x"], "run": many["run"]})
    assert plan.extra_bytes == 2 * 5 * 32 * (64 + 64 + 64)
    check(plan(few["x"], few["run"]), few)


@needs_native
@pytest.mark.parametrize("tokens", [3, 200, 2000])
@pytest.mark.parametrize("threads", [1, 3])
def test_no_memory_in_any_thread_is_an_error_of_the_caller(tokens, threads):
    arguments = problem(tokens, 1000 + 8 * threads, 24, 5, 50, glu=False)
    plan = native.Plan({n: arguments[n] for n in TENSORS}, *(arguments[n] for n in ARGUMENTS[13:]))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    shared = tokens == 3 or (tokens == 200 and threads == 3)  # groups of experts share one more buffer
    try:
        for left in range(threads + 1 + shared):
            LIBRARY.d2dmoe_limit_allocations(left)
            enough = left == threads + shared
            with nullcontext() if enough else pytest.raises(MemoryError, match=f"no memory for {tokens} tokens"):
                plan(arguments["x"], arguments["run"])
            LIBRARY.d2dmoe_limit_allocations(-1)
            check(plan(arguments["x"], arguments["run"]), arguments)
    finally:
        LIBRARY.d2dmoe_limit_allocations(-1)
        torch.set_num_threads(before)


@needs_native
@torch.no_grad()
def test_plans_of_a_layer_share_tiles_and_old_ones_go():
    if not LIBRARY.d2dmoe_kernels_tiles(native.kernel_for(torch.bfloat16)):
        pytest.skip("no AMX here")
    _, layer = make_pair(32, 64, 4, False, None, torch.bfloat16)
    x = torch.randn(64, 32).bfloat16()
    layer.gate_state = GateState("topk", 0.5)
    layer(x)
    held = {key: tiled.data_ptr() for key, (_, tiled, _) in layer.prepared.tiles.items()}
    assert len(held) == 2  # up and down
    layer.gate_state = GateState("topk", 0.25)
    layer(x)
    assert {key: tiled.data_ptr() for key, (_, tiled, _) in layer.prepared.tiles.items()} == held
    layer.up_weight.mul_(2)
    y = layer(x)
    assert len(layer.prepared.tiles) == 2
    assert layer.prepared.tiles.keys() != held.keys()
    layer.prepared.invalidate()
    assert torch.equal(layer(x), y)


@needs_native
@ISAS
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_from_end_to_end_of_the_range(isa, activation):
    """One neuron per expert whose input is the value itself; the extremes overflow an unguarded exponential."""
    if not usable(isa, torch.float32):
        pytest.skip("fp32 is another table's")
    z = torch.cat([torch.linspace(-20, 20, 4001), torch.tensor([-3e38, -1e30, -200.0, -0.0, 0.0, 200.0, 1e30])])
    arguments = problem(len(z), 1, 1, 1, 1, glu=False, bias=False, constants=False, rank=0, activation=activation)
    arguments |= {"x": z[:, None], "run": torch.ones(len(z), 1, dtype=torch.bool)}
    arguments |= {"up_weight": torch.ones(1, 1, 1), "down_weight": torch.ones(1, 1, 1)}
    assert_close(by_native(arguments, isa)[:, 0].double(), ACTIVATIONS[activation](z.double()), rtol=2e-6, atol=2e-7)


@needs_native
@pytest.mark.parametrize("tokens", [0, 1, 5, 70])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_none_and_all_selected(tokens, threads):
    with team(threads):
        for fill in (0, 1):
            arguments = problem(tokens, 20, 16, 5, 16, glu=True)
            arguments["run"].fill_(fill)
            check(by_native(arguments), arguments, f"run={fill}")
        arguments |= {"run": None, "tau": 0.0, "constants": None, "linear_in": None, "linear_out": None}
        check(by_native(arguments), arguments, "tau=0")


@needs_native
@ISAS
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize(("least", "most"), [(0, 0), (2, 0), (0, 3), (2, 4)])
def test_gates_choose_what_the_definition_chooses(isa, gate, least, most, shared):
    scores = torch.rand(50, 13)
    scores[:10] = (scores[:10] * 4).round() / 4  # ties
    scores[10:14] = 0.0
    scores[14, 1:] = 0.0
    for tau in (0.01, 0.1, 0.25, 0.3, 0.5, 0.75, 0.9, 1.0):
        arguments = problem(1, 4, 4, 13, 4, glu=False)
        tensors = {name: arguments[name] for name in TENSORS}
        plan = native.Plan(tensors, "gelu", gate, tau, least, most, shared, kernels=isa)
        expected = select(scores, gate, tau, least, most, shared)
        if gate in ("max", "topk", "absolute"):
            assert torch.equal(plan.choose(scores), expected), (gate, tau)
        else:  # sums in another order: only what is clear of the threshold has to agree
            clear = torch.ones_like(expected)
            clear[:, shared:] = (GATES[gate](scores[:, shared:]) - tau).abs() > 1e-5
            assert torch.equal(plan.choose(scores)[clear], expected[clear]), (gate, tau)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("tokens", [1, 2, 40, 90])
def test_router_and_gate_inside(dtype, gate, tokens):
    arguments = problem(tokens, 37, 8, 12, 16, glu=False, dtype=DTYPES[dtype])
    hidden = torch.relu(arguments["x"].double() @ arguments["router_hidden"].double().T)
    scores = (hidden @ arguments["router_score"].double().T).abs()
    gaps = scores.sort().values.diff()
    for tau in (0.2, 0.6):  # tokens clear of the threshold: the library adds up in another order
        clear = ((GATES[gate](scores) - tau).abs() > 1e-5) if gate != "topk" else gaps > 1e-6 * scores.amax(1, True)
        clear = clear.all(1)
        assert clear.float().mean() > 0.9
        arguments |= {"run": None, "gate": gate, "tau": tau}
        y = OPERATOR(*arguments.values())
        check(y[clear], arguments | {"x": arguments["x"][clear], "run": select(scores, gate, tau)[clear]}, f"tau={tau}")


@needs_native
def test_inputs_that_are_not_contiguous_or_not_aligned():
    arguments = problem(9, 33, 16, 4, 48, glu=False)
    expected = by_native(arguments)
    memory = torch.zeros(9 * 40 + 3)
    strided = memory[3:].view(9, 40)[:, :33]
    strided.copy_(arguments["x"])
    transposed = arguments["x"].T.contiguous().T
    for name, x in (("strided", strided), ("transposed", transposed)):
        assert torch.equal(by_native(arguments | {"x": x}), expected), name
    assert torch.equal(by_native(arguments | {"run": arguments["run"].T.contiguous().T}), expected)
    one = problem(1, 33, 16, 4, 48, glu=False)
    repeated = one | {"x": one["x"].expand(5, -1), "run": one["run"].expand(5, -1)}
    assert_close(by_native(repeated)[3:4], by_native(one), msg=lambda m: f"stride 0: {m}")


@needs_native
def test_the_same_whatever_the_batch_and_bit_for_bit_again():
    """Neighbours may change the order of a sum, timing may not."""
    arguments = problem(200, 40, 24, 6, 40, glu=True)
    whole = by_native(arguments)
    for _ in range(3):
        assert torch.equal(by_native(arguments), whole)
    part = {"x": arguments["x"][50:150], "run": arguments["run"][50:150]}
    assert_close(by_native(arguments | part), whole[50:150])


@needs_native
@pytest.mark.parametrize("tokens", [1, 40, 130, 700])
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_python_threads_get_the_bits_that_one_alone_gets(tokens, dtype):
    """They share the threads, so that each has fewer than it asks for."""
    arguments = problem(tokens, 64, 32, 12, 64, glu=True, dtype=DTYPES[dtype])
    arguments |= {"run": None, "gate": "topk", "tau": 0.6}
    plan = native.Plan({n: arguments[n] for n in TENSORS}, *(arguments[n] for n in ARGUMENTS[13:]), tiles={})
    wrong = []
    with team(6):
        expected = plan(arguments["x"])

        def work() -> None:
            torch.set_num_threads(6)
            wrong.extend(1 for _ in range(15) if not torch.equal(plan(arguments["x"]), expected))

        at_once(work)
    assert not wrong


@needs_native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_after_fork():
    """The child has none of the parent's threads and must not wait for them."""
    arguments = problem(70, 64, 32, 8, 64, glu=False)
    few = problem(3, 64, 32, 8, 64, glu=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    bf16 = {k: v.bfloat16() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in arguments.items()}
    problems = (arguments, few, bf16)
    expected = [by_native(p) for p in problems]  # the team exists now
    child = os.fork()
    if child == 0:
        same = all(torch.equal(by_native(p), y) for p, y in zip(problems, expected, strict=True))
        os._exit(0 if same else 1)
    torch.set_num_threads(before)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("glu", [False, True], ids=["ffn", "glu"])
def test_gradients_are_the_reference_ones(backend, glu):
    if backend == "native" and LIBRARY is None:
        pytest.skip("no native backend here")
    arguments = problem(6, 8, 4, 5, 8, glu=glu)
    ours = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    for group in (arguments, ours):
        for value in group.values():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                value.requires_grad_()
    weights = torch.randn(6, 8)
    (reference(*arguments.values()) * weights).sum().backward()
    with use_backend(backend):
        (OPERATOR(*ours.values()) * weights).sum().backward()
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.grad is not None:
            assert_close(ours[name].grad, value.grad, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_operator_is_registered_properly(backend):
    if backend == "native" and LIBRARY is None:
        pytest.skip("no native backend here")
    arguments = problem(6, 8, 4, 5, 8, glu=True)
    for name in ("x", "up_weight", "down_bias"):
        arguments[name].requires_grad_()
    with use_backend(backend):
        torch.library.opcheck(OPERATOR, tuple(arguments.values()))


def layer_of(kind: str = "ffn", *, act=torch.nn.functional.gelu, dtype=torch.float32, budgets: int = 2) -> DynamicFFN:
    """A layer with random weights and every stand-in."""
    block = Block(
        name="mlp", kind=kind, activation="gelu", d_model=24, width=64, up="up",
        gate="gate" if kind == "glu" else None, down="down", experts=8,
    )  # fmt: skip
    layer = DynamicFFN(
        block, d_out=24, biases=(True, kind == "glu", True), act=act, router_width=16, budgets=budgets, delta_rank=4,
        linear_rank=4, dtype=dtype,
    )  # fmt: skip
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape).to(dtype) * 0.3
    return layer.eval()


@needs_native
@pytest.mark.parametrize("kind", ["ffn", "glu"])
@pytest.mark.parametrize("stand_in", [None, 1])
@pytest.mark.parametrize("tau", [0.0, 0.5, 0.75])
@pytest.mark.parametrize("shape", [(24,), (3, 24), (2, 50, 24), (0, 24)], ids=str)
@torch.no_grad()
def test_layer_is_the_same_by_either_backend(kind, stand_in, tau, shape):
    layer = layer_of(kind)
    layer.gate_state = GateState("topk", tau, stand_in)
    x = torch.randn(shape)
    with use_backend("reference"):
        expected = layer(x)
    with use_backend("native"):
        y = layer(x)
    assert y.shape == expected.shape
    assert_close(y, expected, rtol=1e-4, atol=1e-4)


@needs_native
@torch.no_grad()
def test_layer_notices_changed_weights_gates_and_dtypes():
    layer, x = layer_of(), torch.randn(4, 24)

    def agree() -> None:
        with use_backend("reference"):
            expected = layer(x)
        assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)

    layer.gate_state = GateState("topk", 0.5, 0)
    agree()
    for name in ("up_weight", "down_bias", "constants", "delta_in"):
        getattr(layer, name).mul_(1.5)
        agree()
    layer.gate_state = GateState("topk", 0.5, 1)
    agree()
    layer.gate_state = replace(layer.gate_state, tau=0.25)
    agree()
    twin = copy.deepcopy(layer)
    assert_close(twin(x), layer(x))
    layer.load_state_dict({k: v * 0.5 for k, v in layer.state_dict().items()})
    agree()
    layer.bfloat16()
    y = layer(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert_close(y.float(), layer.float()(x.bfloat16().float()), rtol=0.1, atol=0.1)


@needs_native
@torch.no_grad()
def test_the_default_device_does_not_matter():
    layer, x = layer_of("glu"), torch.randn(3, 24)
    layer.gate_state = GateState("topk", 0.5, 1)
    with torch.device("meta"):
        y = layer(x)
    assert torch.equal(layer(x), y)


@needs_native
@torch.no_grad()
def test_compiled_layer_has_no_graph_break():
    layer, x = layer_of("glu"), torch.randn(5, 24)
    layer.gate_state = GateState("topk", 0.5, 1)
    expected = layer(x)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), expected)
    layer.gate_state = GateState("topk", 0.0, None)
    assert_close(compiled(x), layer(x))


@needs_native
@torch.no_grad()
def test_tracing_and_vmap_see_every_step():
    layer, x = layer_of(), torch.randn(5, 24)
    layer.gate_state = GateState("topk", 0.5, 1)
    traced = torch.jit.trace(layer, (x,), check_trace=False)
    assert_close(traced(x + 1), layer(x + 1), rtol=1e-4, atol=1e-4)
    assert_close(torch.func.vmap(layer)(x[:, None])[:, 0], layer(x), rtol=1e-4, atol=1e-4)


def test_unknown_activation_goes_by_the_reference():
    layer = layer_of(act=lambda z: torch.tanh(z) * 2)
    assert layer.activation is None
    layer.gate_state = GateState("topk", 0.5, 0)
    with torch.no_grad():
        assert layer(torch.randn(3, 24)).shape == (3, 24)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_known_by_their_values(name):
    assert activation_name(ACTIVATIONS[name]) == name
    assert activation_name(lambda z: ACTIVATIONS[name](z).clamp(-10, 10)) is None


def test_forced_backend():
    assert {name for name, _, _ in backends()} >= {"native", "reference"}
    with pytest.raises(ValueError, match="warp"), use_backend("warp"):
        pass
    arguments = problem(2, 4, 4, 3, 4, glu=False, dtype=torch.float64)
    with use_backend("native"), pytest.raises(RuntimeError, match="float64"):
        OPERATOR(*arguments.values())


def test_flops_count_what_runs():
    arguments = problem(6, 8, 4, 5, 16, glu=True)
    pairs = int(arguments["run"].sum())
    linear = 6 * 3 * (8 + 16)
    assert dynamic_ffn_flops(*arguments.values()) == 2 * (pairs * 4 * (8 + 8 + 16) + linear)
    everything = arguments | {"run": None, "tau": 0.0}
    assert dynamic_ffn_flops(*everything.values()) == 2 * 6 * 5 * 4 * (8 + 8 + 16)


@needs_native
def test_struct_is_as_large_here_as_there():
    assert ctypes.sizeof(native._Layer) == LIBRARY.d2dmoe_layer_bytes()
