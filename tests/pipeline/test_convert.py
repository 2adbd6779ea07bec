"""`convert_model`, the conversion of a loaded model from Python."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from cli_support import GPT2, save_model
from conftest import ROOT
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from zoo import tiny

from d2dmoe import ConvertConfig, UserError
from d2dmoe.config.presets import resolve
from d2dmoe.convert import convert_model
from d2dmoe.data import Batches
from d2dmoe.moe.layer import layers
from d2dmoe.pipeline.convert import convert
from d2dmoe.pipeline.plan import fit_to_data, make_plan
from d2dmoe.stages.routers.fit import fit_routers

QUICK = ConvertConfig(
    experts=8, router_width=8, router_tokens=64, router_batch=16, calibration_tokens=200, active=[0.5]
)


def token_batches(rows: int = 24, length: int = 12, batch_size: int = 8) -> Batches:
    ids = torch.randint(5, 99, (rows, length), generator=torch.Generator().manual_seed(4)).tolist()
    return Batches([{"input_ids": row} for row in ids], batch_size)


def test_a_last_data_batch_of_few_tokens():
    """Three tokens in the last batch, and more micro-batches of routers than that from every batch."""
    batches = token_batches(rows=16)
    batches = Batches([*batches.items, {"input_ids": [5, 6, 7]}], 8)
    model = tiny("gpt2")
    log = convert_model(model, replace(QUICK, router_batch=2, router_tokens=400), batches)
    assert all(math.isfinite(row["loss"]) for row in log)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_refused_with_the_remedy(dtype):
    model = tiny("gpt2").to(dtype)
    with pytest.raises(UserError, match=r"dtype=torch\.float32"):
        convert_model(model, QUICK, token_batches())
    assert not layers(model)


def test_what_is_no_dense_model_and_its_batches_is_refused():
    batches, converted = token_batches(), tiny("gpt2")
    convert_model(converted, QUICK, batches)
    adapted = get_peft_model(tiny("gpt2"), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    for model, given, said in (
        (converted, batches, "converted already"),
        (adapted, batches, r"PeftModel is no model of transformers; merge its adapter first"),
        (torch.nn.Linear(2, 2), batches, "Linear is no model of transformers"),
        (tiny("gpt2"), [{"input_ids": torch.arange(12)[None]}], r"must be a d2dmoe\.data\.Batches"),
        (tiny("gpt2"), Batches([], 8), "with something in it"),
        (tiny("gpt2"), Batches([{"input_ids": [5, 100_000]}], 8), "GPT2LMHeadModel does not run on these batches"),
        (tiny("whisper"), batches, "WhisperForConditionalGeneration does not run on these batches"),
    ):
        with pytest.raises(UserError, match=said):
            convert_model(model, QUICK, given)


def test_low_memory_gives_what_fp32_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of a model in bf16: the same experts and routers, thresholds within rounding, and no fp32 matrix meanwhile."""
    monkeypatch.chdir(tmp_path)
    save_model("GPT2LMHeadModel", tmp_path / "gpt2", **GPT2)
    AutoModelForCausalLM.from_pretrained("gpt2").to(torch.bfloat16).save_pretrained("gpt2")
    config = replace(QUICK, model="gpt2", max_length=32, router_fit="closed-form", eval_tokens=256, report_samples=0)
    held: list[torch.dtype] = []

    def fit(model, *arguments, **options):
        held.append(layers(model)[0].up_weight.dtype)
        fit_routers(model, *arguments, **options)

    monkeypatch.setattr("d2dmoe.pipeline.model.fit_routers", fit)
    results = [convert(replace(config, output_dir=str(low), low_memory=low)) for low in (False, True)]
    assert held == [torch.float32, torch.bfloat16]
    plain, low = (AutoModelForCausalLM.from_pretrained(str(folder)) for folder in (False, True))
    assert low.dtype == torch.bfloat16
    tensors = dict(plain.named_parameters())
    for name, value in low.named_parameters():
        if "router" in name or "up_weight" in name:
            torch.testing.assert_close(value, tensors[name], rtol=2e-2, atol=2e-2, msg=name)
    rows = [result["rows"][0] for result in results]
    assert rows[0]["dense"]["value"] == rows[1]["dense"]["value"]
    assert math.log(rows[1]["metric"]["value"]) == pytest.approx(math.log(rows[0]["metric"]["value"]), abs=0.02)
    assert rows[1]["active_fraction"] == pytest.approx(rows[0]["active_fraction"], abs=0.05)


@pytest.mark.parametrize(
    "other",
    [{"attention": "auto"}, {"head": "svd-softmax"}, {"heal": 5}, {"speedup": [1.5]}],
    ids=lambda d: next(iter(d)),
)
def test_low_memory_goes_without(other):
    with pytest.raises(UserError, match=f"--low-memory and --{next(iter(other))} do not go together"):
        resolve(ConvertConfig, {"model": "gpt2", "low_memory": True, **other})


def test_the_example_of_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With a tiny model of that name, stored in bf16, and fewer tokens."""
    monkeypatch.chdir(tmp_path)
    save_model("GPT2LMHeadModel", tmp_path / "gpt2", **GPT2)
    AutoModelForCausalLM.from_pretrained("gpt2").to(torch.bfloat16).save_pretrained("gpt2")
    section = (ROOT / "docs" / "python.md").read_text().partition("## Convert in memory")[2]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    sizes = "experts=8, router_tokens=64, router_batch=16, calibration_tokens=200, max_length=32"
    assert "experts=128" in code
    exec(code.replace("experts=128", sizes), {})
    again = AutoModelForCausalLM.from_pretrained("out")
    assert [layer.block.experts for layer in layers(again)] == [8, 8]
    assert all(p.isfinite().all() for p in again.parameters())


@pytest.mark.parametrize("heal", [0, 2])
def test_what_is_trained_stays_where_the_model_is(heal, monkeypatch: pytest.MonkeyPatch):
    """As on a machine with a GPU, for a model that was left on the CPU."""
    for state in (AcceleratorState, GradientState, PartialState):
        monkeypatch.setattr(state, "_shared_state", {})
    monkeypatch.setattr(PartialState, "default_device", torch.device("meta"))
    model = tiny("gpt2")
    convert_model(model, replace(QUICK, heal=heal, heal_tokens=64), token_batches())
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_an_exception_leaves_nothing_frozen(monkeypatch: pytest.MonkeyPatch):
    model = tiny("gpt2")
    monkeypatch.setattr("d2dmoe.stages.routers.training.train", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert_model(model, QUICK, token_batches())
    added = {id(p) for x in layers(model) for p in (*x.router.parameters(), *x.stand_ins().values())}
    assert added  # they are frozen in every converted model (`trainable`)
    assert all(p.requires_grad == (id(p) not in added) for p in model.parameters())


def test_the_whole_model_is_compared(monkeypatch: pytest.MonkeyPatch):
    """A change outside the blocks, which each of them for itself does not show."""
    from d2dmoe.pipeline import model as stages

    def clumsy(model, *arguments, **options):
        attach(model, *arguments, **options)
        model.lm_head.weight.data = model.lm_head.weight.data * 1.01

    attach = stages.attach
    monkeypatch.setattr(stages, "attach", clumsy)
    with pytest.raises(UserError, match=r"the model's logits differ from the dense ones by 0\.01\d* relative"):
        convert_model(tiny("gpt2"), QUICK, token_batches())


def test_blocks_that_the_data_does_not_reach_are_left_alone():
    model = tiny("gpt2")
    model.config.architectures = ["GPT2LMHeadModel"]
    plan = make_plan(model.config, QUICK)
    names = [block.name for block in plan.blocks]
    plan.skeleton.transformer.h[1].mlp.forward = lambda x: x
    asleep = fit_to_data(plan, token_batches()[0], "ids.jsonl")
    assert [block.name for block in asleep] == names[1:]
    assert [block.name for block in plan.blocks] == names[:1]
    assert plan.discovery.refused[-1] == (asleep[0], "does not run on --data ids.jsonl")
    plan.skeleton.transformer.h[0].mlp.forward = lambda x: x
    with pytest.raises(UserError, match="no feed-forward block of GPT2LMHeadModel runs on that"):
        fit_to_data(plan, token_batches()[0], "ids.jsonl")
