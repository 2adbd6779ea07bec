"""Every mistake gets one sentence with the value and the remedy, at once, and leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from cli_support import convert_argv, names, run_in_process, run_python, weights
from cli_support import sentences as text_sentences
from hub_mirror import hub_mirror, mirror_environment
from zoo import tiny

from d2dmoe import UserError, hub
from d2dmoe.config.record import CHECKPOINT_VERSION

pytestmark = pytest.mark.usefixtures("_offline")
SOON = 5  # seconds


@pytest.fixture
def _offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No network in this process, whatever the calling shell says."""
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    hub.reachable.cache_clear()
    yield
    hub.reachable.cache_clear()


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """More would only wait for each other on models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """Run the command and expect one sentence, at once, and no new file; returns the sentence."""

    def run(*argv: object, code: int = 1) -> str:
        before, started = sorted(tmp_path.rglob("*")), time.monotonic()
        result = run_in_process(capsys, *argv)
        assert time.monotonic() - started < SOON
        assert sorted(tmp_path.rglob("*")) == before
        assert (result.code, result.out) == (code, ""), result.err
        return sentence(result.err, usage=code == 2)

    return run


@pytest.fixture
def convert(refused: Callable[..., str], home: Path, tmp_path: Path) -> Callable[..., str]:
    """A conversion of the good model and text with some flags, refused."""
    return lambda *flags, **options: refused(
        *convert_argv(home / "dense", home / "text.txt", tmp_path / "out", *flags), **options
    )


def sentence(err: str, usage: bool = False) -> str:
    """The one line on standard error; argparse prints the usage before its own."""
    assert "Traceback" not in err
    lines = err.strip().splitlines()
    assert usage or len(lines) == 1, err
    assert lines[-1].startswith("d2dmoe")
    return lines[-1]


def has(text: str, *words: str) -> None:
    """All of these words are in it."""
    assert [word for word in words if word not in text] == [], text


# --- the model -------------------------------------------------------------------------------------------------------


def test_no_model(refused) -> None:
    has(refused("convert"), "no model given", "--model")


@pytest.mark.parametrize("verb", ["convert", "list", "eval"])
def test_unknown_model_path(verb: str, refused, tmp_path: Path) -> None:
    has(refused(verb, "--model", tmp_path / "nowhere"), f"--model {tmp_path}/nowhere: no such folder", "hub id")


def test_model_is_a_file(home: Path, refused) -> None:
    has(refused("list", "--model", home / "dense" / "config.json"), "config.json: a file", "save_pretrained")


def test_model_folder_without_a_config(refused, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    has(refused("list", "--model", tmp_path / "empty"), f"{tmp_path}/empty", "no config.json", "save_pretrained")


def test_damaged_config(refused, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2",')
    has(refused("list", "--model", tmp_path), str(tmp_path), "config.json cannot be read")


def test_unknown_class(home: Path, refused, tmp_path: Path) -> None:
    shutil.copytree(home / "dense", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"architectures": ["GPT9"]}))
    has(refused("list", "--model", tmp_path / "model"), "GPT9", "transformers", "no such class")


def test_a_hub_id_while_offline(refused) -> None:
    has(refused("list", "--model", "org/absent"), "--model org/absent", "cannot be reached", "HF_ENDPOINT")


def test_not_a_hub_id(refused) -> None:
    has(refused("list", "--model", "no name!"), "--model no name!", "neither a local folder nor a model on the hub")


def test_the_hub_does_not_answer(home: Path, tmp_path: Path) -> None:
    """At once, instead of after the client's five retries, and telling how to do without; the same for data."""
    code = """
import sys, time
import datasets, huggingface_hub
from d2dmoe import hub
from d2dmoe.cli import main
for model, data in (("org/tiny", "builtin"), (sys.argv[1], "org/texts")):
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = False
    hub.reachable.cache_clear()  # as in a new process
    started = time.time()
    print(main(["convert", "--model", model, "--data", data, "--output-dir", "out"]), time.time() - started < 5)
    print(huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)
"""
    environment = mirror_environment("http://127.0.0.1:9", tmp_path / "cache")
    result = run_python("-c", code, home / "dense", cwd=tmp_path, environment=environment)
    assert result.out == 2 * "1 True\nFalse False\n", result.err
    model, data = result.err.strip().splitlines()
    has(model, "--model org/tiny", "hub cannot be reached", "save_pretrained", "HF_HUB_OFFLINE=1", "HF_ENDPOINT")
    has(data, "--data org/texts", "neither a local path", "builtin", "jsonl")
    assert names(tmp_path) <= {"cache"}


def test_unknown_hub_ids(home: Path, tmp_path: Path) -> None:
    code = """
import sys
from d2dmoe.cli import main
for model, data in (("org/absent", "builtin"), ("org/other", "builtin"), (sys.argv[1], "org/absent")):
    print(main(["convert", "--model", model, "--data", data, "--output-dir", "out"]))
print(main(["list", "--model", "org/tiny", "--revision", "v9"]))
"""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "nobody-knows"}')
    with hub_mirror({"org/tiny": home / "dense", "org/other": tmp_path / "other"}) as endpoint:
        environment = mirror_environment(endpoint, tmp_path / "cache")
        result = run_python("-c", code, home / "dense", cwd=tmp_path, environment=environment)
    assert result.out.split() == ["1"] * 4, result.err
    absent, other, data, revision = result.err.strip().splitlines()
    has(absent, "--model org/absent", "neither a local folder nor a model on the hub", "spelling")
    has(other, "--model org/other", "nobody-knows")
    assert "cannot be reached" not in other
    has(data, "--data org/absent", "neither a local path nor a data set")
    has(revision, "--model org/tiny", "--revision")
    assert names(tmp_path) == {"cache", "other"}


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_a_converted_model_is_not_converted_again(flags: list, home: Path, refused, tmp_path: Path) -> None:
    argv = convert_argv(home / "first", home / "text.txt", tmp_path / "out", *flags)
    has(refused(*argv), f"--model {home}/first", "already a converted checkpoint", "dense model")


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of convolutions and one linear map."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    folder = tmp_path_factory.mktemp("resnet")
    ResNetForImageClassification(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_no_block_to_convert(flags: list, resnet: Path, home: Path, refused, tmp_path: Path) -> None:
    argv = convert_argv(resnet, home / "text.txt", tmp_path / "out", *flags)
    has(refused(*argv), f"--model {resnet}", "no feed-forward block found", "d2dmoe list")


def test_a_mixture_of_experts_is_called_one(refused, tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(**sizes, num_key_value_heads=1, num_local_experts=4, vocab_size=32)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "model")
    said = refused("convert", "--dry-run", "--model", tmp_path / "model")
    has(said, "mixture of experts already: num_local_experts 4")


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_a_wrong_flag_of_the_first_stage_is_named(flags: list, home: Path, refused, tmp_path: Path) -> None:
    argv = convert_argv(home / "dense", home / "text.txt", tmp_path / "out", "--sparsify", "hoyer", *flags)
    has(refused(*argv, "--sparsify-bogus", 3), "flags have --sparsify- before them", "unknown option --bogus")


def test_list_tells_why_nothing_is_converted(resnet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_in_process(capsys, "list", "--model", resnet)
    assert result.code == 1
    assert "classifier.1" in result.out
    has(sentence(result.err), str(resnet), "no feed-forward block found")


def test_truncated_weights(home: Path, refused, tmp_path: Path) -> None:
    shutil.copytree(home / "dense", tmp_path / "model")
    whole = weights(home / "dense")
    for size in (len(whole) - 1, len(whole) // 2, 100, 5, 0):
        (tmp_path / "model" / "model.safetensors").write_bytes(whole[:size])
        argv = convert_argv(tmp_path / "model", home / "text.txt", tmp_path / "out")
        has(refused(*argv), "model.safetensors is truncated or damaged", f"({size} bytes)", "copy it again")
    argv = ("eval", "--model", tmp_path / "model", "--data", home / "text.txt", "--max-length", 32)
    has(refused(*argv), "model.safetensors is truncated or damaged")


def test_missing_weights(home: Path, refused, tmp_path: Path) -> None:
    shutil.copytree(home / "dense", tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    has(refused(*convert_argv(tmp_path / "model", home / "text.txt", tmp_path / "out")), "model", "cannot be read")


def test_pickled_weights(home: Path, refused, tmp_path: Path) -> None:
    """A pickle can run any program when it is opened."""
    from safetensors.torch import load_file

    shutil.copytree(home / "dense", tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(home / "dense" / "model.safetensors"), tmp_path / "model" / "pytorch_model.bin")
    text = refused(*convert_argv(tmp_path / "model", home / "text.txt", tmp_path / "out"))
    has(text, f"--model {tmp_path}/model", "not in safetensors files", "save_pretrained")


def test_code_of_a_model_is_never_run(
    home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever opens a part of the source is told so."""
    import transformers

    asked = []
    for kind in (hub.AutoConfig, hub.AutoTokenizer, transformers.GPT2LMHeadModel):

        def opened(*arguments, kind=kind, original=kind.from_pretrained, **options):
            asked.append((kind.__name__, options.get("trust_remote_code"), options.get("use_safetensors")))
            return original(*arguments, **options)

        monkeypatch.setattr(kind, "from_pretrained", opened)
    monkeypatch.setattr("d2dmoe.pipeline.convert.convert_model", lambda *_, **__: 1 / 0)
    run_in_process(capsys, *convert_argv(home / "dense", home / "text.txt", tmp_path / "out"))
    assert set(asked) == {("AutoConfig", False, None), ("AutoTokenizer", False, None), ("GPT2LMHeadModel", False, True)}


def test_a_missing_tensor(home: Path, refused, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(home / "dense", tmp_path / "model")
    tensors = load_file(home / "dense" / "model.safetensors")
    gone = [name for name in tensors if "h.1.mlp.c_fc" in name]
    for name in gone:
        del tensors[name]
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    text = refused("eval", "--model", tmp_path / "model", "--data", home / "text.txt", "--max-length", 32)
    has(text, "lacks 2 tensors", "h.1.mlp.c_fc")


def test_a_checkpoint_of_a_newer_version(home: Path, refused, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    shutil.copytree(home / "first", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"]["version"] = 999
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    text = refused("eval", "--model", tmp_path / "model", "--data", home / "text.txt", "--max-length", 32)
    has(text, "version 999", f"up to version {CHECKPOINT_VERSION}", "install a newer d2dmoe-toolkit")
    with pytest.raises(UserError) as error:
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert text == f"d2dmoe: {error.value}"


@pytest.mark.parametrize(
    ("name", "words"),
    [("whisper", ["gives input_ids, attention_mask", "takes input_features"]), ("clip", ["CLIPModel", "pixel_values"])],
)
def test_data_that_cannot_feed_the_model(name: str, words: list, home: Path, refused, tmp_path: Path) -> None:
    """Told without its weights, which are not even there."""
    model = tiny(name)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path / "model")
    (tmp_path / "ids.jsonl").write_text(4 * (json.dumps({"input_ids": list(range(5, 20))}) + "\n"))
    argv = convert_argv(tmp_path / "model", tmp_path / "ids.jsonl", tmp_path / "out", "--eval-tokens", 0)
    has(refused(*argv), f"--data {tmp_path}/ids.jsonl", "images alone", *words)


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_a_pipe_is_no_file(home: Path, refused, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    has(refused("eval", "--model", home / "first", "--data", tmp_path / "pipe"), "pipe", "write it to a file first")


def test_no_data(home: Path, refused) -> None:
    for verb in (["eval"], ["convert", "--output-dir", "out"]):
        has(refused(*verb, "--model", home / "dense", "--data", ""), "--data: nothing given", "builtin")


@pytest.mark.parametrize("setting", [["--active", "0.5"], ["--tau", "0.1"], ["--oracle"]], ids=" ".join)
def test_a_dense_model_has_no_budgets(setting: list[str], home: Path, refused) -> None:
    text = refused("eval", "--model", home / "dense", "--data", home / "text.txt", "--max-length", 32, *setting)
    has(text, "dense", "is not converted and has no budgets")


@pytest.mark.parametrize("attention", ["low-rank:q,o", "none:q"])
def test_a_role_that_is_not_converted_alone(attention: str, convert) -> None:
    """Of a fused projection; it was left out without a word."""
    words = ["no roles"] if "none" in attention else ["does q alone", "there are o, qkv"]
    has(convert("--attention", attention, "--active", "0.5"), f"--attention {attention}", *words)


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
@pytest.mark.parametrize(("experts", "near"), [(33, "32, 64"), (63, "32, 64"), (65, "64"), (1000, "64")])
def test_experts_that_do_not_fit(experts: int, near: str, flags: list, convert) -> None:
    text = convert("--experts", experts, *flags)
    has(text, f"--experts {experts} does not fit the FFN width 64 of transformer.h.0.mlp")
    assert text.endswith(f"nearest that fit: {near}")


def test_an_expert_size_that_does_not_fit(convert) -> None:
    has(convert("--experts", 0, "--expert-size", 12), "--expert-size 12 does not fit", "64", "6 experts", "11, 13")


def test_experts_and_expert_size(convert) -> None:
    has(convert("--expert-size", 8), "--experts or --expert-size, not both")


@pytest.mark.parametrize("active", ["0", "1.5", "-1", "nan", "0.5,2"])
def test_active_out_of_range(active: str, home: Path, convert, refused) -> None:
    for text in (convert("--active", active), refused("eval", "--model", home / "first", "--active", active)):
        has(text, f"--active {active.split(',')[-1]}", "above 0 and at most 1", "0.25")


def test_active_below_the_calibrated_ones(convert) -> None:
    has(convert("--gate", "max", "--active", "0.5,0.005"), "--active 0.005", "max gate", "from 0.01 on", "topk")


@pytest.mark.parametrize("tau", ["1.5", "-0.1", "nan"])
@pytest.mark.parametrize("model", ["first", "dense"])
def test_tau_out_of_range(tau: str, model: str, home: Path, refused) -> None:
    text = refused("eval", "--model", home / model, "--data", home / "text.txt", "--tau", tau)
    has(text, f"--tau {tau}", "at least 0", "at most 1")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["eval", "--model", "m", "--active", "half"], ["--active", "'half'", "numbers"]),
        (["eval", "--model", "m", "--tau", "0.5;1"], ["--tau", "'0.5;1'", "numbers"]),
        (["convert", "--experts", "many"], ["--experts", "'many'"]),
        (["convert", "--gate", "dice"], ["--gate", "'dice'", "topk"]),
        (["convert", "--resmue"], ["--resmue"]),
        (["covnert"], ["covnert", "convert"]),
        (["eval"], ["--model"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_usage_errors(argv: list[str], words: list[str], refused) -> None:
    has(refused(*argv, code=2), *words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--seed", -1], ["--seed -1", "0 or more"]),
        (["--batch-size", 0], ["--batch-size 0", "at least 1"]),
        (["--max-length", 1], ["--max-length 1", "at least 2"]),
        (["--router-learning-rate", "nan"], ["--router-learning-rate nan"]),
        (["--max-shard-size", "banana"], ["--max-shard-size banana", "5GB"]),
        (["--max-shard-size", "0KB"], ["--max-shard-size 0KB", "5GB"]),
        (["--device", "gpu"], ["--device gpu", "auto, cpu, cuda or cuda:N"]),
        (["--device", "cuda:99"], ["--device cuda:99", "CUDA devices", "auto or cpu"]),
        (["--min-experts", 9], ["--min-experts 9", "transformer.h.0.mlp has 8 experts"]),
        (["--min-experts", 3, "--max-experts", 2], ["--max-experts 2", "--min-experts 3"]),
    ],
    ids=str,
)
def test_other_numbers_out_of_range(flags: list, words: list[str], convert) -> None:
    has(convert(*flags), *words)


def test_negative_tokens(home: Path, refused) -> None:
    has(refused("eval", "--model", home / "dense", "--tokens", -5), "--tokens -5", "0 or more")


# --- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nowhere.txt", "/nowhere/at/all", "./nowhere"])
def test_unknown_data_path(name: str, convert) -> None:
    has(convert("--data", name), f"--data {name}", "no such file or folder", "builtin")


def test_an_unknown_data_set_while_offline(convert) -> None:
    has(convert("--data", "org/absent"), "--data org/absent", "neither a local path", "builtin")


BAD_FILES = {
    "empty.txt": (b"", ["the file is empty"]),
    "blank.txt": (b" \n\n", ["no usable calibration text", "more data"]),
    "latin.txt": ("déjà vu\n".encode("latin-1") * 100, ["not UTF-8", "byte 1", "iconv"]),
    "short.txt": (b"few words\nmore", ["shorter than one sequence of 32", "--max-length"]),
    "small.txt": (b"some words in a line\n" * 5, ["held out", "shorter than one sequence", "--eval-tokens 0"]),
    "cut.jsonl": (b'{"text": "one"}\n{"text": "tw', ["not valid JSON", "line 2"]),
    "list.jsonl": (b'["one"]\n', ["must be an object"]),
    "array.json": (b'[{"text": "one"},\n{"text": }]', ["not valid JSON", "line 2"]),
    "two.csv": (b"title,body\na,b\n", ["cannot tell the text column", "title, body", "--text-column"]),
    "quote.csv": (b'text\n"open\n', ["not valid CSV"]),
    "not.parquet": (b"PAR1", ["not.parquet"]),
    "number.jsonl": (b'{"text": null, "title": "x"}\n{"text": 3}\n', ["line 2: column 'text' holds a number"]),
    "half.jsonl": (b'{"text": "\\ud83d"}\n', ["line 1: column 'text' holds half a character"]),
    "bare.tsv": (b"some words\t1\nother words\t0\n", ["its first line looks like data", "--no-header"]),
    "ids.jsonl": (b'{"input_ids": [1, 2]}\n{"input_ids": [1, 257]}\n', ["line 2: token id 257 is out", "257 tokens"]),
    "minus.jsonl": (b'{"input_ids": [1, -2]}\n', ["line 1: 'input_ids' holds -2"]),
    "cut.txt.gz": (b"\x1f\x8b\x08", ["cannot be unpacked"]),
    "lfs.txt": (b"version https://git-lfs.github.com/spec/v1\n", ["Git LFS pointer", "git lfs pull"]),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file(name: str, convert, tmp_path: Path) -> None:
    content, words = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    has(convert("--data", tmp_path / name), f"--data {tmp_path / name}", *words)


def test_eval_of_an_empty_file(home: Path, refused, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    text = refused("eval", "--model", home / "dense", "--data", tmp_path / "empty.txt")
    has(text, f"--data {tmp_path}/empty.txt: the file is empty")


def test_a_folder_without_texts(convert, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "photo.png").touch()
    has(convert("--data", tmp_path / "texts"), f"--data {tmp_path}/texts", "holds none of", ".jsonl")


def test_an_unknown_column(convert, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("title,body\na,b\n")
    has(convert("--data", tmp_path / "t.csv", "--text-column", "txt"), "no column 'txt'", "title, body")


def test_text_for_a_model_without_a_tokenizer(home: Path, refused, tmp_path: Path) -> None:
    shutil.copytree(home / "dense", tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    argv = convert_argv(tmp_path / "model", home / "text.txt", tmp_path / "out")
    has(refused(*argv), f"--data {home}/text.txt is text", "no tokenizer", "input_ids")


def test_a_table_without_names_of_columns(home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The same figures as with them."""
    rows = [f"{number}\t{text}" for number, text in enumerate(text_sentences(40))]
    (tmp_path / "bare.tsv").write_text("\n".join(rows))
    (tmp_path / "named.tsv").write_text("\n".join(["n\ttext", *rows]))
    figures = []
    for name, flags in (("bare", ["--no-header", "--text-column", 2]), ("named", [])):
        argv = ["eval", "--model", home / "dense", "--data", tmp_path / f"{name}.tsv", "--max-length", 32, *flags]
        result = run_in_process(capsys, *argv, "--json", tmp_path / f"{name}.json")
        assert result.code == 0, result.err
        figures.append(json.loads((tmp_path / f"{name}.json").read_text())["rows"][0])
    assert figures[0]["metrics"] == figures[1]["metrics"]
    assert figures[0]["tokens"] == figures[1]["tokens"] > 500


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "txt"])
def test_what_looks_odd_but_is_good(
    suffix: str, home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """One column, a byte-order mark, line ends in fields, two documents."""
    both = ["one " * 60, "two\u2028lines " * 40]
    lines = {
        "csv": ["text", *(f'"{t}\nend"' for t in both)],
        "tsv": ["text\tn", *(f'"{t}, end"\t3' for t in both)],
        "jsonl": [json.dumps({"text": t}, ensure_ascii=False) for t in both],
        "txt": ["<|endoftext|>".join(both)],
    }[suffix]
    (tmp_path / f"t.{suffix}").write_text("\ufeff" + "\n".join(lines) + "\n")
    argv = convert_argv(home / "dense", tmp_path / f"t.{suffix}", tmp_path / "out", "--router-tokens", 40)
    result = run_in_process(capsys, *argv)
    assert result.code == 0, result.err


# --- the output folder and the disk ----------------------------------------------------------------------------------


def test_output_below_a_file(home: Path, refused, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for output in (tmp_path / "file" / "out", tmp_path / "file"):
        text = refused(*convert_argv(home / "dense", home / "text.txt", output))
        has(text, f"--output-dir {output}", "name a")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS], ids=["permission", "read-only"])
def test_output_in_a_read_only_folder(number: int, convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Patched, because root may write anywhere."""
    make = Path.mkdir

    def mkdir(path: Path, *arguments, **options) -> None:
        if path.is_relative_to(tmp_path):
            raise OSError(number, "Permission denied" if number == errno.EACCES else "Read-only file system", str(path))
        make(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    has(convert(), f"--output-dir {tmp_path}/out", "cannot be written", "name a folder that can be")


def test_the_disk_becomes_read_only(home: Path, convert, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: Path, _: str) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(file))

    monkeypatch.setattr("d2dmoe.pipeline.workdir.write_text", fail)
    has(convert(), "--output-dir", "cannot be written (Read-only file system)")


def test_a_disk_without_room(convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    has(convert(), f"--output-dir {tmp_path}/out", "0.00 GB free", "needs about", "another disk")


def test_a_disk_without_room_keeps_what_can_be_resumed(
    home: Path, convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out.partial").mkdir()
    for name in ("recipe.json", "split.safetensors"):
        (tmp_path / "out.partial" / name).touch()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").touch()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    for flag in ("--resume", "--overwrite"):
        has(convert(flag), "GB free")  # `convert` checks that no file went away


@pytest.mark.parametrize("stage", [*(pytest.param(s, marks=pytest.mark.slow) for s in ("split", "routers")), "save"])
def test_the_disk_fills_up_on_the_way(
    stage: str, home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file
    from transformers import PreTrainedModel

    def full(*arguments, **_) -> None:
        if stage == "save" or stage in str(arguments[1]):
            raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "out.partial" / "x"))
        save_file(*arguments)

    argv = convert_argv(home / "dense", home / "text.txt", tmp_path / "out")
    with monkeypatch.context() as patch:
        if stage == "save":
            patch.setattr(PreTrainedModel, "save_pretrained", full)
        else:
            patch.setattr("d2dmoe.pipeline.workdir.save_file", full)
        result = run_in_process(capsys, *argv)
    assert result.code == 1
    assert "Traceback" not in result.err
    has(result.err.strip().splitlines()[-1], f"d2dmoe: --output-dir {tmp_path}/out: the disk is full", "--resume")
    assert names(tmp_path) == (set() if stage == "split" else {"out.partial"})
    assert not (tmp_path / "out.partial" / "checkpoint").exists()
    assert run_in_process(capsys, *argv, "--resume").code == 0
    assert weights(tmp_path / "out") == weights(home / "first")
    assert names(tmp_path) == {"out"}


@pytest.mark.parametrize("verb", ["convert", "eval", "list", "env"])
def test_figures_that_cannot_be_written(verb: str, home: Path, refused, tmp_path: Path) -> None:
    """Told before the work, not after it."""
    (tmp_path / "file").touch()
    argv = {
        "convert": convert_argv(home / "dense", home / "text.txt", tmp_path / "out"),
        "eval": ["eval", "--model", home / "dense"],
        "list": ["list", "--model", home / "dense"],
        "env": ["env"],
    }[verb]
    for path in (tmp_path / "file" / "f.json", tmp_path):
        has(refused(*argv, "--json", path), f"--json {path}: cannot be written")


# --- recipes ---------------------------------------------------------------------------------------------------------

BAD_RECIPES = {
    "expert: 8": ["unknown recipe key 'expert'", "did you mean experts?"],
    "zzz: 8": ["unknown recipe key 'zzz'", "convert --help"],
    "7: 8": ["unknown recipe key '7'"],
    "seed: [1": ["not valid YAML", "line"],
    "just words": ["not a mapping", "key: value"],
    "- a\n- b": ["not a mapping"],
    "router_width: wide": ["--router-width wide", "whole number"],
    "router_width: 1.5": ["--router-width 1.5", "whole number"],
    "router_width:": ["--router-width None", "whole number"],
    "active: [0.5, 0]": ["--active 0", "above 0"],
    "active: half": ["--active half", "a number"],
    "split: magic": ["--split magic", "weights", "random"],
    "preset: papr": ["--preset papr", "default, paper"],
    "text_column: [a]": ["--text-column ['a']", "text"],
}


@pytest.mark.parametrize("content", BAD_RECIPES)
def test_bad_recipe(content: str, convert, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(content)
    has(convert("--recipe", tmp_path / "r.yaml"), *BAD_RECIPES[content])


def test_a_recipe_that_does_not_exist(convert, tmp_path: Path) -> None:
    text = convert("--recipe", tmp_path / "r.yaml")
    has(text, f"--recipe {tmp_path}/r.yaml", "No such file", "YAML")


def test_a_recipe_that_is_not_text(convert, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00")
    has(convert("--recipe", tmp_path / "r.yaml"), "not valid YAML")


def test_an_empty_recipe_value_may_be_none_where_that_is_the_default(
    home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "r.yaml").write_text(
        yaml.safe_dump({"text_column": None, "revision": None, "model": str(home / "dense")})
    )
    result = run_in_process(capsys, "convert", "--recipe", tmp_path / "r.yaml", "--dry-run")
    assert result.code == 0, result.err


# --- anything else ---------------------------------------------------------------------------------------------------


def test_an_unforeseen_error_is_one_line_unless_debugging(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_, **__) -> None:
        raise KeyError("surprise\nand more")

    monkeypatch.setattr("d2dmoe.pipeline.plan.survey", fail)
    result = run_in_process(capsys, "list", "--model", home / "dense")
    assert result.code == 1
    has(sentence(result.err), "KeyError", "surprise", "--debug")
    with pytest.raises(KeyError, match="surprise"):
        run_in_process(capsys, "list", "--model", home / "dense", "--debug")
