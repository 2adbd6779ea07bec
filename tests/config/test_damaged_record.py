"""A damaged or edited record: the outputs stay what they were, or one sentence names the field and its value."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from cli_support import BERT, GPT2, convert_argv, save_model, sentences
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

import d2dmoe
from d2dmoe.cli import main
from d2dmoe.config import UserError
from d2dmoe.discovery import dummy_inputs

KEY = "quantization_config"
LLAMA = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64,
         "vocab_size": 257, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "intermediate_size": 48,
         "num_key_value_heads": 2}  # fmt: skip
CASES = {  # class, sizes, further options, and the class that opens it
    "gpt2": ("GPT2LMHeadModel", GPT2, ("--active", "0.25,0.5"), AutoModelForCausalLM),
    "bert": ("BertForMaskedLM", BERT, ("--gate", "max", "--stand-in", "mean"), AutoModelForMaskedLM),
    "llama": ("LlamaForCausalLM", LLAMA, ("--gate", "topk", "--stand-in", "refit"), AutoModelForCausalLM),
}


class Case:
    """A converted folder, the record in it, and its outputs as a function of the record."""

    def __init__(self, name: str, folder: Path):
        class_name, sizes, options, self.kind = CASES[name]
        text = folder / "text.txt"
        text.write_text("\n".join(sentences(120)))
        save_model(class_name, folder / "dense", **sizes)
        assert main(convert_argv(folder / "dense", text, folder / "moe", *options)) == 0
        self.folder = folder / "moe"
        self.config = json.loads((self.folder / "config.json").read_text())
        self.record = self.config[KEY]
        self.before = self.outputs(self.record)

    @torch.no_grad()
    def outputs(self, record: object) -> list[torch.Tensor]:
        (self.folder / "config.json").write_text(json.dumps({**self.config, KEY: record}))
        model = self.kind.from_pretrained(self.folder)
        inputs, found = dummy_inputs(model), [model(**dummy_inputs(model))[0]]
        for active in (0.25, 0.4, 1):
            with d2dmoe.set_gate(model, active=active):
                found.append(model(**inputs)[0])
        return found

    def outputs_or_sentence(self, record: object) -> list[torch.Tensor] | str:
        try:
            with warnings.catch_warnings(action="ignore"):  # notes on budgets that are not stored
                return self.outputs(record)
        except UserError as error:
            return str(error)


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


def places(value: object, path: tuple = ()) -> list[tuple]:
    """Paths of everything in a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for key, v in inside for p in places(v, (*path, key)))] if path else [
        p for key, v in inside for p in places(v, (key,))
    ]  # fmt: skip


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 10**20), st.floats(), st.text(max_size=6), st.just([]), st.just({}),
    st.lists(st.integers(-1, 3), max_size=3), st.sampled_from(["glu", "topk", "zero", "relu", "transformer.h.0"]),
)  # fmt: skip


def mutate(data: st.DataObject, record: dict) -> dict:
    """The record with one thing wrong."""
    record = copy.deepcopy(record)
    path = data.draw(st.sampled_from([p for p in places(record) if p != ("quant_method",)]))
    parent, key = record, path[-1]
    for step in path[:-1]:
        parent = parent[step]
    match data.draw(st.sampled_from(["drop", "junk", "near", "swap", "unknown", "twice"])):
        case "drop":
            del parent[key]
        case "junk":
            parent[key] = data.draw(JUNK)
        case "near":
            value = parent[key]
            number = isinstance(value, int | float) and not isinstance(value, bool)
            parent[key] = value + data.draw(st.sampled_from([-1, 1, 0.1])) if number else f"{value}x"
        case "swap":
            other = data.draw(st.sampled_from(list(parent) if isinstance(parent, dict) else list(range(len(parent)))))
            if other != "quant_method":
                parent[key], parent[other] = parent[other], parent[key]
        case "unknown":
            (parent if isinstance(parent, dict) else record)[data.draw(st.text(max_size=5))] = data.draw(JUNK)
        case "twice":
            if isinstance(parent, list):
                parent.insert(0, copy.deepcopy(parent[key]))
            else:
                parent[f"{key}s"] = parent.pop(key)
    return record


def check(case: Case, record: dict) -> str:
    """Same outputs, or a sentence; returns it."""
    after = case.outputs_or_sentence(record)
    if isinstance(after, str):
        assert "\n" not in after
        return after
    assert all(torch.equal(a, b) for a, b in zip(after, case.before, strict=True)), record
    return ""


MANY = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@MANY
@given(data=st.data())
def test_any_mutation_gives_the_same_outputs_or_a_sentence(case, data):
    check(case, mutate(data, case.record))


@MANY
@given(data=st.data())
def test_without_checksums_there_is_no_other_error(case, data):
    """What still makes sense, another threshold for instance, cannot be told from what was meant."""
    case.outputs_or_sentence(mutate(data, {k: v for k, v in case.record.items() if k != "checksums"}))


WRONG = {  # path, value, and the sentence; records without checksums, as earlier releases wrote them
    "kind": (("blocks", 1, "kind"), -1, "blocks[1].kind is -1, and must be a text"),
    "kind name": (("blocks", 0, "kind"), "moe", 'blocks[0].kind is "moe", and must be one of ffn, glu'),
    "down": (("blocks", 1, "down"), "transformer.h.1.mlp.c_prj", "has its down at 'transformer.h.1.mlp.c_prj'"),
    "name": (("blocks", 0, "name"), "transformer.h.0.attn", "blocks[0].name is"),
    "activation": (("blocks", 0, "activation_module"), "transformer.h.0.act", "has its activation_module at"),
    "through": (("blocks", 0, "passed_through"), ["transformer.h.0.attn"], "blocks[0].passed_through is"),
    "linear_rank": (("linear_rank",), -1, "linear_rank is -1, and must be at least 0"),
    "linear_rank shape": (("linear_rank",), 1, "gives transformer.h.0.mlp.linear_in the shape"),
    "delta_rank shape": (("delta_rank",), 2, "gives transformer.h.0.mlp.delta_in the shape"),
    "router_width": (("router_width",), 3, "gives transformer.h.0.mlp.router.hidden the shape"),
    "experts": (("blocks", 0, "experts"), 4, "gives transformer.h.0.mlp.router.score the shape"),
    "experts split": (("blocks", 0, "experts"), 50, "blocks[0].experts is 50, and must be a number of experts"),
    "width": (("blocks", 1, "width"), 32, "blocks[1].width is 32, and must be 64"),
    "d_model": (("blocks", 1, "d_model"), 8, "blocks[1].d_model is 8, and must be 16"),
    "layouts": (("blocks", 0, "layouts"), ["up_linear", "down_linear"], "blocks[0].layouts is"),
    "gate": (("gate",), "best", 'gate is "best", and must be one of max, share, topk, topp, absolute'),
    "stand_in": (("stand_in",), "none", 'stand_in is "none", and must be one of zero, mean'),
    "taus": (("budgets", 0, "taus"), [0.5], "budgets[0].taus is [0.5], and must be a list of 2 thresholds"),
    "tau": (("budgets", 0, "taus", 1), -0.5, "budgets[0].taus[1] is -0.5, and must be at least 0"),
    "tau text": (("budgets", 1, "taus", 0), "0.5", 'budgets[1].taus[0] is "0.5", and must be a number'),
    "tau nan": (("budgets", 1, "taus", 0), float("nan"), "budgets[1].taus[0] is NaN, and must be at least 0"),
    "active": (("budgets", 0, "active"), 1.5, "budgets[0].active is 1.5, and must be above 0 and at most 1"),
    "fits": (("budgets", 0, "stand_ins"), ["linear"], "budgets[0].stand_ins is"),
    "fit kind": (("budgets", 0, "stand_ins", 0), "half", "budgets[0].stand_ins[0] is"),
    "budgets": (("budgets",), [], "has no place for transformer.h.0.mlp.constants"),
    "budget": (("budgets",), [{"active": 0.5, "taus": [0.1, 0.1]}], "gives transformer.h.0.mlp.constants the shape"),
    "curve": (("curve", 0, 1), [0.5], "curve[0][1] is [0.5], and must be a list of 2 thresholds"),
    "curve order": (("curve", 1, 0), 0.0, "curve[1][0] is 0.0, and must be an active fraction above"),
    "default": (("default_active",), 0, "default_active is 0.0, and must be above 0"),
    "blocks": (("blocks",), {}, "blocks is {}, and must be a list"),
    "shared": (("shared_experts",), 8, "shared_experts is 8, and must be at least 0 and at most 7"),
    "version": (("version",), "1", 'version is "1", and must be an integer'),
    "order": (("neuron_order",), 1, "neuron_order is 1, and must be true or false"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("case", ["gpt2"], indirect=True)
def test_a_record_without_checksums_is_checked_by_its_contents(case, wrong):
    (*path, key), value, sentence = WRONG[wrong]
    record = copy.deepcopy({k: v for k, v in case.record.items() if k != "checksums"})
    parent = record
    for step in path:
        parent = parent[step]
    parent[key] = value
    assert sentence in check(case, record)


@pytest.mark.parametrize("case", ["gpt2"], indirect=True)
def test_a_change_that_makes_sense_is_seen_by_the_checksums(case):
    record = copy.deepcopy(case.record)
    record["budgets"][0]["taus"][0] *= 0.9
    error = check(case, record)
    assert "quantization_config.budgets is [" in error
    assert "delete quantization_config.checksums" in error
    del record["checksums"]
    with warnings.catch_warnings(action="ignore"):
        after = case.outputs(record)
    assert after[3].equal(case.before[3])  # meant: it opens


def test_records_of_earlier_releases_open(case):
    record = {k: v for k, v in case.record.items() if k not in ("checksums", "neuron_order")}
    assert check(case, record) == ""
    for file in case.folder.glob("*.safetensors"):
        shutil.copy(file, file.with_suffix(".kept"))
    try:
        from safetensors.torch import load_file, save_file

        tensors = load_file(case.folder / "model.safetensors")
        kept = {k: v for k, v in tensors.items() if not k.endswith(".order")}
        assert len(kept) == len(tensors) - len(record["blocks"])
        save_file(kept, case.folder / "model.safetensors", metadata={"format": "pt"})
        assert check(case, record) == ""
    finally:
        for file in case.folder.glob("*.kept"):
            file.rename(file.with_suffix(".safetensors"))
