"""A tokenizer is one that somebody made. No network but a hub on this machine."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from cli_support import BERT, LAYERS, byte_tokenizer, convert_argv, names, run_in_process, run_python, save_model
from hub_mirror import hub_mirror, mirror_environment

from d2dmoe import UserError, hub
from d2dmoe.config import DataConfig
from d2dmoe.data import Batches
from d2dmoe.measure.evaluate import evaluate, prepare
from d2dmoe.vocabulary import special_tokens, token_of

TINY = {"vocab_size": 100} | LAYERS | {"intermediate_size": 32}
# transformers makes up a tokenizer for most of these, and fails for others.
KINDS = {
    "BertForMaskedLM": {}, "RobertaForMaskedLM": {}, "AlbertForMaskedLM": {"embedding_size": 16},
    "ElectraForMaskedLM": {}, "XLMRobertaForMaskedLM": {}, "MPNetForMaskedLM": {}, "DebertaV2ForMaskedLM": {},
    "ModernBertForMaskedLM": {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1,
                              "sep_token_id": 2},
    "EsmForMaskedLM": {}, "GPTNeoXForCausalLM": {}, "LlamaForCausalLM": {}, "Qwen2ForCausalLM": {},
    "T5ForConditionalGeneration": {"d_model": 16, "d_kv": 8},
}  # fmt: skip
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0a1b\nsize 12345\n"
JAPANESE = {"tokenizer_class": "BertJapaneseTokenizer", "word_tokenizer_type": "mecab"}
READS_MODELS = importlib.util.find_spec("sentencepiece") or importlib.util.find_spec("tiktoken")
NEEDS_PACKAGE = "needs a package that is not installed (pip install sentencepiece"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat"]


def folder_of(class_name: str, folder: Path, **config) -> Path:
    """A model folder without weights."""
    kind = getattr(transformers, class_name)
    settings = kind.config_class(**{**TINY, **KINDS.get(class_name, {}), **config})
    settings.architectures = [class_name]
    settings.save_pretrained(folder)
    return folder


def write(folder: Path, **files: str) -> Path:
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)
    return folder


def processor_of(folder: Path):
    return hub.load_processor(str(folder), hub.read_config(str(folder)))


def reason_of(folder: Path) -> str:
    return hub.token_facts(str(folder), hub.read_config(str(folder)))["no_tokenizer"]()


@pytest.mark.parametrize("class_name", KINDS)
def test_nobody_made_this_tokenizer(class_name, tmp_path):
    folder = folder_of(class_name, tmp_path / "model")
    for more in ({}, {"tokenizer_config__json": "{}", "special_tokens_map__json": '{"mask_token": "[MASK]"}'}):
        write(folder, **more)
        assert processor_of(folder) is None
        assert reason_of(folder).startswith("the model comes with no tokenizer (no tokenizer.json or ")


def test_the_missing_files_are_those_of_the_kind(tmp_path):
    folder = folder_of("BertForMaskedLM", tmp_path / "bert")
    assert reason_of(folder) == "the model comes with no tokenizer (no tokenizer.json or vocab.txt)"
    folder = folder_of("RobertaForMaskedLM", tmp_path / "roberta")
    assert reason_of(folder) == "the model comes with no tokenizer (no tokenizer.json or vocab.json and merges.txt)"


def test_tokenizers_that_somebody_made(tmp_path):
    bert = write(folder_of("BertForMaskedLM", tmp_path / "bert"), vocab__txt="\n".join(WORDS))
    assert processor_of(bert)("the cat")["input_ids"] == [2, 5, 6, 3]
    backend = folder_of("RobertaForMaskedLM", tmp_path / "roberta")
    byte_tokenizer().save_pretrained(backend)
    assert len(processor_of(backend)) == 257
    esm = write(folder_of("EsmForMaskedLM", tmp_path / "esm"), vocab__txt="<cls>\n<pad>\n<eos>\n<unk>\nA\n<mask>")
    assert processor_of(esm)("A A")["input_ids"] == [0, 4, 4, 2]
    letters = write(folder_of("T5ForConditionalGeneration", tmp_path / "byt5"),
                    tokenizer_config__json='{"tokenizer_class": "ByT5Tokenizer"}')  # fmt: skip
    assert processor_of(letters)("ab")["input_ids"] == [100, 101, 1]  # bytes need no file


def test_from_the_hub(tmp_path):
    """Files that were fetched count, and those of another model do not."""
    bert = write(folder_of("BertForMaskedLM", tmp_path / "bert"), vocab__txt="\n".join(WORDS))
    bare = folder_of("BertForMaskedLM", tmp_path / "bare")
    code = """
from d2dmoe import hub
for name in ("org/bert", "org/bare"):
    config = hub.read_config(name)
    processor = hub.load_processor(name, config)
    print(processor and processor("the cat")["input_ids"], hub.token_facts(name, config)["no_tokenizer"](), sep="|")
"""
    with hub_mirror({"org/bert": bert, "org/bare": bare}) as endpoint:
        environment = mirror_environment(endpoint, tmp_path / "cache")
        result = run_python("-c", code, cwd=tmp_path, environment=environment)
    assert result.code == 0, result.err
    first, second = result.out.splitlines()
    assert first.startswith("[2, 5, 6, 3]|")
    assert second == "None|the model comes with no tokenizer (no tokenizer.json or vocab.txt)"


@pytest.mark.parametrize("name", ["vocab.txt", "tokenizer.json", "tokenizer_config.json"])
def test_a_pointer_of_git_lfs(tmp_path, name):
    folder = write(folder_of("BertForMaskedLM", tmp_path / "m"), vocab__txt="\n".join(WORDS))
    (folder / name).write_text(POINTER)
    assert processor_of(folder) is None
    assert reason_of(folder) == (
        f"the model's tokenizer cannot be read ({name} is a Git LFS pointer; fetch it with git lfs pull)"
    )


@pytest.mark.parametrize(
    ("class_name", "files", "expected"),
    [
        (
            "LlamaForCausalLM",
            {"tokenizer__model": "\n\x0b"},
            NEEDS_PACKAGE,
        ),
        (
            "T5ForConditionalGeneration",
            {"spiece__model": "\n\x0b"},
            NEEDS_PACKAGE,
        ),
        (
            "BertForMaskedLM",
            {"vocab__txt": "a\nb", "tokenizer_config__json": json.dumps(JAPANESE)},
            "needs a package that is not installed (pip install fugashi)",
        ),
        ("BertForMaskedLM", {"tokenizer__json": '{"version": "1.0",'}, "cannot be read ("),
        ("RobertaForMaskedLM", {"vocab__json": '{"<s>": 0, "a": 1}'}, "cannot be read ("),
    ],
    ids=str,
)
def test_a_tokenizer_that_cannot_be_opened(class_name, files, expected, tmp_path):
    if READS_MODELS and any("model" in name for name in files):
        pytest.skip("a package that reads this file is installed")
    folder = write(folder_of(class_name, tmp_path / "m"), **files)
    assert processor_of(folder) is None
    assert reason_of(folder).startswith(f"the model's tokenizer {expected}")


def test_text_is_refused_and_token_ids_go_on(tmp_path, capsys):
    model = save_model("BertForMaskedLM", tmp_path / "model", tokenizer=False, **BERT)
    (tmp_path / "t.txt").write_text("some words in a line\n" * 300)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, 257, (24,), generator=generator).tolist() for _ in range(200)]
    (tmp_path / "ids.jsonl").write_text("\n".join(json.dumps({"input_ids": row}) for row in rows))
    result = run_in_process(capsys, *convert_argv(model, tmp_path / "t.txt", tmp_path / "out"))
    assert result.code == 1
    assert result.err == (
        f"d2dmoe: --data {tmp_path}/t.txt is text, and the model comes with no tokenizer (no tokenizer.json or "
        f"vocab.txt); give data with an `input_ids` column (jsonl or parquet), or an `image` column for a "
        f"vision model\n"
    )
    result = run_in_process(capsys, *convert_argv(model, tmp_path / "ids.jsonl", tmp_path / "out"))
    assert result.code == 0, result.err
    assert not [name for name in names(tmp_path / "out") if "token" in name or "vocab" in name]
    row = json.loads((tmp_path / "out" / "results.json").read_text())["rows"][0]
    assert row["metric"]["name"] == "cosine_to_dense"  # there is no mask token to measure the loss with


def test_the_mask_token_of_the_config(tmp_path):
    """Without a tokenizer the loss is that of the same token with one."""
    settings = TINY | {"mask_token_id": 32, "pad_token_id": 1}
    torch.manual_seed(0)
    model = transformers.EsmForMaskedLM(transformers.EsmConfig(**settings, initializer_range=0.3)).eval()
    batches = Batches([{"input_ids": [i % 90 + 4 for i in range(s, s + 40)]} for s in range(8)], 4, pad_id=1)
    given = type("Given", (), {"mask_token_id": 32, "all_special_ids": [1, 32]})()
    rows = [evaluate(model, batches, [], tokenizer=tokenizer)[0] for tokenizer in (None, given)]
    assert [row["metric"]["name"] for row in rows] == ["masked_lm", "masked_lm"]
    assert rows[0]["metrics"] == rows[1]["metrics"]
    assert math.isfinite(rows[0]["metric"]["value"])


def test_ids_that_are_not_really_there():
    xlm = transformers.XLMConfig()  # mask_token_id is 0 by default, as is bos_token_id
    assert special_tokens(xlm, None).mask_token_id is None
    bert = transformers.BertConfig(vocab_size=50, pad_token_id=3)
    assert (token_of(bert, "pad"), token_of(bert, "mask")) == (3, None)
    assert token_of(transformers.LlamaConfig(vocab_size=50, pad_token_id=-1), "pad") is None
    assert token_of(transformers.GPT2Config(vocab_size=50, bos_token_id=50256), "bos") is None
    beyond = type("Given", (), {"mask_token_id": 60, "all_special_ids": [60]})()
    assert special_tokens(bert, beyond).mask_token_id is None


@pytest.mark.parametrize("end", [50256, 7])
def test_a_short_text_is_classified_the_same_beside_a_long_one(tmp_path, end):
    """A decoder classifies by its last token before the padding, so the padding is that of its config."""
    sizes = {"vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "eos_token_id": end}
    save_model("GPT2ForSequenceClassification", tmp_path / "m", False, **sizes)
    rows = [{"input_ids": [9, 8, 5], "label": 0}, {"input_ids": [3, 4, 5, 6, 8, 9, 11], "label": 1}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    subject = prepare(str(tmp_path / "m"), DataConfig(data=str(tmp_path / "t.jsonl"), batch_size=2), [])
    model = hub.load_model(str(tmp_path / "m"), subject.config)
    both = model(**{k: v for k, v in subject.batches[0].items() if k != "labels"}).logits
    alone = torch.cat([model(torch.tensor([row["input_ids"]])).logits for row in rows])
    torch.testing.assert_close(both, alone)


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_a_tokenizer_larger_than_the_model(tmp_path, suffix):
    model = save_model("GPT2LMHeadModel", tmp_path / "m", vocab_size=70, n_embd=16, n_layer=1, n_head=2)
    text = "low ids: !!! " * 40 + "~ and a high one " * 3
    path = tmp_path / f"t.{suffix}"
    path.write_text(text if suffix == "txt" else json.dumps({"text": "!" * 20}) + "\n" + json.dumps({"text": text}))
    line = 1 if suffix == "txt" else 2
    with pytest.raises(UserError) as error:
        prepare(str(model), DataConfig(data=str(path), max_length=16), [])
    assert f"--data {path}, line {line}: the tokenizer gives token id" in str(error.value)
    assert "the model's vocabulary has 70 tokens" in str(error.value)


def test_ids_out_of_range_name_their_row(tmp_path):
    model = save_model("GPT2LMHeadModel", tmp_path / "m", False, vocab_size=70, n_embd=16, n_layer=1, n_head=2)
    (tmp_path / "t.jsonl").write_text('{"input_ids": [1, 69]}\n{"input_ids": [70, 1]}\n')
    with pytest.raises(UserError, match=r"t\.jsonl, line 2: token id 70 is out of range.*\(0 to 69\)"):
        prepare(str(model), DataConfig(data=str(tmp_path / "t.jsonl")), [])


def test_padding_in_the_data_does_not_change_the_perplexity(tmp_path):
    model = save_model("GPT2LMHeadModel", tmp_path / "m", False, vocab_size=70, n_embd=16, n_layer=1, n_head=2)
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(1, 70, (n,), generator=generator).tolist() for n in (9, 5, 12, 7)]
    padded = [
        {"input_ids": r + [0] * (12 - len(r)), "attention_mask": [1] * len(r) + [0] * (12 - len(r))} for r in rows
    ]
    found = []
    for name, written in (("plain", [{"input_ids": r} for r in rows]), ("padded", padded)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, written)))
        found.append(prepare(str(model), DataConfig(data=str(tmp_path / f"{name}.jsonl")), []).rows([])[0])
    assert found[0]["metrics"] == found[1]["metrics"]
    assert found[0]["tokens"] == found[1]["tokens"]


def test_a_copy_without_its_tokenizer_tells_it_at_once(tmp_path):
    model = save_model("BertForMaskedLM", tmp_path / "m", **BERT)
    shutil.copytree(model, tmp_path / "copy", ignore=shutil.ignore_patterns("tokenizer*"))
    assert processor_of(model) is not None
    assert processor_of(tmp_path / "copy") is None
