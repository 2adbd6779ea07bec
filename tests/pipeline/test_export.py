"""The original dense model and its adapters, from and on a converted folder; folders that lost their routers."""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from cli_support import BERT, GPT2, convert_argv, run_in_process, run_python, save_model, sentences
from hub_mirror import hub_mirror, mirror_environment
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import d2dmoe
from d2dmoe.cli import main
from d2dmoe.config import UserError
from d2dmoe.discovery import dummy_inputs
from d2dmoe.moe.layer import layers

LLAMA = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64,
         "vocab_size": 257, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "intermediate_size": 48,
         "num_key_value_heads": 2}  # fmt: skip
PHI3 = {**LLAMA, "original_max_position_embeddings": 64}
CASES = {  # class, sizes, experts (7: padded), and modules for an adapter
    "gpt2": ("GPT2LMHeadModel", GPT2, 8, ["c_attn", "c_fc", "c_proj"]),
    "gpt2-padded": ("GPT2LMHeadModel", GPT2, 7, ["c_fc", "mlp.c_proj"]),
    "bert": ("BertForMaskedLM", BERT, 8, ["query", "intermediate.dense", "output.dense"]),
    "llama": ("LlamaForCausalLM", LLAMA, 8, ["q_proj", "up_proj", "gate_proj", "down_proj"]),
    "llama-padded": ("LlamaForCausalLM", LLAMA, 7, ["up_proj", "down_proj"]),
    "phi3": ("Phi3ForCausalLM", PHI3, 8, ["gate_up_proj", "down_proj"]),
}


SLOW = ("gpt2-padded", "bert")


@pytest.fixture(scope="module", params=[pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in CASES])
def case(request, tmp_path_factory) -> tuple[Path, type, list[str]]:
    """A folder with `dense` and `moe` in it, the class, and the modules of an adapter."""
    return made(request.param, tmp_path_factory.mktemp(request.param))


def made(name: str, root: Path) -> tuple[Path, type, list[str]]:
    class_name, sizes, experts, modules = CASES[name]
    (root / "text.txt").write_text("\n".join(sentences(120)))
    save_model(class_name, root / "dense", **sizes)
    assert main(convert_argv(root / "dense", root / "text.txt", root / "moe", "--experts", experts)) == 0
    return root, getattr(transformers, class_name), modules


def test_the_original_model_comes_back_bit_for_bit(case, capsys, tmp_path):
    root, kind, _ = case
    converted, original = (load_file(root / n / "model.safetensors") for n in ("moe", "dense"))
    assert any(not torch.equal(converted[key], original[key]) for key in original)  # the neurons have moved
    result = run_in_process(capsys, "export", "--dense", root / "moe", tmp_path / "out", "--json", tmp_path / "r.json")
    assert result.code == 0, result.err
    assert json.loads((tmp_path / "r.json").read_text())["rows"] == [{"blocks": 2}]
    again = load_file(tmp_path / "out/model.safetensors")
    assert again.keys() == original.keys()
    for key, tensor in original.items():
        assert torch.equal(again[key], tensor), key
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert (tmp_path / "out/tokenizer.json").exists()
    assert not (tmp_path / "out/checksums.json").exists()
    model = kind.from_pretrained(tmp_path / "out")
    assert not layers(model)


def lora(kind: type, folder: Path, modules: list[str], output: Path, **more: object) -> PeftModel:
    """A LoRA with random weights on a model, saved."""
    model = get_peft_model(kind.from_pretrained(folder), LoraConfig(target_modules=modules, r=3, **more))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.3
    model.save_pretrained(output)
    return model.eval()


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_of_the_original_is_the_same_on_the_dense_twin(dora, case, capsys, tmp_path):
    root, kind, modules = case
    conv = kind.__name__.startswith("GPT2")
    more = {"fan_in_fan_out": conv, "use_dora": dora}
    original = lora(kind, root / "dense", modules, tmp_path / "adapter", **more)
    argv = ("export", "--adapter", tmp_path / "adapter", "--model", root / "moe", tmp_path / "out")
    result = run_in_process(capsys, *argv)
    assert result.code == 0, result.err
    plain = kind.from_pretrained(root / "moe").config
    del plain.quantization_config
    inputs = dummy_inputs(original.base_model.model)
    outputs = {}
    for name in ("adapter", "out"):
        twin = kind.from_pretrained(root / "moe", config=copy.deepcopy(plain))
        outputs[name] = PeftModel.from_pretrained(twin, tmp_path / name).eval()(**inputs)[0]
    assert_close(outputs["out"], original(**inputs)[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outputs["adapter"], outputs["out"], rtol=1e-2, atol=1e-3)  # as it was, it is another
    base = json.loads((tmp_path / "out/adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(root / "moe")


def test_what_cannot_be_exported_is_refused(capsys, tmp_path):
    root, kind, _ = made("llama", tmp_path)

    def refused(*argv: object) -> str:
        result = run_in_process(capsys, "export", *argv)
        assert result.code == 1
        return result.err

    assert "--adapter and --model belong together" in refused("--adapter", root / "dense", root / "new")
    assert "give a folder that peft has saved" in refused(
        "--adapter", root / "dense", "--model", root / "moe", root / "new"
    )
    assert "is no converted checkpoint" in refused("--dense", root / "dense", root / "new")
    assert "no such folder" in refused("--dense", root / "absent", root / "new")
    assert "not an empty folder" in refused("--dense", root / "moe", root / "dense")
    lora(kind, root / "dense", ["up_proj"], root / "adapter")
    tensors = load_file(root / "adapter/adapter_model.safetensors")
    key = next(iter(tensors))
    save_file({key.replace("lora_A.weight", "ia3_l"): tensors[key]}, root / "adapter/adapter_model.safetensors")
    assert "only LoRAs" in refused("--adapter", root / "adapter", "--model", root / "moe", root / "new")
    tensors = load_file(root / "moe/model.safetensors")
    kept = {k: v for k, v in tensors.items() if not k.endswith(".order")}
    save_file(kept, root / "moe/model.safetensors", metadata={"format": "pt"})
    assert "does not store the order of the neurons" in refused("--dense", root / "moe", root / "new")
    assert not (root / "new").exists()


WORK = [("gpt2", ["c_attn", "c_fc"], "'transformer.h.0.mlp.up_weight'"),
        pytest.param("gpt2", ["c_proj"], "'transformer.h.0.mlp.down_weight'", marks=pytest.mark.slow),
        ("llama", ["q_proj", "up_proj"], "'model.layers.0.mlp.up_weight'"),
        pytest.param("llama", ["gate_proj"], "'model.layers.0.mlp.gate_weight'", marks=pytest.mark.slow),
        ("phi3", ["qkv_proj", "gate_up_proj"], "'model.layers.0.mlp.gate_weight'")]  # fmt: skip


@pytest.mark.parametrize(("name", "modules", "works"), WORK)
def test_peft_refuses_dense_names_on_the_converted_model(name, modules, works, tmp_path):
    root, kind, _ = made(name, tmp_path)
    with pytest.raises(ValueError, match="packed into experts") as error:
        get_peft_model(kind.from_pretrained(root / "moe"), LoraConfig(target_modules=modules, r=2))
    assert works in str(error.value)
    parameter = works.strip("'").replace(".0.", ".1.")
    get_peft_model(
        kind.from_pretrained(root / "moe"), LoraConfig(target_parameters=[parameter], target_modules=[], r=2)
    )
    everything = get_peft_model(kind.from_pretrained(root / "moe"), LoraConfig(target_modules="all-linear", r=2))
    assert any("lora_A" in key for key in everything.state_dict())  # which passes placeholders over


@pytest.mark.parametrize("act", [None, "sigmoid"])
def test_an_adapter_on_packed_weights_leaves_padding_out(act, tmp_path):
    """Trained, merged and saved: the outputs stay, though the file keeps no row of the zero neurons."""
    torch.manual_seed(7)
    sizes = {**LLAMA, "hidden_act": act} if act else LLAMA
    CASES["act"] = ("LlamaForCausalLM", sizes, 7, [])
    root, kind, _ = made("act", tmp_path)
    model = kind.from_pretrained(root / "moe")
    names = [f"model.layers.{n}.mlp.{p}_weight" for n in (0, 1) for p in ("up", "gate", "down")]
    adapted = get_peft_model(model, LoraConfig(target_parameters=names, target_modules=[], r=2))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.3
    inputs = dummy_inputs(model)
    for active in (1, 0.5):
        d2dmoe.set_gate(model, active=active)
        with torch.no_grad():
            before = adapted.eval()(**inputs)[0]
        with torch.enable_grad():
            assert_close(adapted(**inputs)[0], before, rtol=1e-4, atol=1e-5)
    merged = adapted.merge_and_unload()
    assert layers(merged)[0].down_weight[-1, -1].any()  # the adapter has filled the padding
    merged.save_pretrained(tmp_path / "saved")
    again = kind.from_pretrained(tmp_path / "saved")
    assert not layers(again)[0].down_weight[-1, -1].any()
    for active in (1, 0.5):
        with torch.no_grad(), d2dmoe.set_gate(merged, active=active), d2dmoe.set_gate(again, active=active):
            assert_close(merged(**inputs)[0], again(**inputs)[0], rtol=1e-5, atol=1e-6)
            if active == 0.5:
                assert_close(merged(**inputs)[0], before, rtol=1e-4, atol=1e-5)


PLAIN = """
import sys, transformers
folder, kind, output = sys.argv[1:]
model = getattr(transformers, kind).from_pretrained(folder)
assert "d2dmoe" not in sys.modules
model.save_pretrained(output)
transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(output)
"""


@pytest.mark.parametrize("name", ["gpt2", pytest.param("llama-padded", marks=pytest.mark.slow)])
def test_a_folder_saved_without_d2dmoe(name, capsys, tmp_path):
    root, kind, _ = made(name, tmp_path)
    command = [sys.executable, "-c", PLAIN, str(root / "moe"), kind.__name__, str(root / "plain")]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert "quantization_config" in json.loads((root / "plain/config.json").read_text())
    sentence = "the routers and stand-ins of this checkpoint are gone: a program without d2dmoe saved it"
    with pytest.raises(UserError, match=sentence) as error:
        kind.from_pretrained(root / "plain")
    assert "deleting quantization_config" in str(error.value)
    assert "d2dmoe convert --model" in str(error.value)
    result = run_in_process(capsys, "verify", root / "plain")
    assert result.code == 1
    assert sentence in result.err

    experts = ("--experts", CASES[name][2])
    for more in (("--dry-run",), ()):
        result = run_in_process(capsys, *convert_argv(root / "plain", root / "text.txt", root / "new", *experts, *more))
        assert result.code == 0, result.err
    new, dense = kind.from_pretrained(root / "new"), kind.from_pretrained(root / "dense")
    assert len(layers(new)) == 2
    inputs = dummy_inputs(dense)
    with torch.no_grad(), d2dmoe.set_gate(new, active=1):
        assert_close(new(**inputs)[0], dense(**inputs)[0], rtol=1e-4, atol=1e-5)
    assert run_in_process(capsys, "verify", root / "new").code == 0


ON_THE_HUB = """
import contextlib, io, json, sys
from d2dmoe.cli import main

for argv in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


@pytest.mark.slow
def test_a_folder_saved_without_d2dmoe_on_the_hub(tmp_path):
    """Told by the headers of its files alone; with the hub gone, by an earlier download."""
    root, kind, _ = made("gpt2", tmp_path)
    command = [sys.executable, "-c", PLAIN, str(root / "moe"), kind.__name__, str(root / "plain")]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    data = ["--data", str(root / "text.txt"), "--max-length", "32"]
    runs = [
        ["eval", "--model", "org/plain", *data, "--tokens", "200"],
        convert_argv("org/plain", root / "text.txt", "dry", "--dry-run"),
        convert_argv("org/moe", root / "text.txt", "dry", "--dry-run"),
        convert_argv("org/plain", root / "text.txt", root / "new"),
        ["sparsify", "--model", "org/plain", *data, "--output-dir", "sparse", "--max-steps", "1", "--device", "cpu",
         "--eval-tokens", "0"],
        ["verify", "org/plain"],
    ]  # fmt: skip
    with hub_mirror({"org/plain": root / "plain", "org/moe": root / "moe"}, log=(log := [])) as endpoint:
        environment = mirror_environment(endpoint, tmp_path / "cache")
        result = run_python("-c", ON_THE_HUB, json.dumps(runs), cwd=tmp_path, environment=environment)
    assert result.code == 0, result.err
    stripped, dry, whole, done, sparsified, verified = (json.loads(line) for line in result.out.splitlines())
    assert (stripped[0], stripped[1]) == (1, "")
    assert "the routers and stand-ins of this checkpoint are gone" in stripped[2]
    assert "d2dmoe convert --model" in stripped[2]
    assert dry[0] == 0, dry[2]
    assert "| transformer.h.1.mlp | ffn |" in dry[1]
    assert whole[0] == 1
    assert "--model org/moe is already a converted checkpoint" in whole[2]
    assert not any('"GET /org/moe' in line and "safetensors" in line and " 200 " in line for line in log)
    assert done[0] == 0, done[2]
    assert sparsified[0] == 0, sparsified[2]
    assert verified[0] == 1
    assert "org/plain: the check record failed: there is no such folder" in verified[2]
    new, dense = kind.from_pretrained(root / "new"), kind.from_pretrained(root / "dense")
    inputs = dummy_inputs(dense)
    with torch.no_grad(), d2dmoe.set_gate(new, active=1):
        assert_close(new(**inputs)[0], dense(**inputs)[0], rtol=1e-4, atol=1e-5)
    again = run_python("-c", ON_THE_HUB, json.dumps(runs[1:2]), cwd=tmp_path, environment=environment)
    assert json.loads(again.out)[:2] == dry[:2], again.err  # the hub is gone


# --- to OpenVINO, where it is not installed; test_openvino.py has the rest -------------------------------------------


def without(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == missing else found(name, *a))


@pytest.mark.parametrize(("missing", "more"), [("openvino", ()), ("nncf", ("--rest", "int8-weights"))])
def test_a_missing_package_is_named_with_its_command(missing, more, home, d2dmoe, tmp_path, monkeypatch):
    without(monkeypatch, missing)
    result = d2dmoe("export", "--openvino", home / "first", tmp_path / "out", *more, code=1)
    assert f'{missing} not found; pip install "d2dmoe-toolkit[openvino]" brings' in result.err
    assert not list(tmp_path.iterdir())
