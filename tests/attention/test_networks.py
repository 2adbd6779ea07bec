"""Networks in the places of projections (`--attention mlp`): from distillation to a checkpoint that opens again."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import randomise_routers, randomise_vectors
from torch.testing import assert_close
from zoo import check_generation, tiny

from d2dmoe import ConvertConfig, UserError
from d2dmoe.attention.networks import Bank, distil_networks, in_running_order, install_networks, make_bank
from d2dmoe.config import D2DMoEConfig, resolve
from d2dmoe.config.record import Block
from d2dmoe.config.sizes import choose_projections, network_block
from d2dmoe.convert import convert_model
from d2dmoe.data import Batches
from d2dmoe.discovery import discover, dummy_inputs, find_projections
from d2dmoe.measure.evaluate import evaluate
from d2dmoe.measure.flops import dense_cost, dense_ffn_flops, model_flops, neuron_flops
from d2dmoe.moe.gating import set_gate
from d2dmoe.moe.layer import layers
from d2dmoe.moe.loader import attach
from d2dmoe.moe.network import ProjectionNetwork

CONFIG = ConvertConfig(
    experts=8, router_width=8, router_tokens=64, router_batch=16, calibration_tokens=400, active=[0.5],
    attention="mlp", attention_tokens=6400, attention_batch=64, attention_learning_rate=1e-2,
)  # fmt: skip
ROLES = {
    "gpt2": {"qkv": (32, 96), "o": (32, 32)},
    "bert": dict.fromkeys("qkvo", (32, 32)),
    "vit": dict.fromkeys("qkvo", (32, 32)),
    "llama": {"q": (32, 32), "k": (32, 16), "v": (32, 16), "o": (32, 32)},
    "t5": dict.fromkeys("qkvo", (32, 32)),
    "phi3": {"qkv": (32, 64), "o": (32, 32)},
}


def batches(rows: int = 60, length: int = 12, seed: int = 4) -> Batches:
    ids = torch.randint(5, 99, (rows, length), generator=torch.Generator().manual_seed(seed)).tolist()
    return Batches([{"input_ids": row} for row in ids], 8)


def wide(name: str) -> torch.nn.Module:
    """A tiny model whose biases are not zero."""
    model = tiny(name)
    randomise_vectors(model)
    return model


def chosen(model: torch.nn.Module, **options) -> tuple[list, list[Block]]:
    config = replace(CONFIG, **options)
    projections = choose_projections(config, find_projections(model).found)
    return projections, [network_block(config, p) for p in projections]


def with_networks(name: str, dtype: torch.dtype = torch.float64, **options) -> tuple[torch.nn.Module, list[Block]]:
    """A tiny model with random networks in the places of its projections, and all its blocks as they run."""
    model = wide(name).to(dtype)
    _, added = chosen(model, **options)
    blocks = discover(model).blocks
    for block in blocks:
        block.experts = 8
    ordered = in_running_order(model, [*blocks, *added])
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for block in added:
        empty = ProjectionNetwork(block.d_model, block.width, _outputs(model, block))
        for key, value in empty.named_parameters():
            tensors[f"{block.name}.{key}"] = torch.randn(value.shape, generator=generator).to(dtype) * 0.2
    install_networks(model, added, tensors)
    return model, ordered


def _outputs(model: torch.nn.Module, block: Block) -> int:
    linear = model.get_submodule(block.name)
    return linear.nf if hasattr(linear, "nf") else linear.out_features


def converted(name: str, dtype: torch.dtype = torch.float64, **options) -> torch.nn.Module:
    """The same as experts, in a random order of neurons, with random routers."""
    model, blocks = with_networks(name, dtype, **options)
    config = D2DMoEConfig(blocks=blocks, router_width=8)
    attach(model, config, [torch.randperm(block.width) for block in blocks])
    randomise_routers(model)
    return model


def output_of(model: torch.nn.Module, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        return next(v for v in model(**inputs).values() if isinstance(v, torch.Tensor) and v.is_floating_point())


@pytest.mark.parametrize("name", ROLES)
def test_structure_and_all_on_is_the_unsplit_network(name):
    unsplit, _ = with_networks(name)
    model, inputs = converted(name), dummy_inputs(tiny(name))
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    found = [layer for layer in layers(model) if layer.block.role]
    per_attention = len(ROLES[name])
    attentions = 6 if name == "t5" else 2  # two encoder layers, two decoder layers with two each
    assert len(found) == attentions * per_attention
    for layer in found:
        inside, outside = ROLES[name][layer.block.role]
        assert (layer.block.d_model, layer.down_weight.shape[-1]) == (inside, outside)
        wanted = inside * outside / (inside + outside)
        assert wanted - 1 <= layer.block.width < wanted + 2 * layer.block.size
        assert layer.block.width == layer.block.experts * layer.block.size != outside
    for layer in layers(model):
        layer.gate_state = replace(layer.gate_state, tau=0.0)
    assert_close(output_of(model, inputs), output_of(unsplit, inputs))


def test_the_widths_that_flags_ask_for():
    model = wide("gpt2")
    for options, wide_one, count in (
        ({}, 24, 24), ({"attention_factor": 2.0}, 48, 16), ({"attention_experts": 5}, 25, 5),
        ({"expert_size": 8}, 24, 3), ({"attention_factor": 4.0}, 102, 17),  # 96 has the shape of the dense bias
    ):  # fmt: skip
        _, blocks = chosen(model, **options)
        assert (blocks[0].width, blocks[0].experts) == (wide_one, count), options


def test_distillation_lowers_the_error_on_other_text():
    model, data = wide("gpt2"), batches(200)
    projections, blocks = chosen(model)
    fresh, reading, per_batch = make_bank(model, projections, blocks, data, 0)
    assert per_batch == 8 * 12
    other = {g: torch.cat(x) for g, x in reading(batches(40, seed=9), 2**62).items()}
    with torch.no_grad():
        before = float(fresh(other)["error"])
    before_weights = copy.deepcopy(model.state_dict())
    tensors, log = distil_networks(model, projections, blocks, data, CONFIG)
    assert all(torch.equal(value, before_weights[key]) for key, value in model.state_dict().items())
    errors = []
    for projection, block in zip(projections, blocks, strict=True):
        dense = model.get_submodule(projection.name)
        network = ProjectionNetwork(block.d_model, block.width, projection.outputs)
        network.load_state_dict({k: tensors[f"{block.name}.{k}"] for k in network.state_dict()})
        with torch.no_grad():
            x = other[projection.group]
            y = dense(x)
            errors.append(((network(x) - y).square().mean(0) / y.var(0)).mean())
    after = float(torch.stack(errors).mean())
    assert before < 0.25  # a random network misses all of the variance
    assert after < 0.85 * before
    assert log[-1]["error"] < 0.85 * before


def test_the_start_is_the_best_linear_map():
    """What it misses is the variance in the directions beyond half as many as there are neurons."""
    model, data = wide("llama"), batches(200)
    projections, blocks = chosen(model)
    bank, reading, _ = make_bank(model, projections, blocks, data, 0)
    rows = {g: torch.cat(x) for g, x in reading(data, 2**62).items()}
    for network, projection, block in zip(bank.networks, projections, blocks, strict=True):
        x = rows[projection.group]
        with torch.no_grad():
            y = (model.get_submodule(projection.name)(x) - network.y_mean) / network.y_scale
            spectrum = torch.linalg.svdvals(y.double()) ** 2 / y.numel()
            assert float(network(x)) == pytest.approx(float(spectrum[block.width // 2 :].sum()), rel=1e-2)


def test_padding_is_not_distilled():
    model = wide("bert")
    projections, blocks = chosen(model)
    ids = torch.randint(5, 99, (8, 12)).tolist()
    ragged = Batches([{"input_ids": row[: 4 + n % 8]} for n, row in enumerate(ids)], 4)
    _, reading, _ = make_bank(model, projections, blocks, ragged, 0)
    held = reading(ragged, 2**62)
    assert {sum(map(len, parts)) for parts in held.values()} == {sum(4 + n % 8 for n in range(8))}


def test_training_goes_on_where_it_stopped(tmp_path, monkeypatch):
    model, data = wide("llama"), batches()
    projections, blocks = chosen(model)
    config = replace(CONFIG, attention_tokens=64 * 12)
    whole, _ = distil_networks(model, projections, blocks, data, config)
    monkeypatch.setattr("d2dmoe.attention.networks.SAVE_EVERY", 5)
    calls, forward = [], Bank.forward

    def stop(self, rows):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return forward(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr("d2dmoe.attention.networks.Bank.forward", stop)
        with pytest.raises(KeyboardInterrupt):
            distil_networks(model, projections, blocks, data, config, state_dir=tmp_path / "state")
    again, _ = distil_networks(model, projections, blocks, data, config, state_dir=tmp_path / "state", resume=True)
    assert all(torch.equal(again[key], value) for key, value in whole.items())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> dict:
    """A converted GPT-2: its folder, the model in memory, the dense model, and messages of the conversion."""
    torch.manual_seed(0)
    folder, model, data, said = tmp_path_factory.mktemp("networks"), wide("gpt2"), batches(), []
    dense = copy.deepcopy(model)
    convert_model(model, CONFIG, data, say=said.append, work=folder.parent)
    model.save_pretrained(folder)
    return {"folder": folder, "model": model, "dense": dense, "data": data, "said": said, "work": folder.parent}


def test_the_checkpoint_opens_bit_equal(checkpoint, tmp_path):
    inputs = dummy_inputs(checkpoint["model"])
    again = type(checkpoint["model"]).from_pretrained(checkpoint["folder"])
    for active in (0.5, 1):
        with set_gate(again, active=active), set_gate(checkpoint["model"], active=active):
            assert torch.equal(output_of(again, inputs), output_of(checkpoint["model"], inputs))
    again.save_pretrained(tmp_path)
    first, second = (json.loads((p / "config.json").read_text()) for p in (checkpoint["folder"], tmp_path))
    assert first == second
    assert first["quantization_config"]["version"] == 2
    assert "import d2dmoe" in first["quantization_config"]["note"]
    assert any("of the variance" in line for line in checkpoint["said"])
    assert (checkpoint["work"] / "networks.safetensors").is_file()


def test_dense_shapes_are_not_on_disk(checkpoint):
    from d2dmoe.tensors import shapes_in, weight_files

    shapes = shapes_in(weight_files(checkpoint["folder"]))
    assert shapes["transformer.h.0.attn.c_attn.weight"] == (24, 32)
    assert shapes["transformer.h.0.attn.c_attn.down.weight"] == (96, 24)
    dense = {name: tuple(p.shape) for name, p in checkpoint["dense"].named_parameters()}
    replaced = [n for n in dense if ".attn.c_" in n and n.endswith(("weight", "bias"))]
    assert replaced
    assert all(shapes[name] != dense[name] for name in replaced)


def test_without_d2dmoe_it_fails(checkpoint):
    code = (
        "import sys; sys.modules['d2dmoe'] = None\n"
        "from transformers import GPT2LMHeadModel\n"
        f"GPT2LMHeadModel.from_pretrained({str(checkpoint['folder'])!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "ignore_mismatched_sizes" in done.stderr
    assert "d2dmoe" in done.stderr  # transformers names the method that it does not know


def test_costs_are_shares_of_the_projections(checkpoint):
    model, data = checkpoint["model"], checkpoint["data"]
    inputs = {"input_ids": data[0]["input_ids"]}
    dense, networks = checkpoint["dense"], [x for x in layers(model) if x.block.role]
    tokens = inputs["input_ids"].numel()
    assert dense_cost(model, inputs).total == pytest.approx(model_flops(dense, inputs) / tokens)
    assert sum(map(dense_ffn_flops, networks)) == 2 * 2 * (32 * 96 + 32 * 32)
    half, full = evaluate(model, data, [{"active": 0.5}, {"active": 1}], original=dense)
    assert full["flops_fraction_attention"] == sum(map(neuron_flops, networks)) / sum(map(dense_ffn_flops, networks))
    assert full["active_fraction"] == full["flops_fraction_ffn"] == 1
    assert half["active_fraction"] == pytest.approx(0.5, abs=0.05)
    (own,) = evaluate(dense, data, [])
    assert half["dense"]["value"] == full["dense"]["value"] == own["metric"]["value"]
    assert full["metric"]["value"] != own["metric"]["value"]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_and_without_cache(name, beams):
    model = converted(name, torch.float32)
    for layer in layers(model):
        layer.gate_state = replace(layer.gate_state, name="topk", tau=0.5)
    check_generation(model, beams, static=beams == 1)


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_save_and_load(name, tmp_path):
    model = converted(name, torch.float32)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    theirs = dict(again.named_parameters())
    assert all(torch.equal(value, theirs[key]) for key, value in model.named_parameters())
    if name == "bert":
        from transformers import AutoModel

        assert sum(bool(x.block.role) for x in layers(AutoModel.from_pretrained(tmp_path))) == 8


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"attention": "mlp", "attention_active": 0.5}, "a budget holds for the experts of blocks and projections"),
        ({"attention": "mlp,low-rank"}, "a conversion takes one of them"),
        ({"attention": "mlp", "attention_factor": 0.0}, "--attention-factor 0: must be above 0"),
        ({"attention": "mlp", "attention_tokens": 0}, "--attention-tokens 0: must be at least 1"),
    ],
)
def test_what_cannot_be(options, said):
    with pytest.raises(UserError, match=said):
        resolve(ConvertConfig, options)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("role", "x", r"blocks\[0\].role"),
        ("d_model", 16, r"blocks\[0\].d_model is 16"),
        ("width", 48, "gives transformer.h.0.attn.c_attn.delta_in the shape"),
        ("down", "transformer.h.0.attn.c_proj", r"blocks\[0\].down"),
        ("name", "transformer.h.0.attn.nothing", r"blocks\[0\]"),
    ],
)
def test_a_record_that_does_not_fit(field, value, said, checkpoint, tmp_path):
    shutil.copytree(checkpoint["folder"], tmp_path / "copy")
    path = Path(tmp_path / "copy" / "config.json")
    config = json.loads(path.read_text())
    config["quantization_config"].pop("checksums", None)
    config["quantization_config"]["blocks"][0][field] = value
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=said):
        type(checkpoint["model"]).from_pretrained(tmp_path / "copy")
