"""A converted model exports to ONNX: all experts computed, the skipped ones masked."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_memory import small
from torch.testing import assert_close

from d2dmoe import set_gate
from d2dmoe.moe.layer import layers

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


class Logits(torch.nn.Module):
    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize(("gate", "active", "gradients"), [
    ("topk", 0.25, False), ("topk", 0.5, True), ("topk", 1, False), ("topp", 0.5, False), ("share", 0.5, False),
])  # fmt: skip
def test_exported_outputs_are_the_models(gate, active, gradients):
    model, ids = Logits(small()).eval(), torch.randint(5, 60, (2, 9))
    set_gate(model.model, active=active)
    for layer in layers(model.model):
        layer.gate_state = replace(layer.gate_state, name=gate)
    with torch.set_grad_enabled(gradients):
        program = torch.onnx.export(model, (ids,), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    (y,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
    with torch.no_grad():
        assert_close(torch.from_numpy(y), model(ids), rtol=1e-4, atol=1e-4)
