"""Projections on few tokens by the native library, against the formula in fp64."""

from __future__ import annotations

import ctypes
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_operator import BF16_ERROR, DTYPES, ISAS, LIBRARY, at_once, needs_native, usable
from torch.testing import assert_close

from d2dmoe.kernels import ProjectionPlan, StaleWeights
from d2dmoe.kernels.cpu import projection

TOKENS = (1, 2, 3, 4, 7, 16)
pytestmark = needs_native


def problem(
    tokens: int, inputs: int, widths: list[int], ranks: list[int], *, channels: bool, bias: bool = True,
    share: float = 0.5, dtype: torch.dtype = torch.float32, seed: int = 0,
) -> dict:  # fmt: skip
    """`x` and the arguments of `ProjectionPlan`; values that bf16 holds exactly."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale).bfloat16().to(dtype)

    outputs = sum(widths)
    return {
        "x": random(tokens, inputs),
        "first": random(sum(ranks), inputs, scale=inputs**-0.5) if ranks else None,
        "seconds": [random(w, r, scale=max(r, 1) ** -0.5) for w, r in zip(widths, ranks, strict=True)] if ranks else [],
        "base": random(outputs) if bias else None,
        "weight": random(inputs, outputs, scale=inputs**-0.5) if channels else None,
        "norms": random(inputs).abs() if channels else None,
        "threshold": float(torch.randn(1, generator=generator).abs()) * share if channels else 0.0,
    }


def formula(arguments: dict) -> torch.Tensor:
    """The docstring of `moe/projection.py` in fp64; the selection in the dtype of the weights."""
    x, first, weight = (None if t is None else t.double() for t in (arguments[n] for n in ("x", "first", "weight")))
    y, rest = 0, x
    if weight is not None:
        keep = (arguments["x"].abs() * arguments["norms"] >= arguments["threshold"]).double()
        y, rest = (x * keep) @ weight, x - x * keep
    if first is not None:
        ranks = [t.shape[1] for t in arguments["seconds"]]
        thin = (rest @ first.T).split(ranks, -1)
        y = y + torch.cat([t @ s.double().T for t, s in zip(thin, arguments["seconds"], strict=True)], -1)
    return y if arguments["base"] is None else y + arguments["base"].double()


def plan_of(arguments: dict, isa: int | None = None, sources: tuple = ()) -> ProjectionPlan:
    return ProjectionPlan(**{k: v for k, v in arguments.items() if k != "x"}, kernels=isa, sources=sources)


def check(arguments: dict, isa: int | None = None, name: str = "y") -> torch.Tensor:
    """At the tolerances of conftest.py; returns the output."""
    return close(plan_of(arguments, isa)(arguments["x"]), formula(arguments), name)


def close(y: torch.Tensor, expected: torch.Tensor, name: str = "y") -> torch.Tensor:
    """The output, if it is as expected in fp64."""
    assert y.shape == expected.shape, name
    if y.dtype == torch.bfloat16:
        rmse = (y.double() - expected).norm() / expected.norm().clamp_min(1e-9)
        assert rmse <= BF16_ERROR, f"{name}: relative RMSE {rmse:.2e}"
    else:
        assert_close(y.double(), expected, rtol=1.3e-6, atol=1e-5, msg=lambda m: f"{name}: {m}")
    return y


@pytest.fixture
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@ISAS
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_odd_shapes(isa, dtype, data):
    if not usable(isa, DTYPES[dtype]):
        return
    tokens, inputs = data.draw(st.sampled_from(TOKENS)), data.draw(st.integers(1, 90))
    widths = data.draw(st.lists(st.integers(1, 90), min_size=1, max_size=3))
    channels = data.draw(st.booleans())
    ranks = [data.draw(st.integers(0, 40)) for _ in widths] if not channels or data.draw(st.booleans()) else []
    arguments = problem(
        tokens, inputs, widths, ranks, channels=channels, bias=data.draw(st.booleans()), dtype=DTYPES[dtype],
        share=data.draw(st.sampled_from([0.0, 0.3, 1.0, 100.0])), seed=data.draw(st.integers(0, 9)),
    )  # fmt: skip
    check(arguments, isa, f"{tokens} x {inputs} -> {widths}, ranks {ranks}, channels {channels}")


@ISAS
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_heads_of_less_width(isa, dtype, data):
    """A thin product whose outputs take their places among zeros, and one of some of the inputs."""
    if not usable(isa, DTYPES[dtype]):
        return
    tokens, width = data.draw(st.sampled_from(TOKENS)), data.draw(st.integers(1, 200))
    other, bias = data.draw(st.integers(1, 90)), data.draw(st.booleans())
    kept = data.draw(st.lists(st.integers(0, width - 1), min_size=1, max_size=width, unique=True).map(sorted))
    seed = data.draw(st.integers(0, 9))
    numbers = problem(
        tokens, other, [width], [len(kept)], channels=False, bias=bias, dtype=DTYPES[dtype], seed=seed
    )  # fmt: skip
    places = torch.full((width,), -1)
    places[kept] = torch.arange(len(kept))
    spread = ProjectionPlan(numbers["first"], [], numbers["base"], spread=places, kernels=isa)
    wanted = torch.zeros(tokens, width).double()
    wanted[:, kept] = numbers["x"].double() @ numbers["first"].double().T
    wanted = wanted if numbers["base"] is None else wanted + numbers["base"].double()
    close(spread(numbers["x"]), wanted)
    x = problem(tokens, width, [], [], channels=False, dtype=DTYPES[dtype])["x"]
    gather = ProjectionPlan(
        None, numbers["seconds"], numbers["base"], gather=torch.tensor(kept), width=width, kernels=isa
    )
    wanted = x[:, kept].double() @ numbers["seconds"][0].double().T
    close(gather(x), wanted if numbers["base"] is None else wanted + numbers["base"].double())


@ISAS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_wide_shapes(isa, dtype, tokens):
    """More columns than stay in the first cache together, whole vectors and not."""
    if usable(isa, DTYPES[dtype]):
        for inputs, widths in ((256, [1100, 1100]), (131, [2049])):
            check(problem(tokens, inputs, widths, [], channels=True, dtype=DTYPES[dtype]), isa, f"{widths}")
            ranks = [33, 64][: len(widths)]
            check(problem(tokens, inputs, widths, ranks, channels=False, dtype=DTYPES[dtype]), isa, f"{widths} {ranks}")


@ISAS
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_selection_is_the_definition_bit_for_bit(isa, dtype):
    """With an identity for weights the output shows which channels ran; ties run."""
    if not usable(isa, DTYPES[dtype]):
        pytest.skip("fp32 is another table's")
    dtype, channels = DTYPES[dtype], 611
    x, norms = torch.randn(16, channels).to(dtype), (torch.rand(channels) + 0.1).to(dtype)
    scores = x.abs() * norms
    thresholds = [0.3, 0.7, *(float(s) for s in scores.flatten()[::400])]  # scores among them: ties
    for threshold in thresholds:
        plan = ProjectionPlan(None, [], None, torch.eye(channels, dtype=dtype), norms, threshold, kernels=isa)
        assert torch.equal(plan(x) != 0, scores >= threshold), threshold
    least = float(scores[0].max())
    plan = ProjectionPlan(None, [], None, torch.eye(channels, dtype=dtype), norms, least, kernels=isa)
    assert (plan(x[:1]) != 0).sum() == (scores[0] == least).sum() >= 1


@pytest.mark.parametrize("ranks", [[], [3]])
def test_none_run_and_all_run(ranks):
    for threshold in (0.0, float("inf")):
        arguments = problem(3, 40, [50], ranks, channels=True) | {"threshold": threshold}
        y = check(arguments)
        if not ranks and threshold:
            assert torch.equal(y, arguments["base"].expand(3, -1))
        elif not threshold:
            everything = arguments["x"] @ arguments["weight"] + arguments["base"]
            assert_close(y, everything, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("ranks", [[], [3]])
@pytest.mark.parametrize("norm", [0.0, 1.0])
def test_what_is_not_a_number_shows(bad, ranks, norm):
    arguments = problem(2, 20, [24], ranks, channels=True)
    arguments["x"][1, 7], arguments["norms"][7] = bad, norm
    y = plan_of(arguments)(arguments["x"])
    assert torch.equal(y.isfinite(), formula(arguments).isfinite())
    assert not y[1].isfinite().any()


@pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_by_any_number_of_threads(threads, dtype):
    for tokens in (1, 5):
        for widths, ranks, channels in (([70, 20], [9, 0], False), ([300], [], True), ([5], [4], True)):
            arguments = problem(tokens, 60, widths, ranks, channels=channels, dtype=DTYPES[dtype])
            y = check(arguments)
            torch.set_num_threads(1)
            assert torch.equal(plan_of(arguments)(arguments["x"]), y)
            torch.set_num_threads(threads)


def test_several_python_threads():
    arguments = problem(3, 64, [96, 96], [20, 30], channels=True)
    plan, wrong = plan_of(arguments), []
    expected = plan(arguments["x"])

    def work() -> None:
        torch.set_num_threads(2)
        for _ in range(50):
            if not torch.equal(plan(arguments["x"]), expected):
                wrong.append(1)

    at_once(work)
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("threads", [2], indirect=True)
def test_after_fork(threads):
    arguments = problem(2, 64, [96], [20], channels=True)
    plan = plan_of(arguments)
    expected = plan(arguments["x"])
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(plan(arguments["x"]), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_inputs_of_any_shape_and_stride():
    arguments = problem(6, 33, [48], [5], channels=True)
    plan, x = plan_of(arguments), arguments["x"]
    expected = plan(x)
    for name, other in (("batch", x.view(2, 3, 33)), ("strided", torch.zeros(6, 40)[:, :33].copy_(x)),
                        ("transposed", x.T.contiguous().T)):  # fmt: skip
        assert torch.equal(plan(other).view(6, 48), expected), name
    assert torch.equal(plan(x[2]), plan(x[2:3])[0])
    assert plan(x[:0]).shape == (0, 48)


def test_what_does_not_fit_is_refused():
    arguments = problem(2, 33, [48], [5], channels=True)
    plan = plan_of(arguments)
    for x in (torch.zeros(2, 32), torch.zeros(2, 33).double(), torch.zeros(2, 33, device="meta")):
        with pytest.raises(ValueError, match="for a map of 33"):
            plan(x)
    with pytest.raises(RuntimeError, match="weight is on the device meta"):
        plan_of(arguments | {"weight": arguments["weight"].to("meta")})
    with torch.device("meta"):
        assert plan(arguments["x"]).device.type == "cpu"


def test_a_changed_source_and_a_changed_copy_are_seen():
    source = torch.randn(100)
    arguments = problem(2, 33, [48], [5], channels=True)
    turned = arguments | {"weight": arguments["weight"].T.contiguous().T}  # is copied
    for plan, tensor in ((plan_of(arguments, sources=(source,)), source), (plan_of(turned), turned["weight"])):
        plan(arguments["x"])
        tensor.data.mul_(2)
        with pytest.raises(StaleWeights):
            plan(arguments["x"])


def test_no_memory_is_an_error_of_the_caller():
    arguments = problem(16, 5000, [8], [], channels=True)
    plan = plan_of(arguments)
    LIBRARY.d2dmoe_limit_allocations(0)
    try:
        with pytest.raises(MemoryError, match="no memory for 16 tokens"):
            plan(arguments["x"])
    finally:
        LIBRARY.d2dmoe_limit_allocations(-1)
    check(arguments)


def test_struct_is_as_large_here_as_there():
    assert ctypes.sizeof(projection._Projection) == LIBRARY.d2dmoe_projection_bytes()
