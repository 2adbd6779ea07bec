"""A layer computed by threads of the caller's, which may take their parts one after the other and in any order."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from test_operator import DTYPES, check, needs_native, problem

from d2dmoe.kernels import native
from d2dmoe.kernels.operator import ARGUMENTS, TENSORS

PART = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
PARTS = ctypes.CFUNCTYPE(None, ctypes.c_int, PART, ctypes.c_void_p)


def by_parts(plan: native.Plan, x: torch.Tensor, run: torch.Tensor | None, team: int, parts: Callable) -> torch.Tensor:
    y = torch.full((len(x), plan.d_out), torch.nan, dtype=x.dtype)
    forward = ctypes.CDLL(str(native.LIBRARY)).d2dmoe_forward_by
    forward.argtypes = [*native.library()[0].d2dmoe_forward.argtypes, PARTS]
    mask = None if run is None else run.contiguous().data_ptr()
    assert forward(plan.call, x.data_ptr(), x.stride(0), mask, len(x), y.data_ptr(), team, PARTS(parts)) == 0
    return y


@needs_native
@pytest.mark.parametrize("expert_dtype", [None, "int8", "int8-dynamic"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("team", [1, 2, 5])
@pytest.mark.parametrize("tokens", [1, 3, 64, 200])
def test_parts_one_after_the_other_backwards(tokens, team, dtype, expert_dtype):
    """Bit for bit what so many threads at once compute."""
    seen, before = [], torch.get_num_threads()

    def parts(count, part, context):
        seen.append(count)
        for number in reversed(range(count)):
            part(context, number, count)

    for routed in (False, True):
        arguments = problem(tokens, 37, 16, 9, 21, glu=routed, dtype=DTYPES[dtype]) | {"gate": "share", "tau": 0.3}
        if routed:
            arguments["run"] = None
        settings = (arguments[name] for name in ARGUMENTS[13:])
        plan = native.Plan({name: arguments[name] for name in TENSORS}, *settings, expert_dtype=expert_dtype)
        y = by_parts(plan, arguments["x"], arguments["run"], team, parts)
        torch.set_num_threads(team)
        assert torch.equal(y, plan(arguments["x"], arguments["run"]))
        torch.set_num_threads(before)
        assert not y.isnan().any()
        if expert_dtype is None:
            check(y, arguments, f"{tokens} tokens, {team} parts")
    assert set(seen) == {team}
    assert len(seen) >= 2 * (2 if tokens <= native.FEW else 1)
