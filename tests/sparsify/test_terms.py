"""The penalty on live models: which activations, which rows, once for each block."""

import pytest
import torch
from transformers.activations import ACT2FN

from d2dmoe.discovery import discover
from d2dmoe.sparsify.masks import token_counts, token_masks
from d2dmoe.sparsify.options import SparsityConfig
from d2dmoe.sparsify.terms import SparsityTerm
from sparsify.support import collate, samples, tiny

NAMES = [
    "GPT2LMHeadModel", "LlamaForCausalLM", "Phi3ForCausalLM", "BertForSequenceClassification",
    "T5ForConditionalGeneration", "ViTForImageClassification",
]  # fmt: skip


def penalty(model, batch, **options) -> dict[str, list[torch.Tensor]]:
    term = SparsityTerm(model.train(), discover(model).blocks, SparsityConfig(**options))
    with term.collecting(token_masks(batch)) as found:
        model(**batch)
    term.remove()
    return found


def down_inputs(model, batch, blocks) -> list[torch.Tensor]:
    """What really goes into the down projections, without dropout."""
    seen = []
    handles = [
        model.get_submodule(b.down).register_forward_pre_hook(lambda m, a: seen.append(a[0].detach())) for b in blocks
    ]
    model.eval()(**batch)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_hoyer_is_that_of_the_real_hidden_activations(name):
    model = tiny(name)
    batch = collate(name, samples(name, 4))
    blocks = discover(model).blocks
    found = penalty(model, batch, regulariser="hoyer", sparsify_on="intermediate")
    masks = token_masks(batch)
    wanted = {"main": [], "decoder": []}
    for block, a in zip(blocks, down_inputs(model, batch, blocks), strict=True):
        side = "decoder" if block.up.startswith("decoder.") else "main"
        mask = masks[side]
        a = a.reshape(-1, a.shape[-1]) if mask is None else a[mask.bool()]
        wanted[side].append((a.abs().sum(-1) ** 2 / (a**2).sum(-1)).mean())
    for side, values in found.items():
        torch.testing.assert_close(torch.stack(values), torch.stack(wanted[side]))
    assert sum(map(len, found.values())) == len(blocks)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Phi3ForCausalLM"])
def test_of_a_gated_block_the_gate_alone_by_default(name):
    model, batch = tiny(name), collate(name, samples(name, 4))
    block, outputs = discover(model).blocks[0], []
    handle = model.get_submodule(block.gate).register_forward_hook(lambda m, a, o: outputs.append(o.detach()))
    found = penalty(model, batch, regulariser="l1")
    handle.remove()
    gate = outputs[-1].chunk(2, -1)[0] if block.fused else outputs[-1]  # discovery ran it too
    a = ACT2FN[block.activation](gate)[batch["attention_mask"].bool()]
    torch.testing.assert_close(found["main"][0], a.abs().sum(-1).mean())


@pytest.mark.parametrize("regulariser", ["hoyer", "l1", "clamped", "density"])
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "BertForSequenceClassification", "T5ForConditionalGeneration"])
def test_padding_changes_neither_value_nor_gradient(name, regulariser):
    items = samples(name, 3)
    values, gradients = [], []
    for extra in (0, 5):
        model = tiny(name)
        batch = collate(name, items)
        for key, fill in (("input_ids", 7), ("attention_mask", 0), ("labels", -100)):
            if batch[key].ndim == 2:
                batch[key] = torch.nn.functional.pad(batch[key], (0, extra), value=fill)
        found = penalty(model, batch, regulariser=regulariser, locality=0.5)
        total = torch.stack([v for side in found.values() for v in side]).mean()
        total.backward()
        values.append(total.detach())
        gradients.append({k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(values[0], values[1])
    for key, gradient in gradients[0].items():
        if "wpe" not in key and "position" not in key:
            torch.testing.assert_close(gradients[1][key], gradient, msg=lambda text, key=key: f"{key}: {text}")


def test_dropout_behind_the_activation_does_not_count():
    name = "T5ForConditionalGeneration"  # it has one between activation and down projection
    batch = collate(name, samples(name, 4))
    found = []
    for rate in (0.0, 0.9):
        model = tiny(name)
        for key, module in model.named_modules():
            if key.endswith("DenseReluDense.dropout"):
                module.p = rate
        found.append(penalty(model, batch, regulariser="l1")["main"][0])
    assert torch.equal(*found)


def test_shares_are_counted_by_hand():
    model = tiny("GPT2LMHeadModel", activation_function="relu")
    batch = collate("GPT2LMHeadModel", samples("GPT2LMHeadModel", 4))
    blocks = discover(model).blocks
    hidden = down_inputs(model, batch, blocks)
    term = SparsityTerm(model.eval(), blocks, SparsityConfig(regulariser="none"))
    term.counting = True
    with torch.no_grad(), term.collecting(token_masks(batch)):
        model(**batch)
    for row, a in zip(term.shares, hidden, strict=True):
        a = a[batch["attention_mask"].bool()]
        near = (a.abs() <= 0.01 * a.abs().amax(-1, keepdim=True)).float().mean()
        assert float(row[0] / row[2]) == pytest.approx(float((a != 0).float().mean()))
        assert float(row[1] / row[2]) == pytest.approx(float(near))


def test_counts_of_tokens():
    batch = collate("T5ForConditionalGeneration", samples("T5ForConditionalGeneration", 3))
    lengths = [len(s["input_ids"]) for s in samples("T5ForConditionalGeneration", 3)]
    assert token_counts(batch).tolist() == [sum(lengths), sum(2 + n // 2 if n > 3 else min(n, 3) for n in lengths)]
    assert token_counts({"pixel_values": torch.zeros(5, 3, 4, 4)})[0] == 5
    assert token_counts({"input_ids": torch.zeros(2, 7, dtype=torch.long)})[0] == 14
