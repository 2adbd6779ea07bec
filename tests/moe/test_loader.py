"""A converted checkpoint opens anywhere: as itself with d2dmoe, as the dense model without it."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import randomise_routers, randomise_vectors
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)
from zoo import tiny

import d2dmoe
from d2dmoe.config import Budget, D2DMoEConfig, UserError
from d2dmoe.discovery import discover, dummy_inputs
from d2dmoe.moe.layer import DynamicFFN, layers
from d2dmoe.moe.loader import D2DMoEQuantizationConfig, attach, cast

AUTO = {
    "gpt2": AutoModelForCausalLM,
    "bert": AutoModelForMaskedLM,
    "bert-classifier": AutoModelForSequenceClassification,
    "vit": AutoModelForImageClassification,
    "llama": AutoModelForCausalLM,
    "phi3": AutoModelForCausalLM,
    "opt": AutoModelForCausalLM,
    "t5-gated": None,
}
OPEN_DENSE = """
import json, sys, torch, traceback, transformers

def open_dense(folder, kind):
    model, info = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert "d2dmoe" not in sys.modules
    assert not info["missing_keys"], info["missing_keys"]
    assert all("router" in k or k.endswith((".constants", ".order")) for k in info["unexpected_keys"])
    inputs = torch.load(folder + "/../inputs.pt", weights_only=True)
    with torch.no_grad():
        torch.save(model.eval()(**inputs)[0], folder + "/../dense.pt")

for line in sys.stdin:
    try:
        print(json.dumps(open_dense(*json.loads(line))), flush=True)
    except Exception:
        print(json.dumps(traceback.format_exc()), flush=True)
"""


@pytest.fixture(scope="module")
def open_dense() -> Iterator[Callable[[Path, str], None]]:
    """Opens a folder as a class of transformers in a process without d2dmoe, which serves all tests here."""
    process = subprocess.Popen(
        [sys.executable, "-c", OPEN_DENSE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True,
    )  # fmt: skip

    def call(folder: Path, kind: str) -> None:
        process.stdin.write(json.dumps([str(folder), kind]) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        assert answer, "the process without d2dmoe is gone"
        assert json.loads(answer) is None, json.loads(answer)

    yield call
    process.stdin.close()
    process.wait(timeout=60)


def converted(
    name: str, stand_in: str = "mean", experts: int = 8
) -> tuple[torch.nn.Module, torch.nn.Module, list[torch.Tensor]]:
    """A tiny model with experts, the dense model it came from, and the order of the neurons of each block."""
    dense = tiny(name)
    randomise_vectors(dense)
    model = copy.deepcopy(dense)
    blocks = discover(model).blocks
    for block in blocks:
        block.experts = experts
    budgets = [Budget(0.25, [0.75] * len(blocks)), Budget(0.5, [0.5] * len(blocks))]
    curve = [[a, [1 - a] * len(blocks)] for a in (0.1, 0.9)]
    config = D2DMoEConfig(
        blocks, "topk", stand_in, router_width=8, budgets=budgets if stand_in == "mean" else [], curve=curve
    )
    orders = [torch.randperm(block.width) for block in blocks]
    attach(model, config, orders, budgets=len(config.budgets))
    randomise_routers(model)
    for layer in layers(model):
        if layer.constants is not None:
            torch.nn.init.normal_(layer.constants)
    return model, dense, orders


def permuted(dense: torch.nn.Module, orders: list[torch.Tensor]) -> torch.nn.Module:
    """The dense model with its neurons in expert order, permuted here independently of the library's own code."""
    model = copy.deepcopy(dense)
    for block, order in zip(discover(model).blocks, orders, strict=True):
        up, down = model.get_submodule(block.up), model.get_submodule(block.down)
        conv = type(up).__name__ == "Conv1D"
        both = torch.cat([order, order + len(order)]) if block.fused else order
        rows = [up] if block.gate in (None, block.up) else [up, model.get_submodule(block.gate)]
        for linear in rows:
            linear.weight.data = linear.weight.data[:, both] if conv else linear.weight.data[both]
            if linear.bias is not None:
                linear.bias.data = linear.bias.data[both]
        down.weight.data = down.weight.data[order] if conv else down.weight.data[:, order]
    return model


@torch.no_grad()
def run(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs)[0]


WHOLE, SHARDED = [(name, "5GB") for name in AUTO], [(name, "20KB") for name in ("gpt2", "llama", "phi3")]


PADDED = [("gpt2", "5GB", 7), ("bert", "5GB", 10), ("phi3", "20KB", 7), ("t5-gated", "5GB", 6)]  # width 64


SOME = ("gpt2", "llama", "bert", "vit", "t5-gated")  # the others take minutes together


@pytest.mark.parametrize(
    ("name", "shard", "experts"),
    [
        *(pytest.param(*pair, 8, marks=() if pair[0] in SOME else pytest.mark.slow) for pair in WHOLE),
        *(pytest.param(*pair, 8, marks=() if pair[0] == "gpt2" else pytest.mark.slow) for pair in SHARDED),
        *(pytest.param(*case, marks=() if case[0] in ("gpt2", "t5-gated") else pytest.mark.slow) for case in PADDED),
    ],
)
def test_opens_with_and_without_d2dmoe(name, shard, experts, open_dense, tmp_path):
    model, dense, orders = converted(name, experts=experts)
    assert all(layer.up_weight.shape[0] == experts for layer in layers(model))
    inputs = dummy_inputs(dense)
    folder = tmp_path / "model"
    model.save_pretrained(folder, max_shard_size=shard)
    assert (folder / "model.safetensors.index.json").exists() == (shard == "20KB")
    torch.save(inputs, tmp_path / "inputs.pt")
    open_dense(folder, type(dense).__name__)
    opened = torch.load(tmp_path / "dense.pt", weights_only=True)
    assert torch.equal(opened, run(permuted(dense, orders), inputs))
    assert_close(opened, run(dense, inputs))

    kind = AUTO[name] or type(dense)
    again = kind.from_pretrained(folder)
    assert all(isinstance(layer, DynamicFFN) for layer in layers(again))
    assert len(layers(again)) == len(orders)
    for active in (1, 0.5, 0.25):
        with d2dmoe.set_gate(model, active=active), d2dmoe.set_gate(again, active=active):
            assert torch.equal(run(model, inputs), run(again, inputs))
    again.save_pretrained(tmp_path / "again")
    assert same_tensors(folder, tmp_path / "again")
    assert json.loads((folder / "config.json").read_text()) == json.loads((tmp_path / "again/config.json").read_text())


def same_tensors(first: Path, second: Path) -> bool:
    """Whether two folders hold the same tensors, bit for bit, however sharded."""
    a, b = ({k: v for f in p.glob("*.safetensors") for k, v in load_file(f).items()} for p in (first, second))
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("experts", [8, 7])
@pytest.mark.parametrize("name", ["gpt2", "bert", "vit", "llama"])
def test_names_and_shapes_on_disk_are_the_dense_ones(name, experts, tmp_path):
    model, dense, _ = converted(name, experts=experts)
    dense.save_pretrained(tmp_path / "dense")
    model.save_pretrained(tmp_path / "converted")
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("dense", "converted"))
    added = after.keys() - before.keys()
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items() if k not in added}
    assert all("router." in k or k.endswith(("constants", ".order")) for k in added)
    assert len(added) == 4 * len(layers(model))


def test_base_class_and_other_head(tmp_path):
    model, dense, _ = converted("bert")
    model.save_pretrained(tmp_path)
    inputs = dummy_inputs(dense)
    base = AutoModel.from_pretrained(tmp_path)
    assert len(layers(base)) == 2
    assert_close(run(base, inputs), run(dense.bert, inputs))
    head = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert len(layers(head)) == 2
    base.save_pretrained(tmp_path / "base")
    full = AutoModelForMaskedLM.from_pretrained(tmp_path / "base")
    with d2dmoe.set_gate(full, active=0.5), d2dmoe.set_gate(model, active=0.5):
        assert torch.equal(run(full.bert, inputs), run(model.bert, inputs))


def test_part_of_a_model(tmp_path):
    from transformers import T5EncoderModel

    model, dense, _ = converted("t5-gated")
    model.save_pretrained(tmp_path)
    encoder = T5EncoderModel.from_pretrained(tmp_path)
    assert len(layers(encoder)) == 2
    inputs = {"input_ids": dummy_inputs(dense)["input_ids"]}
    assert_close(run(encoder, inputs), run(dense.encoder, inputs))
    with d2dmoe.set_gate(encoder, active=0.5), d2dmoe.set_gate(model, active=0.5):
        assert torch.equal(run(encoder, inputs), run(model.encoder, inputs))


@pytest.mark.parametrize("name", ["bart", "clip", "t5"])
def test_layers_follow_the_blocks_of_the_config(name, tmp_path):
    """Not the order in which modules are registered: BART's decoder layer has its `fc1` after the cross-attention."""
    model, dense, _ = converted(name)
    stored = model.config.quantization_config.d2dmoe
    assert [layer.block.name for layer in layers(model)] == [block.name for block in stored.blocks]
    ran = []
    for layer in layers(model):
        layer.observer = lambda layer, *_: ran.append(layer.block.name)
    run(model, dummy_inputs(dense))
    assert ran == [block.name for block in stored.blocks]
    for number, budget in enumerate(stored.budgets):
        budget.taus = [(i + 1) / 10 + number / 100 for i in range(len(stored.blocks))]
    model.save_pretrained(tmp_path)
    again = type(dense).from_pretrained(tmp_path)
    d2dmoe.set_gate(again, active=0.25)
    wanted = dict(zip([block.name for block in stored.blocks], stored.budgets[0].taus, strict=True))
    assert {layer.block.name: layer.gate_state.tau for layer in layers(again)} == wanted
    again.save_pretrained(tmp_path / "again")
    kept = [json.loads((p / "config.json").read_text())["quantization_config"] for p in (tmp_path, tmp_path / "again")]
    assert kept[0] == kept[1]


def test_bfloat16(tmp_path):
    model, dense, _ = converted("llama")
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    inputs = dummy_inputs(dense)
    with d2dmoe.set_gate(model, active=0.5), d2dmoe.set_gate(again, active=0.5):
        assert torch.equal(run(model, inputs), run(again, inputs))
    wide = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_close(run(wide, inputs), run(dense, inputs), rtol=0.1, atol=0.02)  # weights were rounded to 8 bits


@pytest.mark.parametrize("name", ["t5", "t5-gated"])
def test_what_the_architecture_keeps_in_fp32_stays_so(name, tmp_path):
    """T5 overflows where its down projection is in fp16."""
    model, dense, orders = converted(name)
    model.save_pretrained(tmp_path / "wide")
    permuted(dense, orders).save_pretrained(tmp_path / "dense")
    half = type(dense).from_pretrained(tmp_path / "wide", dtype=torch.float16)
    for layer, wide in zip(layers(half), layers(model), strict=True):
        assert (layer.up_weight.dtype, layer.router.hidden.dtype) == (torch.float16, torch.float16)
        assert torch.equal(layer.down_weight, wide.down_weight)
    cast(model, torch.float16)
    assert {k: v.dtype for k, v in model.state_dict().items()} == {k: v.dtype for k, v in half.state_dict().items()}
    inputs = dummy_inputs(dense)
    reference = type(dense).from_pretrained(tmp_path / "dense", dtype=torch.float16)
    with d2dmoe.set_gate(half, active=1):
        ours, wanted = run(half, inputs).double(), run(reference, inputs).double()
        # Not element by element: where a processor has no fp16 products, their sums round differently by the layout.
        assert (ours - wanted).norm() <= 5e-3 * wanted.norm()
    with d2dmoe.set_gate(half, active=0.5):
        assert run(half, inputs).isfinite().all()
    half.save_pretrained(tmp_path / "half")
    again = type(dense).from_pretrained(tmp_path / "half")
    assert torch.equal(run(again, inputs), run(half, inputs))
    assert type(dense).from_pretrained(tmp_path / "wide", dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
@pytest.mark.parametrize("active", [0.5, 1])
def test_generate(name, active):
    model, dense, _ = converted(name)
    d2dmoe.set_gate(model, active=active)
    ids = dummy_inputs(dense)["input_ids"]
    options = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}
    greedy = model.generate(ids, do_sample=False, **options)
    assert torch.equal(greedy, model.generate(ids, do_sample=False, use_cache=False, **options))
    if active == 1:
        assert torch.equal(greedy, dense.generate(ids, do_sample=False, **options))
    torch.manual_seed(5)
    sampled = model.generate(ids, do_sample=True, **options)
    torch.manual_seed(5)
    assert torch.equal(sampled, model.generate(ids, do_sample=True, **options))
    assert not torch.equal(sampled, greedy)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_left_padded_batch_generates_what_each_row_does_alone(name):
    model, dense, _ = converted(name)
    d2dmoe.set_gate(model, active=0.5)
    long, short = dummy_inputs(dense)["input_ids"]
    short = short[4:]
    options = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    padded = torch.stack([long, torch.cat([torch.zeros(4, dtype=torch.long), short])])
    mask = torch.ones_like(padded)
    mask[1, :4] = 0
    both = model.generate(padded, attention_mask=mask, **options)
    assert torch.equal(both[0], model.generate(long[None], **options)[0])
    assert torch.equal(both[1, 4:], model.generate(short[None], **options)[0])


def test_is_an_ordinary_model(tmp_path):
    model, dense, _ = converted("gpt2")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    inputs = dummy_inputs(dense)
    assert not getattr(again, "is_quantized", False)
    assert getattr(again, "hf_quantizer", None) is None
    assert again.half().dtype == torch.float16
    twin = copy.deepcopy(again.float())
    d2dmoe.set_gate(twin, active=0.25)
    assert layers(again)[0].gate_state.tau == 0  # the copy's gate is its own
    again.train()
    again(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(layer.up_weight.grad.abs().sum() > 0 for layer in layers(again))


def test_trainer_and_lora(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    model, _, _ = converted("llama")
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    d2dmoe.set_gate(again, active=0.5)
    row = {"input_ids": torch.arange(9), "labels": torch.arange(9)}
    lora = get_peft_model(again, LoraConfig(target_modules=["q_proj"], r=2))
    before = copy.deepcopy(lora.state_dict())
    settings = TrainingArguments(
        tmp_path / "runs", max_steps=2, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    Trainer(lora, settings, train_dataset=[row] * 8).train()
    changed = {k for k, v in lora.state_dict().items() if not torch.equal(v, before[k])}
    assert changed
    assert all("lora" in k for k in changed)


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@pytest.mark.parametrize(("name", "experts"), [("gpt2", 8), ("bert", 8), ("phi3", 8), ("phi3", 7)])
def test_a_saved_state_dict_is_packed(name, experts, shard, tmp_path):
    """One with dense names, as `save_pretrained` writes it, in one file or several, and into a copy of the model."""
    model, _, _ = converted(name, experts=experts)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter)
    unexpected, loaded = set(), set()
    for file in tmp_path.glob("*.safetensors"):
        state = load_file(file)
        kept = dict(state)
        unexpected |= set(other.load_state_dict(state, strict=False).unexpected_keys)
        loaded |= set(state)
        assert state.keys() == kept.keys()  # the caller's own is not touched
    assert not unexpected
    assert loaded
    for (key, value), wanted in zip(other.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(value, wanted), key
    missing = copy.deepcopy(model).load_state_dict(model.state_dict())  # its own names go on working
    assert not missing.missing_keys


def test_trainer_goes_back_to_a_checkpoint(tmp_path):
    """Resumed in the middle, and the best model at the end: bit-equal experts, not those in memory."""
    from transformers import Trainer, TrainingArguments

    model, _, _ = converted("gpt2")
    model.save_pretrained(tmp_path / "model")
    rows = [{"input_ids": torch.arange(i, i + 9), "labels": torch.arange(i, i + 9)} for i in range(5, 21)]

    def trainer(steps: int, folder: str, **options) -> Trainer:
        start = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        settings = TrainingArguments(
            tmp_path / folder, max_steps=steps, learning_rate=0.05, lr_scheduler_type="constant", report_to=[],
            use_cpu=True, save_steps=2, disable_tqdm=True, per_device_train_batch_size=4, seed=3, **options,
        )  # fmt: skip
        return Trainer(start, settings, train_dataset=rows, eval_dataset=rows)

    straight = trainer(4, "straight")
    straight.train()
    trainer(2, "halves").train()
    resumed = trainer(4, "halves")
    resumed.train(resume_from_checkpoint=str(tmp_path / "halves" / "checkpoint-2"))
    for (key, value), wanted in zip(
        resumed.model.state_dict().items(), straight.model.state_dict().values(), strict=True
    ):
        assert torch.equal(value, wanted), key

    worst = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "greater_is_better": True}
    best = trainer(4, "best", metric_for_best_model="eval_loss", **worst)
    best.train()
    chosen = load_file(Path(best.state.best_model_checkpoint) / "model.safetensors")
    best.model.save_pretrained(tmp_path / "chosen")
    saved = load_file(tmp_path / "chosen" / "model.safetensors")
    assert best.state.best_model_checkpoint.endswith("checkpoint-2")
    assert all(torch.equal(saved[key], chosen[key]) for key in chosen)


def test_set_gate_on_a_loaded_model(tmp_path):
    model, dense, _ = converted("gpt2")
    model.save_pretrained(tmp_path)
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path) for _ in range(2))
    inputs = dummy_inputs(dense)
    d2dmoe.set_gate(one, active=0.25)
    assert_close(run(two, inputs), run(dense, inputs))
    quarter = run(one, inputs)
    with d2dmoe.set_gate(one, active=0.5, layers=[1]):
        assert [layer.gate_state.tau for layer in layers(one)] == [0.75, 0.5]
        assert not torch.equal(run(one, inputs), quarter)
    assert torch.equal(run(one, inputs), quarter)
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        d2dmoe.set_gate(one, active=0.3)
    assert ["0.25" in str(n.message) for n in notes] == [True]
    d2dmoe.set_gate(one, tau=0)
    assert_close(run(one, inputs), run(dense, inputs))


def test_missing_tensor_is_refused(tmp_path):
    model, _, _ = converted("gpt2")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["transformer.h.1.mlp.router.score"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks transformer\.h\.1\.mlp\.router\.score"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_newer_version_is_refused(tmp_path):
    model, _, _ = converted("gpt2")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["version"] = 999
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"version 999.*install a newer d2dmoe-toolkit"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_what_a_later_release_adds_is_passed_over(tmp_path):
    """As long as the format version is the same."""
    model, dense, _ = converted("gpt2")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    stored = config["quantization_config"]
    for part in (stored, stored["blocks"][1], stored["budgets"][0]):
        part["novelty"] = [1]
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(run(again, dummy_inputs(dense)), run(model, dummy_inputs(dense)))


def test_converts_only_by_its_own_command(tmp_path):
    tiny("gpt2").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="d2dmoe convert"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=D2DMoEQuantizationConfig())


def test_device_map(tmp_path):
    model, dense, _ = converted("phi3")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    inputs = dummy_inputs(dense)
    assert torch.equal(run(again, inputs), run(model, inputs))


@torch.no_grad()
def test_an_initialisation_that_reaches_into_a_replaced_block(tmp_path):
    """That of Switch Transformers writes to the projections of every trained expert."""
    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=4, num_experts=4,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, decoder_start_token_id=0,
    )  # fmt: skip
    model = SwitchTransformersForConditionalGeneration(config).eval()
    inputs = dummy_inputs(model)
    dense = run(model, inputs)
    blocks = discover(model).blocks
    assert any("experts.expert_" in block.name for block in blocks)
    for block in blocks:
        block.experts = 8
    attach(model, D2DMoEConfig(blocks, "topk", "zero"), [torch.randperm(block.width) for block in blocks])
    randomise_routers(model)
    model.save_pretrained(tmp_path)
    again = SwitchTransformersForConditionalGeneration.from_pretrained(tmp_path)
    assert len(layers(again)) == len(blocks)
    assert_close(run(again, inputs), dense)
    assert "_init_weights" not in {*vars(again), *vars(again.encoder)}
