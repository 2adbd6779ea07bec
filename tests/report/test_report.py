"""What is written for people: the model card and the names in it."""

from __future__ import annotations

import pytest
import transformers

from d2dmoe.report import auto_class, portable

AUTO = {
    "GPT2LMHeadModel": "AutoModelForCausalLM",
    "BertForMaskedLM": "AutoModelForMaskedLM",
    "T5ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "BertForSequenceClassification": "AutoModelForSequenceClassification",
    "ViTForImageClassification": "AutoModelForImageClassification",
    "BertForPreTraining": "AutoModelForPreTraining",
}


@pytest.mark.parametrize("name", AUTO)
def test_auto_class_of_the_task(name):
    assert auto_class(getattr(transformers, name)) == AUTO[name]


PORTABLE = {
    "/home/someone/models/gpt2": "gpt2",
    "/home/someone/models/gpt2/": "gpt2",
    "~/texts/a.txt": "a.txt",
    "../beside/a.txt": "a.txt",
    "--model=/home/someone/gpt2": "--model=gpt2",
    "--json=out/f.json": "--json=out/f.json",
    "checkpoints/gpt2-mini": "checkpoints/gpt2-mini",
    "org/name": "org/name",
    "builtin": "builtin",
    "--experts": "--experts",
    "0.25,0.5": "0.25,0.5",
    "": "",
}


@pytest.mark.parametrize("word", PORTABLE)
def test_of_paths_of_this_machine_the_last_part_stays(word):
    assert portable(word) == PORTABLE[word]


def test_values_that_are_no_text_stay():
    assert [portable(value) for value in (None, 3, [0.5])] == [None, 3, [0.5]]
