"""Every architecture of the zoo is found, converted and equal to the dense model with all experts on."""

from __future__ import annotations

import pytest
import torch
from conftest import randomise_routers, randomise_vectors
from torch.testing import assert_close
from transformers.activations import ACT2FN
from zoo import CASES, tiny

from d2dmoe.config import D2DMoEConfig
from d2dmoe.discovery import discover, dummy_inputs, skeleton
from d2dmoe.moe.gating import set_gate
from d2dmoe.moe.layer import layers
from d2dmoe.moe.loader import attach

NAMES = [case.name for case in CASES]


def outputs(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All floating-point tensors of the model's output."""
    with torch.no_grad():
        result = model(**inputs)
    flat = {k: v for k, v in result.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    assert flat
    return flat


def test_enough_architectures():
    assert len(CASES) >= 35


@pytest.fixture
def _double():
    """fp64 throughout: xglm makes a scalar of the default dtype that must hold the lowest fp64 number."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_convert(case):
    model = tiny(case.name).double()
    if getattr(model.config, "_experts_implementation", None) == "grouped_mm":
        model.set_experts_implementation("eager")  # the grouped product does not take fp64
    randomise_vectors(model)
    inputs = dummy_inputs(model)
    dense = outputs(model, inputs)

    found = discover(model)
    assert len(found.blocks) == case.blocks
    z = torch.linspace(-4, 4, 101, dtype=torch.float64)
    for block in found.blocks:
        assert block.kind == case.kind
        assert bool(block.fused) == case.fused or case.name == "dinov2-swiglu"  # fused before transformers 5.23
        assert (block.calls > 1) == case.shared
        assert_close(ACT2FN[block.activation](z), ACT2FN[case.activation](z), rtol=0, atol=1e-6)
        block.experts = 8

    orders = [torch.randperm(block.width) for block in found.blocks]
    attach(model, D2DMoEConfig(blocks=found.blocks, router_width=8), orders)
    randomise_routers(model)
    assert len(layers(model)) == case.blocks
    converted = outputs(model, inputs)
    for name, value in dense.items():
        assert_close(converted[name], value, msg=lambda m, n=name: f"{n}: {m}")

    set_gate(model, tau=0.75)  # a quarter of the experts: the layers really are in use
    gated = outputs(model, inputs)
    assert any(not torch.allclose(gated[name], dense[name]) for name in dense)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_skeleton_tells_the_same(case):
    model = tiny(case.name)
    assert discover(skeleton(type(model), model.config)).blocks == discover(model).blocks
