"""The output folder: roots of disks, kills between any two steps, and the files that come along."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from cli_support import GPT2, convert_argv, save_model
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from d2dmoe.pipeline import workdir
from d2dmoe.pipeline.workdir import finish_publishing, publish, working_folder


def tree(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def mounted(monkeypatch: pytest.MonkeyPatch):
    """Makes a folder behave as the root of a disk."""

    def mount(folder: Path) -> None:
        real = os.replace

        def replace(source, target):
            if folder in (Path(source), Path(target)):
                raise OSError(errno.EBUSY, "Device or resource busy", str(folder))
            real(source, target)

        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == folder)
        monkeypatch.setattr(os, "replace", replace)

    return mount


@pytest.mark.parametrize(
    "before", [{}, {"old.txt": "old", "model/x": "old", "config.json": "old"}], ids=["new", "taken"]
)
@pytest.mark.parametrize("root", [False, True], ids=["folder", "root of a disk"])
def test_publishing_can_be_killed_at_any_moment(root, before, tmp_path, mounted, monkeypatch):
    new = {"config.json": "new", "model/y": "new", "results.json": '{"rows": 1}'}
    ended = step = 0
    while not ended:
        folder = tmp_path / str(step) / "out"
        for name, text in before.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        folder.mkdir(parents=True, exist_ok=True)
        if root:
            mounted(folder)
        work = working_folder(folder)
        for name, text in {
            "recipe.json": "{}",
            "split.safetensors": "",
            **{f"checkpoint/{n}": t for n, t in new.items()},
        }.items():
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            (work / name).write_text(text)
        calls = {"left": step}

        def killing(real, calls=calls):
            def call(*arguments, **options):
                if calls["left"] == 0:
                    raise KeyboardInterrupt
                calls["left"] -= 1
                return real(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killing(os.replace))
            patch.setattr(shutil, "rmtree", killing(shutil.rmtree))
            patch.setattr(Path, "unlink", killing(Path.unlink))
            try:
                publish(work / "checkpoint", folder, work)
                ended = True
            except KeyboardInterrupt:
                pass
        if (work / workdir.COMPLETE).exists():
            assert finish_publishing(folder, work) == {"rows": 1}
        if work.exists():  # killed before the first step, or after the last mark went
            kept = tree(folder) if not root else {k: v for k, v in tree(folder).items() if workdir.INSIDE not in k}
            assert kept in (before, new)
            assert step == 0 or kept == new
        else:
            assert tree(folder) == new
        step += 1
    assert step > 3


@pytest.mark.parametrize("flags", [["--overwrite"], []])
def test_converts_into_the_root_of_a_disk(flags, home, d2dmoe, tmp_path, mounted):
    out = tmp_path / "disk"
    (out / "lost+found").mkdir(parents=True)
    if flags:
        (out / "notes.txt").write_text("mine")
    mounted(out)
    d2dmoe(*convert_argv(home / "dense", home / "text.txt", out, *flags))
    names = {p.name for p in out.iterdir()}
    first = {p.name for p in (home / "first").iterdir()} - {"report"}  # pictures, which this test does not draw
    assert names == first | {"lost+found"}
    assert (out / "model.safetensors").read_bytes() == (home / "first" / "model.safetensors").read_bytes()


def test_what_the_conversion_does_not_replace_comes_along(home, d2dmoe, tmp_path):
    """The files of a sentence-transformers folder, and none that describe other weights."""
    source = tmp_path / "source"
    shutil.copytree(home / "dense", source)
    along = {
        "modules.json": '[{"idx": 0}]', "1_Pooling/config.json": '{"pooling_mode_mean_tokens": true}',
        "2_Normalize/config.json": "{}", "sentence_bert_config.json": '{"max_seq_length": 17}',
        "chat_template.jinja": "{{ x }}", "LICENSE": "MIT",
    }  # fmt: skip
    left = ("onnx/model.onnx", "pytorch_model.bin", "training_args.bin", ".cache/x", "checkpoint-10/y", "results.json")
    for name in left:
        along_or_left = source / name
        along_or_left.parent.mkdir(parents=True, exist_ok=True)
        along_or_left.write_text("{}")
    for name, text in along.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    done = d2dmoe(*convert_argv(source, home / "text.txt", tmp_path / "out"))
    assert {name: (tmp_path / "out" / name).read_text() for name in along} == along
    assert all(name in done.err for name in along if name != "chat_template.jinja")  # the tokenizer wrote that one
    assert not any((tmp_path / "out" / name).exists() for name in left if name != "results.json")
    assert "rows" in json.loads((tmp_path / "out" / "results.json").read_text())


ADAPTED = {
    "beside the model": (lambda f: None, "a peft adapter lies beside the model"),
    "alone": (
        lambda f: [p.unlink() for p in (f / "config.json", f / "model.safetensors")],
        "adapter without its model",
    ),
}


@pytest.mark.parametrize("verb", ["convert", "sparsify", "list", "eval"])
@pytest.mark.parametrize("case", ADAPTED)
def test_adapters_are_refused_before_any_work(case, verb, home, d2dmoe, tmp_path):
    change, sentence = ADAPTED[case]
    folder = tmp_path / "adapted"
    shutil.copytree(home / "dense", folder)
    model = AutoModelForCausalLM.from_pretrained(home / "dense")
    get_peft_model(model, LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)).save_pretrained(folder)
    change(folder)
    data = [] if verb == "list" else ["--data", home / "text.txt"]
    output = ["--output-dir", tmp_path / "out"] if verb in ("convert", "sparsify") else []
    refused = d2dmoe(verb, "--model", folder, *data, *output, code=1)
    assert sentence in refused.err
    assert "merge_and_unload" in refused.err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_a_save_that_writes_something_else_leaves_what_was_there(home, d2dmoe, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    real = torch.nn.Module.state_dict

    def half(self, *arguments, **options):
        state = real(self, *arguments, **options)
        for key in [k for k in state if "ln_f.weight" in k]:
            state[key] = state[key] * 2
        return state

    monkeypatch.setattr("d2dmoe.pipeline.workdir.PreTrainedModel.state_dict", half, raising=False)
    result = d2dmoe(*convert_argv(home / "dense", home / "text.txt", tmp_path / "out", "--overwrite"), code=1)
    assert "did not write transformer.ln_f.weight as it is" in result.err
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_numbers_are_named(bad, home, d2dmoe, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(home / "dense")
    model.transformer.h[1].attn.c_attn.weight.data[3, 1] = bad
    shutil.copytree(home / "dense", tmp_path / "bad")
    model.save_pretrained(tmp_path / "bad")
    for verb in ("convert", "sparsify"):
        argv = [verb, "--model", tmp_path / "bad", "--data", home / "text.txt", "--output-dir", tmp_path / "out"]
        assert "transformer.h.1.attn.c_attn.weight holds NaN or infinite" in d2dmoe(*argv, code=1).err


def test_a_classifier_of_a_decoder_needs_no_padding_token(home, d2dmoe, tmp_path):
    save_model(
        "GPT2ForSequenceClassification", tmp_path / "classifier", **(GPT2 | {"pad_token_id": None}), num_labels=2
    )
    config = json.loads((tmp_path / "classifier" / "config.json").read_text())
    assert config.get("pad_token_id") is None
    rows = [{"text": f"{'good' if n % 2 else 'bad'} one {n}", "label": n % 2} for n in range(80)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    listed = d2dmoe("list", "--model", tmp_path / "classifier").out
    assert "16->64 | yes" in listed, listed
    d2dmoe(*convert_argv(tmp_path / "classifier", tmp_path / "rows.jsonl", tmp_path / "out"))
    kept = AutoConfig.from_pretrained(tmp_path / "out")
    assert kept.pad_token_id == kept.eos_token_id


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "compressed-tensors", "nobody_knows_it"])
def test_quantised_models_are_refused(method, home, d2dmoe, tmp_path):
    shutil.copytree(home / "dense", tmp_path / "quantised")
    file = tmp_path / "quantised" / "config.json"
    stored = {"quant_method": method, "load_in_8bit": True, "bits": 4, "config_groups": {}}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": stored}))
    for verb in ("convert", "sparsify"):
        argv = [verb, "--model", tmp_path / "quantised", "--data", home / "text.txt", "--output-dir", tmp_path / "out"]
        assert "quantised" in d2dmoe(*argv, code=1).err
