"""Greedy text does not depend on how it is computed: cache, batch, padding, threads."""

from __future__ import annotations

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from d2dmoe import ConvertConfig, set_gate
from d2dmoe.convert import convert_model
from d2dmoe.data import Batches

NEW, PROMPTS, TIE = 10, 20, 1e-3  # two logits nearer than TIE may change places by rounding


@pytest.fixture(scope="module")
def mini():
    """gpt2-mini at a quarter, converted on random tokens, and prompts of different lengths."""
    folder = ROOT / "checkpoints" / "gpt2-mini"
    return prepared(folder, AutoTokenizer.from_pretrained(folder))


def prepared(folder, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    text = (ROOT / "CONTRIBUTING.md").read_text()
    ids = torch.tensor(tokenizer(text)["input_ids"])[: 64 * 40]
    rows = [{"input_ids": part} for part in ids.split(64) if len(part) == 64]
    config = ConvertConfig(
        model="mini", active=[0.25], preset="training-free", router_tokens=1000, calibration_tokens=1000,
        router_fit="closed-form",
    )  # fmt: skip
    convert_model(model, config, Batches(rows, 8))
    set_gate(model, active=0.25)
    lengths = torch.randint(3, 24, (PROMPTS,), generator=generator).tolist()
    return model, [ids[50 * n : 50 * n + length] for n, length in enumerate(lengths)]


@torch.no_grad()
def greedy(model, prompts: list[torch.Tensor], **options) -> list[list[int]]:
    """New tokens of prompts in one batch, padded on the left."""
    ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_side="left")
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True, padding_side="left")
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=None, **options
    )
    return out[:, ids.shape[1] :].tolist()


@torch.no_grad()
def first_difference(model, prompt: torch.Tensor, ours: list[int], theirs: list[int]) -> tuple[float, float] | None:
    """The two logits at the first token that differs, both computed in one way; `None` where there is no difference."""
    for n, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a != b:
            logits = model(torch.cat([prompt, torch.tensor(ours[:n], dtype=prompt.dtype)])[None]).logits[0, -1]
            return float(logits[a]), float(logits[b])
    return None


def agree(model, prompts, alone, together) -> None:
    for prompt, a, b in zip(prompts, alone, together, strict=True):
        logits = first_difference(model, prompt, a, b)
        assert logits is None or abs(logits[0] - logits[1]) < TIE, f"{logits}: {a} and {b}"


def check_all(model, prompts) -> None:
    alone = [greedy(model, [prompt])[0] for prompt in prompts]
    assert len({tuple(tokens) for tokens in alone}) > len(prompts) // 2
    agree(model, prompts, alone, [greedy(model, [prompt], use_cache=False)[0] for prompt in prompts])
    for size in (3, 8):
        batches = [prompts[n : n + size] for n in range(0, len(prompts), size)]
        agree(model, prompts, alone, [tokens for batch in batches for tokens in greedy(model, batch)])
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        agree(model, prompts, alone, [greedy(model, [prompt])[0] for prompt in prompts])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("count", [6, pytest.param(PROMPTS, marks=pytest.mark.slow)])
def test_gpt2_mini(mini, count):
    model, prompts = mini
    check_all(model, prompts[:count])


@pytest.mark.slow
def test_stories260k(data_dir):
    folder = data_dir / "models" / "stories260K"
    check_all(*prepared(folder, AutoTokenizer.from_pretrained(folder)))
