"""What `list` says of a model, `convert` does: all architectures of the zoo, and models that it cannot convert."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from cli_support import BERT, GPT2, convert_argv, names, run_in_process, save_model
from zoo import CASES, tiny

from d2dmoe import hub
from d2dmoe.config import ConvertConfig, UserError
from d2dmoe.discovery import NoInputsError, discover, dummy_inputs, skeleton
from d2dmoe.pipeline.plan import fit_to_data, make_plan

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
TOWERS = {"text_config": {**SIZES, "vocab_size": 257}, "vision_config": {**SIZES, "image_size": 16, "patch_size": 4}}
TINY_BART = {"vocab_size": 99, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48,
             "decoder_ffn_dim": 48, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
             "max_position_embeddings": 64}  # fmt: skip
# Heads that other tests do not have, and models that have no block, take other inputs or cannot be built.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("MambaForCausalLM", {"vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}),
    "resnet": ("ResNetForImageClassification", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}),
    "olmoe": ("OlmoeForCausalLM", {**SIZES, "vocab_size": 257, "num_experts": 4}),
    "fnet": ("FNetForMaskedLM", {**SIZES, "vocab_size": 257}),
    "convnext": ("ConvNextForImageClassification", {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1],
                                                    "image_size": 32}),
    "choices": ("BertForMultipleChoice", BERT),
    "answers": ("BertForQuestionAnswering", BERT),
    "tags": ("BertForTokenClassification", BERT),
    "next sentence": ("BertForNextSentencePrediction", BERT),
    "double heads": ("GPT2DoubleHeadsModel", GPT2),
    "bart classifier": ("BartForSequenceClassification", TINY_BART),  # wants one end token in each row
    "boxes": ("BrosModel", {**SIZES, "vocab_size": 257}),
    "letters": ("CanineModel", {**SIZES}),
    "spectrogram": ("ASTModel", {**SIZES, "max_length": 32, "num_mel_bins": 16}),
    "sounds": ("EncodecModel", {"hidden_size": 16, "num_filters": 4}),
    "series": ("TimeSeriesTransformerModel", {}),  # its default config lacks a length
    "pairs": ("ViltModel", {**SIZES, "vocab_size": 257, "image_size": 16, "patch_size": 4}),
    "speech": ("SpeechT5ForSpeechToText", {"hidden_size": 16, "encoder_layers": 1, "decoder_layers": 1}),
    "detection": ("YolosForObjectDetection", {**SIZES, "image_size": [16, 16], "patch_size": 4,
                                              "num_detection_tokens": 3}),
    "depth": ("DPTForDepthEstimation", {**SIZES, "image_size": 16, "patch_size": 4, "fusion_hidden_size": 8,
                                        "backbone_out_indices": [0, 0, 1, 1], "neck_hidden_sizes": [8, 8, 8, 8]}),
    "patches": ("SegformerForImageClassification", {"image_size": 32}),
    "perceiver": ("PerceiverModel", {"num_latents": 4, "d_latents": 16, "d_model": 16}),
    "two encoders": ("ClapModel", {}),
    "captions": ("GitForCausalLM", {**SIZES, "vocab_size": 257, "vision_config": TOWERS["vision_config"]}),
    "broken": ("BertForMaskedLM", {**BERT, "num_attention_heads": 3}),
    "wrong number": ("GPT2LMHeadModel", {**GPT2, "n_embd": 15}),
    "quantised": ("GPT2LMHeadModel", {**GPT2, "quantization_config": {"quant_method": "gptq", "bits": 4}}),
}  # fmt: skip


def written(name: str, folder: Path) -> Path:
    """The config of a model of the zoo or of `OTHERS`, without weights."""
    if name in OTHERS:
        class_name, sizes = OTHERS[name]
        config = getattr(transformers, class_name).config_class(**sizes)
        config.architectures = [class_name]
    else:
        model = tiny(name)
        config = model.config
        config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    return folder


def converts(folder: Path) -> bool:
    """Whether all checks pass that `convert` makes before it reads weights, on data as the command line gives them."""
    config = transformers.AutoConfig.from_pretrained(folder)
    try:
        plan = make_plan(config, ConvertConfig(model=str(folder)))
        main = plan.model_class.main_input_name
        if main == "pixel_values":
            batch = {"pixel_values": dummy_inputs(plan.skeleton)[main]}
        else:
            ids = torch.randint(5, 90, (3, 20))
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        fit_to_data(plan, batch, "given")
    except UserError:
        return False
    return True


@pytest.mark.parametrize("name", [*(case.name for case in CASES), *OTHERS])
def test_list_says_yes_where_convert_works_and_a_sentence_elsewhere(name: str, capsys, tmp_path: Path) -> None:
    folder = written(name, tmp_path / "model")
    listed = run_in_process(capsys, "list", "--model", folder, "--json", tmp_path / "rows.json")
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"] if (tmp_path / "rows.json").exists() else []
    yes = any(row["converted"] for row in rows)
    assert (listed.code == 0) == yes
    assert ("| yes |" in listed.out) == yes
    dry = run_in_process(capsys, "convert", "--model", folder, "--dry-run")
    assert (dry.code == 0) == yes, dry.err
    for err in (listed.err, dry.err):
        assert "Traceback" not in err
        assert "--debug shows" not in err
        assert err.count("\n") == (not yes), err
        assert yes or err.startswith(f"d2dmoe: --model {folder}: "), err
    assert converts(folder) == yes
    if name not in OTHERS:
        assert yes == (name not in ("clip", "siglip", "whisper", "wav2vec2"))


class Odd(transformers.BertForMaskedLM):
    """A model whose valid inputs no config tells: every row has to end with the end token 2."""

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        """As the class above, for rows that end with 2."""
        if input_ids is not None and not bool((input_ids == 2).any(dim=1).all()):
            raise ValueError("every row wants an end token")
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """The model in a folder, with rows of ids that do or do not end with the end token."""
    monkeypatch.setattr(hub.transformers, "Odd", Odd, raising=False)
    save_model("BertForMaskedLM", tmp_path / "odd", tokenizer=False, **BERT)
    config = json.loads((tmp_path / "odd" / "config.json").read_text())
    (tmp_path / "odd" / "config.json").write_text(json.dumps(config | {"architectures": ["Odd"]}))
    for file, end in (("good.jsonl", [2]), ("bad.jsonl", [])):
        rows = [[3 + (7 * i + j) % 250 for j in range(12)] + end for i in range(80)]
        (tmp_path / file).write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return tmp_path


def test_a_batch_of_the_data_serves_where_no_inputs_can_be_made_up(odd: Path, capsys) -> None:
    config = transformers.AutoConfig.from_pretrained(odd / "odd")
    with pytest.raises(NoInputsError, match=r"Odd does not run on inputs made from its config \(every row wants"):
        discover(skeleton(Odd, config))
    listed = run_in_process(capsys, "list", "--model", odd / "odd")
    assert listed.code == 1
    assert listed.err == (
        f"d2dmoe: --model {odd}/odd: Odd does not run on inputs made from its config (every row wants an end token); "
        f"only convert itself tries a batch of its --data as well\n"
    )
    done = run_in_process(capsys, *convert_argv(odd / "odd", odd / "good.jsonl", odd / "out"))
    assert done.code == 0, done.err
    assert "2 blocks of 8 experts in Odd" in done.err
    rows = json.loads((odd / "out" / "results.json").read_text())["rows"]
    assert rows[-1]["active_fraction"] == 1
    assert rows[-1]["metric"]["value"] == pytest.approx(1, abs=1e-5)  # cosine to the dense model
    verified = run_in_process(capsys, "verify", odd / "out")
    assert verified.code == 0, verified.err
    assert "not compared: Odd does not run on inputs made from its config" in verified.out


def test_neither_the_config_nor_the_data_give_inputs(odd: Path, capsys) -> None:
    refused = run_in_process(capsys, *convert_argv(odd / "odd", odd / "bad.jsonl", odd / "out"))
    assert refused.code == 1
    assert refused.err == (
        f"d2dmoe: --model {odd}/odd: Odd does not run on inputs made from its config (every row wants an end token), "
        f"nor on those of the data (every row wants an end token); give another model or other data\n"
    )
    assert names(odd) == {"odd", "good.jsonl", "bad.jsonl"}
