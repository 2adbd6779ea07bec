"""Another activation in the same weights: values, what opens the result, and that it converts."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from cli_support import BERT, GPT2, LAYERS, SMALL, TEXT_SIZES, run_python, save_model, weights
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers.activations import ACT2FN

from d2dmoe import hub, set_gate
from d2dmoe.config import UserError
from d2dmoe.discovery import discover
from d2dmoe.kernels.operator import activation_name as kernels_name
from d2dmoe.moe.fatrelu import FATReLU
from d2dmoe.moe.layer import layers
from d2dmoe.sparsify.activation import activation_name, swap_activation
from d2dmoe.sparsify.card import sparsified_figures
from sparsify.support import DROPOUT, collate, samples, sparsify_argv, tiny

TEXT = TEXT_SIZES | LAYERS | {"intermediate_size": 48}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 2, "feed_forward_proj": "gated-gelu"}
VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 16}
CLASSES = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
MODELS = {
    "GPT2LMHeadModel": GPT2,
    "BertForSequenceClassification": BERT | CLASSES,
    "LlamaForCausalLM": TEXT,
    "T5ForConditionalGeneration": TEXT_SIZES | T5 | {"decoder_start_token_id": 0},
    "ViTForImageClassification": VIT | DROPOUT | CLASSES | {"patch_size": 4},
}
KEYS = dict(zip(MODELS, ("activation_function", "hidden_act", "hidden_act", "dense_act_fn", "hidden_act"), strict=True))
# In a process that has never heard of d2dmoe: argv is folder, class, JSON of blocks, file of inputs, file of outputs.
PROGRAM = """
import json, sys
import torch, transformers
from safetensors.torch import load_file, save_file

for folder, name, blocks, given, found in json.loads(sys.argv[1]):
    model = getattr(transformers, name).from_pretrained(folder).eval()
    seen = {}
    for part in {part for block in blocks for part in block.values() if part}:
        module = model.get_submodule(part)
        module.register_forward_hook(lambda m, a, o, part=part: seen.update({part: (a[0].detach(), o.detach())}))
    with torch.no_grad():
        logits = model(**load_file(given)).logits
    for block in blocks:
        z = seen[block["gate"] or block["up"]][1]
        factor = seen[block["up"]][1] if block["gate"] else 1
        assert torch.equal(seen[block["down"]][0], torch.relu(z) * factor), (name, block)
        assert 0.1 < (seen[block["down"]][0] == 0).float().mean() < 0.9
    save_file({"logits": logits}, found)
assert not any(module.partition(".")[0] == "d2dmoe" for module in sys.modules)
"""


def inputs(name: str) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(4)
    if name.startswith("ViT"):
        return {"pixel_values": torch.randn(3, 3, 16, 16, generator=g)}
    ids = torch.randint(1, 257, (3, 11), generator=g)
    return {"input_ids": ids} | ({"decoder_input_ids": ids[:, :5].clone()} if name.startswith("T5") else {})


@pytest.fixture(scope="module")
def data(home: Path) -> Path:
    """`home` with images of three classes."""
    from datasets import Dataset
    from PIL import Image

    rows = []
    for number in range(20):
        buffer = io.BytesIO()
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, format="PNG")
        rows.append({"image": {"bytes": buffer.getvalue(), "path": None}, "label": number % 3})
    Dataset.from_list(rows).to_parquet(home / "images.parquet")
    (home / "labels.jsonl").write_text(
        "\n".join(json.dumps({"text": f"sentence {i}", "label": "abc"[i % 3]}) for i in range(40))
    )
    return home


@pytest.fixture(scope="module")
def relu(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every model after `d2dmoe sparsify --activation relu`."""
    from d2dmoe.cli import main

    root = tmp_path_factory.mktemp("relu")
    for name, config in MODELS.items():
        dense = save_model(name, root / "dense" / name, tokenizer=not name.startswith("ViT"), **config)
        file = "labels.jsonl" if name.startswith("Bert") else "text.txt"
        if name.startswith("ViT"):
            size = {"height": 16, "width": 16}
            transformers.ViTImageProcessor(size=size).save_pretrained(dense)
            file = "images.parquet"
        argv = sparsify_argv(dense, data / file, root / name, "--activation", "relu", "--save-strategy", "no", steps=2)
        assert main(argv) == 0
    return {name: root / name for name in MODELS}


def test_a_relu_checkpoint_opens_without_us(relu: dict[str, Path], tmp_path: Path) -> None:
    jobs, wanted = [], {}
    for name, folder in relu.items():
        model = getattr(transformers, name).from_pretrained(folder).eval()
        blocks = discover(model).blocks
        assert len(blocks) == (4 if name.startswith("T5") else 2)
        assert {block.activation for block in blocks} == {"relu"}
        parts = [{"up": block.up, "gate": block.gate, "down": block.down} for block in blocks]
        given, found = tmp_path / f"{name}.in", tmp_path / f"{name}.out"
        save_file(inputs(name), given)
        with torch.no_grad():
            wanted[found] = model(**inputs(name)).logits
        jobs.append([str(folder), name, parts, str(given), str(found)])
    result = run_python("-c", PROGRAM, json.dumps(jobs), cwd=tmp_path)
    assert result.code == 0, result.err
    for found, logits in wanted.items():
        assert torch.equal(load_file(found)["logits"], logits), found.name


@pytest.mark.parametrize(
    "name",
    ["GPT2LMHeadModel", "LlamaForCausalLM", pytest.param("BertForSequenceClassification", marks=pytest.mark.slow)],
)
def test_a_relu_checkpoint_converts(name: str, data: Path, relu: dict[str, Path], d2dmoe, tmp_path: Path) -> None:
    file = "labels.jsonl" if name.startswith("Bert") else "text.txt"
    argv = ("--model", relu[name], "--data", data / file, "--output-dir", tmp_path / "out", *SMALL)
    d2dmoe("convert", *argv)
    check_conversion(relu[name], tmp_path / "out", name, "relu")


def check_conversion(dense_folder: Path, folder: Path, name: str, activation: str) -> None:
    """Equal to the dense model with all experts, a permutation of it without d2dmoe, bit-equal when saved again."""
    kind = getattr(transformers, name)
    dense, model = (kind.from_pretrained(path).eval() for path in (dense_folder, folder))
    assert {layer.block.activation for layer in layers(model)} == {activation}
    with torch.no_grad():
        wanted = dense(**inputs(name)).logits
        with set_gate(model, active=1):
            torch.testing.assert_close(model(**inputs(name)).logits, wanted)
        torch.testing.assert_close(hub.load_dense(str(folder), dense.config)(**inputs(name)).logits, wanted)
        sparse = model(**inputs(name)).logits
    assert not torch.allclose(sparse, wanted)
    model.save_pretrained(folder.parent / "again")
    assert weights(folder.parent / "again") == weights(folder)
    with torch.no_grad():
        assert torch.equal(kind.from_pretrained(folder.parent / "again").eval()(**inputs(name)).logits, sparse)


@pytest.fixture(scope="module")
def fatrelu(data: Path, relu: dict[str, Path]) -> Path:
    """GPT-2 after `d2dmoe sparsify --activation fatrelu --threshold 0.05`."""
    from d2dmoe.cli import main

    dense, out = relu["GPT2LMHeadModel"].parent / "dense" / "GPT2LMHeadModel", data / "fatrelu"
    flags = ("--activation", "fatrelu", "--threshold", 0.05, "--save-strategy", "no")
    assert main(sparsify_argv(dense, data / "text.txt", out, *flags, steps=2)) == 0
    return out


# argv is the folder.
HAND = """
import sys
import torch, transformers

try:
    transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
except Exception as error:
    print(error)
import d2dmoe
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
block, x = model.transformer.h[1].mlp, torch.randn(7, 16)
z = block.c_fc(x)
assert torch.equal(block.act(z), torch.where(z >= 0.05, z, 0.0))
assert ((z > 0) & (z < 0.05)).any() and (block.act(z) >= 0.05).any()
"""


def test_a_fatrelu_checkpoint_opens_with_us_and_fails_loudly_without(fatrelu: Path, tmp_path: Path) -> None:
    done = run_python("-c", HAND, fatrelu, cwd=tmp_path)
    assert done.code == 0, done.err
    assert "fatrelu_0.05" in done.out
    assert "import d2dmoe  # registers the activation" in (fatrelu / "README.md").read_text()


def test_the_card_holds_the_figures_after_training_as_metadata(fatrelu: Path) -> None:
    data = ModelCard.load(fatrelu / "README.md").data
    row = json.loads((fatrelu / "results.json").read_text())["rows"][1]
    shares = {name: row[name] for name in ("nonzero", "near_zero")}
    expected = {row["metric"]["name"]: row["metric"]["value"], **row["metrics"], **shares}
    assert {result.metric_type: result.metric_value for result in data.eval_results} == expected
    assert {result.task_type for result in data.eval_results} == {"text-generation"}


def test_likeness_to_itself_is_no_figure_of_the_card():
    row = {"metric": {"name": "accuracy", "value": 0.5}, "metrics": {"kl_to_dense": 0.0, "agreement": 1.0}}
    assert list(sparsified_figures({**row, "nonzero": 0.25, "near_zero": 0.75})) == [
        ("accuracy", 0.5, {}), ("nonzero", 0.25, {}), ("near_zero", 0.75, {}),
    ]  # fmt: skip
    assert list(sparsified_figures({"model": "after"})) == []


def test_a_fatrelu_checkpoint_converts(fatrelu: Path, data: Path, d2dmoe, tmp_path: Path) -> None:
    argv = ("--model", fatrelu, "--data", data / "text.txt", "--output-dir", tmp_path / "out", *SMALL)
    d2dmoe("convert", *argv)
    check_conversion(fatrelu, tmp_path / "out", "GPT2LMHeadModel", "fatrelu_0.05")


def test_the_figures_count_what_the_threshold_cuts(fatrelu: Path, relu: dict[str, Path]) -> None:
    shares = [
        json.loads((folder / "results.json").read_text())["rows"][1]["nonzero"]
        for folder in (fatrelu, relu["GPT2LMHeadModel"])
    ]
    assert 0 < shares[0] < shares[1] < 1


def test_fatrelu_by_hand() -> None:
    x = torch.tensor([-2.0, 0.0, 0.3, 0.5, 0.7, float("inf")], dtype=torch.float64, requires_grad=True)
    y = FATReLU(0.5)(x)
    assert y.tolist() == [0, 0, 0, 0.5, 0.7, float("inf")]
    (gradient,) = torch.autograd.grad(y[:5].square().sum() + y[5], x)
    assert gradient.tolist() == [0, 0, 0, 1.0, 1.4, 1]
    z = torch.randn(50, dtype=torch.float64)
    z = z[(z - 0.5).abs() > 1e-3].requires_grad_()
    assert torch.autograd.gradcheck(FATReLU(0.5), z)
    assert FATReLU(0.5)(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.bfloat16
    for threshold in (2e-5, 0.05, 0.5):
        assert kernels_name(FATReLU(threshold)) is None  # not taken for a plain ReLU


@pytest.mark.parametrize("threshold", [0.05, 1.0, 12.5, 1e-5, 0.123456789])
def test_names_of_thresholds(threshold: float) -> None:
    name = activation_name("fatrelu", threshold)
    assert name in ACT2FN
    assert ACT2FN[name].threshold == threshold
    assert "-" not in name  # configs such as T5's split there


@pytest.mark.parametrize("name", ["fatrelu_", "fatrelu_-1", "fatrelu_x", "fatrelu", "fatrelu_0.05 "])
def test_names_that_are_none(name: str) -> None:
    assert name not in ACT2FN
    with pytest.raises(KeyError):
        ACT2FN[name]


SWAPS = [(name, activation) for name in MODELS for activation in ("relu", "fatrelu_0.05")]


@pytest.mark.parametrize(("name", "activation"), [*SWAPS, ("T5ForConditionalGeneration", "fatrelu_0.00001")])
def test_a_swap_shares_everything_but_the_activation(name: str, activation: str, tmp_path: Path) -> None:
    model = tiny(name).eval()
    model.config.use_cache = False
    next(model.parameters()).requires_grad_(False)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.max_length = 17
    swapped = swap_activation(model, activation)
    assert type(swapped) is type(model)
    assert not swapped.training
    assert {block.activation for block in discover(swapped).blocks} == {activation}
    assert {block.activation for block in discover(model).blocks}.isdisjoint({activation})
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = (dict(getattr(m, kind)(remove_duplicate=False)) for m in (swapped, model))
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert (ours[key].data_ptr(), ours[key].dtype) == (value.data_ptr(), value.dtype), key
            assert ours[key].requires_grad == value.requires_grad, key
    assert len(list(swapped.parameters())) == len(list(model.parameters()))  # what was tied is tied
    changed = {k for k, v in swapped.config.to_dict().items() if model.config.to_dict()[k] != v}
    assert changed == {KEYS[name]}
    if getattr(model, "generation_config", None) is not None:
        assert swapped.generation_config.max_length == 17
    swapped.save_pretrained(tmp_path)
    again = getattr(transformers, name).from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert {block.activation for block in discover(again).blocks} == {activation}
    batch = collate(name, samples(name, 3))
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, swapped(**batch).logits)
        assert not torch.equal(model(**batch).logits, swapped(**batch).logits)


def test_a_swap_keeps_the_way_of_attention() -> None:
    kind = transformers.GPT2LMHeadModel
    model = kind._from_config(tiny("GPT2LMHeadModel").config, attn_implementation="eager")
    assert swap_activation(model, "relu").config._attn_implementation == "eager"


def test_a_swap_to_what_is_there_and_one_that_no_key_allows() -> None:
    model = tiny("GPT2LMHeadModel", activation_function="relu")
    assert swap_activation(model, "relu").config.activation_function == "relu"
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=61))
    with pytest.raises(UserError, match="no key of the config holds the activation gelu"):
        swap_activation(bloom, "relu")
