"""Projections around attention are found in every architecture of the zoo that has attention of that form."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from zoo import CASES, tiny

from d2dmoe.discovery import find_projections, skeleton

SEPARATE, FUSED = {"q": 2, "k": 2, "v": 2, "o": 2}, {"qkv": 2, "o": 2}
OTHER = {
    "albert": dict.fromkeys("qkvo", 1), "swin": dict.fromkeys("qkvo", 4), "clip": dict.fromkeys("qkvo", 4),
    "siglip": dict.fromkeys("qkvo", 4), "deberta-v2": {}, "deepseek_v3": {},
} | {name: dict.fromkeys("qkvo", 6) for name in ("t5", "t5-gated", "bart", "m2m_100", "whisper")}  # fmt: skip
FUSED_MODELS = ("gpt2", "openai-gpt", "imagegpt", "codegen", "gpt_neox", "bloom", "mpt", "persimmon", "phi3",
                "modernbert", "blip-vision", "falcon")  # fmt: skip


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_roles(name):
    model = tiny(name)
    found = find_projections(skeleton(type(model), model.config))
    assert Counter(p.role for p in found.found) == OTHER.get(name, FUSED if name in FUSED_MODELS else SEPARATE)
    for projection in found.found:
        weight = model.get_submodule(projection.name).weight
        assert {projection.inputs, projection.outputs} == {*weight.shape}
        assert sum(projection.sections) == projection.outputs


def test_grouped_queries_have_sections_of_their_widths():
    (first, *_) = find_projections(tiny("phi3")).found
    assert first.sections == [first.inputs, *[(first.outputs - first.inputs) // 2] * 2]


def test_projections_of_one_input_are_one_group():
    found = {p.name.rpartition(".")[2]: p.group for p in find_projections(tiny("llama")).found[:4]}
    assert found["q_proj"] == found["k_proj"] == found["v_proj"] != found["o_proj"]


class Mixing(nn.Module):
    """A gate with a softmax, and a linear map behind it that reads the residual stream as well: no attention."""

    main_input_name = "x"

    def __init__(self):
        super().__init__()
        self.gate, self.value, self.out = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        mixed = self.gate(x).softmax(-1) * self.value(x)
        return {"y": self.out(mixed)}


def test_a_softmax_alone_is_no_attention():
    found = find_projections(Mixing(), {"x": torch.randn(2, 5, 8)})
    assert not found.found


class Doubled(nn.Linear):
    """A linear map with something around it that no weight tells."""

    def forward(self, x):
        return 2 * super().forward(x)


class Spelled(nn.Linear):
    """A linear map, written out."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


@pytest.mark.parametrize(("kind", "plain"), [(nn.Linear, True), (Spelled, True), (Doubled, False)])
def test_a_subclass_of_linear_is_taken_if_it_computes_the_same(kind, plain):
    model = tiny("bert")
    first = next(module for name, module in model.named_modules() if name.endswith("query"))
    first.__class__ = kind
    found = find_projections(model)
    assert ([why for name, why in found.refused if name.endswith("query")] == []) is plain
    assert sum(p.role == "q" for p in found.found) == 1 + plain
