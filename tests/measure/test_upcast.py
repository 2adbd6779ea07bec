"""Weights in half precision, everything that is computed in fp32."""

from __future__ import annotations

import pytest
import torch
from zoo import tiny

from d2dmoe.measure.upcast import Upcasting, upcast_vectors


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit"])
def test_a_model_with_half_weights_gives_what_the_same_weights_give_in_fp32(name):
    model = tiny(name).to(torch.bfloat16)
    wide = tiny(name)
    wide.load_state_dict(model.state_dict())
    ids = torch.arange(5, 14).reshape(1, 9)
    size = getattr(model.config, "image_size", 0)
    inputs = {"pixel_values": torch.rand(1, 3, size, size)} if name == "vit" else {"input_ids": ids}
    upcast_vectors(model)
    with torch.no_grad(), Upcasting():
        assert Upcasting.active == 1
        ours = model(**inputs)[0]
    assert Upcasting.active == 0
    assert any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert ours.dtype == torch.float32
    tolerance = 1e-3 if name == "vit" else 1e-5  # ViT rounds its pixels to the dtype of its weights
    with torch.no_grad():
        torch.testing.assert_close(ours, wide(**inputs)[0], rtol=tolerance, atol=tolerance)
