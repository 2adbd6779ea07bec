"""The regulariser in trainers: exact under accumulation, checkpointing and adapters, in classes that are not ours."""

import importlib.util

import pytest
import torch
from cli_support import byte_tokenizer
from transformers import MambaConfig, MambaForCausalLM, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer

from d2dmoe.config import UserError
from d2dmoe.sparsify import SparsifyTrainer, SparsityConfig, add_sparsity
from sparsify.support import arguments, collate, samples, tiny, weights

EVERY = ["GPT2LMHeadModel", "LlamaForCausalLM", "BertForSequenceClassification", "T5ForConditionalGeneration",
         "ViTForImageClassification"]  # fmt: skip

ACTIVATION_KEYS = {"GPT2LMHeadModel": "activation_function", "BertForSequenceClassification": "hidden_act"}


def trained(name, folder, *, sparsity=None, model=None, **more):
    model = model or tiny(name)
    settings = {k: more.pop(k) for k in ("teacher", "task", "compute_loss_func", "distillation") if k in more}
    trainer = SparsifyTrainer(
        model=model, args=arguments(folder, **more), train_dataset=samples(name, 24),
        data_collator=lambda items: collate(name, items),
        sparsity=sparsity or SparsityConfig(alpha=0.05, alpha_schedule="constant", regulariser="hoyer", locality=0.1),
        **settings,
    )  # fmt: skip
    trainer.train()
    return trainer, weights(model)


def assert_same(ours, theirs):
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", EVERY)
def test_accumulating_small_batches_is_one_large_batch(name, tmp_path):
    whole_trainer, whole = trained(name, tmp_path)
    parts_trainer, parts = trained(
        name, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4
    )  # rows have different lengths, so the parts do not count alike
    assert_same(parts, whole)
    for ours, theirs in zip(parts_trainer.state.log_history[:1], whole_trainer.state.log_history[:1], strict=True):
        assert ours["task_loss"] == pytest.approx(theirs["task_loss"], rel=1e-5)
        assert ours["sparsity_loss"] == pytest.approx(theirs["sparsity_loss"], rel=1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_gradient_checkpointing_changes_nothing(name, tmp_path):
    _, plain = trained(name, tmp_path)
    _, again = trained(
        name, tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    assert_same(again, plain)


def test_reentrant_checkpointing_is_refused(tmp_path):
    with pytest.raises(UserError, match="use_reentrant"):
        trained("GPT2LMHeadModel", tmp_path, gradient_checkpointing=True,
                gradient_checkpointing_kwargs={"use_reentrant": True})  # fmt: skip


def test_one_step_is_the_gradient_of_task_loss_and_penalty(tmp_path):
    name = "BertForSequenceClassification"
    model = tiny(name).train()
    batch, hidden = collate(name, samples(name, 24)[:8]), []
    for layer in model.bert.encoder.layer:
        layer.intermediate.register_forward_hook(lambda m, a, out: hidden.append(out[batch["attention_mask"].bool()]))
    output = model(**batch)
    penalty = sum((a.abs().sum(-1) ** 2 / (a**2).sum(-1)).mean() for a in hidden) / 2
    (output.loss + 0.01 * penalty).backward()
    wanted = {k: p.detach() - 0.1 * p.grad for k, p in model.named_parameters()}
    sparsity = SparsityConfig(alpha=0.01, alpha_schedule="constant")
    trainer, found = trained(name, tmp_path, sparsity=sparsity, max_steps=1)
    assert_same(wanted, found)
    log = trainer.state.log_history[0]
    assert log["sparsity_loss"] == pytest.approx(float(penalty), rel=1e-5)
    assert log["loss"] == pytest.approx(log["task_loss"] + 0.01 * log["sparsity_loss"], rel=1e-4)


def test_regulariser_none_is_the_plain_trainer(tmp_path):
    name = "GPT2LMHeadModel"
    _, ours = trained(name, tmp_path, sparsity=SparsityConfig(regulariser="none"))
    model = tiny(name)
    Trainer(model, arguments(tmp_path), train_dataset=samples(name, 24),
            data_collator=lambda items: collate(name, items)).train()  # fmt: skip
    assert_same(ours, weights(model))


def test_alpha_follows_its_schedule_and_activations_get_sparser(tmp_path):
    sparsity = SparsityConfig(alpha=1.0, regulariser="hoyer")
    model = tiny("GPT2LMHeadModel", activation_function="relu")
    more = {"max_steps": 20, "learning_rate": 0.03, "optim": "adamw_torch"}
    trainer, _ = trained("GPT2LMHeadModel", tmp_path, sparsity=sparsity, model=model, **more)
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["alpha"] for row in rows[:11]] == pytest.approx([i / 10 for i in range(11)])
    assert rows[-1]["sparsity_loss"] < 0.5 * rows[0]["sparsity_loss"]
    assert rows[-1]["nonzero"] < 0.8 * rows[0]["nonzero"]
    assert 0 < rows[0]["near_zero"] < 1


def test_adapters_train_alone_and_merge_to_the_same_model(tmp_path):
    from peft import LoraConfig, get_peft_model

    name = "LlamaForCausalLM"
    before = weights(tiny(name))
    model = get_peft_model(tiny(name), LoraConfig(r=2, lora_alpha=8, target_modules="all-linear"))
    model = model.to(torch.float64)
    trainer, _ = trained(name, tmp_path, model=model, learning_rate=1.0)
    trainer.sparsity.term.remove()
    batch = collate(name, samples(name, 4))
    with torch.no_grad():
        unmerged = model.eval()(**batch).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, unmerged)
    after = weights(merged)
    assert not torch.equal(after["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


def test_distillation_alone_needs_no_labels_and_is_the_divergence(tmp_path):
    name = "BertForSequenceClassification"
    teacher, model = tiny(name).eval(), tiny(name, hidden_act="relu")
    batch = collate(name, samples(name, 24)[:8])
    with torch.no_grad():
        logs, wanted = (m(**batch).logits.log_softmax(-1) for m in (model, teacher))
        kl = (wanted.exp() * (wanted - logs)).sum(-1).mean()
    trainer, _ = trained(name, tmp_path, model=model, teacher=teacher, task=False, max_steps=60, learning_rate=0.05,
                         sparsity=SparsityConfig(alpha=0.0))  # fmt: skip
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert rows[0]["task_loss"] == 0
    assert rows[0]["distillation_loss"] == pytest.approx(float(kl), rel=1e-4)
    assert rows[0]["loss"] == pytest.approx(float(kl), rel=1e-4)
    assert rows[-1]["distillation_loss"] < 0.5 * rows[0]["distillation_loss"]


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "BertForSequenceClassification", "T5ForConditionalGeneration"])
def test_distillation_under_accumulation(name, tmp_path):
    found = []
    for more in ({}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}):
        student = tiny(name, **{"dense_act_fn" if name.startswith("T5") else ACTIVATION_KEYS[name]: "relu"})
        found.append(trained(name, tmp_path, teacher=tiny(name).eval(), model=student, distillation=0.7, **more)[1])
    assert_same(*found)


def test_a_loss_of_ones_own(tmp_path):
    name = "BertForSequenceClassification"

    def loss(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    _, own = trained(
        name, tmp_path, compute_loss_func=loss, per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    _, usual = trained(name, tmp_path)
    assert_same(own, usual)


def test_added_to_a_trainer_that_somebody_has(tmp_path):
    name = "LlamaForCausalLM"
    options = {"regulariser": "density", "alpha": 0.3, "alpha_schedule": "constant"}
    model = tiny(name)
    trainer = Trainer(model, arguments(tmp_path), train_dataset=samples(name, 24),
                      data_collator=lambda items: collate(name, items))  # fmt: skip
    add_sparsity(trainer, **options)
    trainer.train()
    _, ours = trained(name, tmp_path, sparsity=SparsityConfig(**options))
    assert_same(weights(model), ours)
    assert {"task_loss", "sparsity_loss", "alpha", "nonzero", "near_zero"} <= set(trainer.state.log_history[0])


def test_added_to_a_seq2seq_trainer(tmp_path):
    name = "T5ForConditionalGeneration"
    settings = arguments(tmp_path).to_dict() | {"predict_with_generate": True}
    settings = {k: v for k, v in settings.items() if k in Seq2SeqTrainingArguments.__dataclass_fields__}
    model = tiny(name)
    trainer = Seq2SeqTrainer(
        model, Seq2SeqTrainingArguments(**settings), train_dataset=samples(name, 24),
        eval_dataset=samples(name, 4), data_collator=lambda items: collate(name, items),
    )  # fmt: skip
    add_sparsity(trainer, SparsityConfig(alpha=0.05, alpha_schedule="constant", regulariser="hoyer", locality=0.1))
    trainer.train()
    assert_same(weights(model), trained(name, tmp_path)[1])
    plain = float(trainer.evaluate()["eval_loss"])  # the task alone
    with torch.no_grad():
        assert plain == pytest.approx(float(model(**collate(name, samples(name, 4))).loss), rel=1e-4)


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
def test_added_to_trls_sft_trainer(tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    name = "GPT2LMHeadModel"
    settings = arguments(tmp_path, remove_unused_columns=True).to_dict()
    settings = {k: v for k, v in settings.items() if k in SFTConfig.__dataclass_fields__ and v is not None}
    model = tiny(name, torch.float32)
    trainer = SFTTrainer(
        model, args=SFTConfig(**settings | {"max_length": 16, "max_steps": 9}), processing_class=byte_tokenizer(),
        train_dataset=Dataset.from_list(samples(name, 24)),
    )  # fmt: skip
    add_sparsity(trainer, alpha=0.05, alpha_schedule="constant")
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert rows[-1]["sparsity_loss"] < rows[0]["sparsity_loss"]


def test_a_model_without_blocks_a_converted_one_and_a_loss_that_explodes(tmp_path):
    mamba = MambaForCausalLM(MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(UserError, match="no feed-forward block found in MambaForCausalLM"):
        add_sparsity(Trainer(mamba, arguments(tmp_path)))
    model = tiny("GPT2LMHeadModel")
    model.config.quantization_config = {"quant_method": "d2dmoe"}
    with pytest.raises(UserError, match="before that, on the dense model"):
        SparsifyTrainer(model=model, args=arguments(tmp_path))
    model = tiny("GPT2LMHeadModel")
    model.transformer.h[1].mlp.c_fc.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"step 1: the (task loss|sparsity penalty) became nan"):
        trained("GPT2LMHeadModel", tmp_path, model=model)
    with pytest.raises(UserError, match=r"step 2: the task loss became (nan|inf)"):
        trained("GPT2LMHeadModel", tmp_path, learning_rate=1e200, max_steps=3)
