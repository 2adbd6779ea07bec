"""A checkpoint that an earlier version wrote gives what it gave then.

`checkpoint-2026-11-24` is a random GPT-2 of two blocks that revision 4e676b2 converted, with three budgets and fitted
stand-ins; `logits.safetensors` is what that revision computed for the token ids below.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from d2dmoe import set_gate
from d2dmoe.kernels import native, use_backend
from d2dmoe.moe.layer import layers

FOLDER = Path(__file__).with_name("checkpoint-2026-11-24")
IDS = torch.arange(8)[None] * 31 % 250 + 1


@pytest.mark.parametrize("backend", ["reference", "native"])
@torch.no_grad()
def test_an_old_checkpoint_gives_the_same_logits(backend):
    if backend == "native" and not native.LIVE:
        pytest.skip("the CPU kernels were not built")
    model = AutoModelForCausalLM.from_pretrained(FOLDER).eval()
    assert len(layers(model)) == 2
    recorded = load_file(FOLDER / "logits.safetensors")
    for active in (0.25, 0.5, 0.75, 1):
        set_gate(model, active=active)
        with use_backend(backend):
            assert_close(model(input_ids=IDS).logits, recorded[f"active_{active}"], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(recorded["active_0.25"], recorded["active_1"], atol=1e-2)
