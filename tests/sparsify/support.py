"""Tiny models and rows of different lengths for the tests of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

SIZES = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BODY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TINY = {
    "GPT2LMHeadModel": SIZES | {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "resid_pdrop": 0.0,
                                "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "LlamaForCausalLM": SIZES | BODY | {"max_position_embeddings": 32},
    "Phi3ForCausalLM": SIZES | BODY | {"max_position_embeddings": 32},
    "BertForSequenceClassification": SIZES | BODY | DROPOUT | {"max_position_embeddings": 32, "num_labels": 3},
    "T5ForConditionalGeneration": SIZES | {"d_model": 16, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 2,
                                           "dropout_rate": 0.0, "feed_forward_proj": "gated-gelu",
                                           "decoder_start_token_id": 0},
    "ViTForImageClassification": BODY | DROPOUT | {"image_size": 16, "patch_size": 4, "num_labels": 3},
}  # fmt: skip


def tiny(name: str, dtype: torch.dtype = torch.float64, **more: Any) -> nn.Module:
    """The same random model every time."""
    torch.manual_seed(5)
    kind = getattr(transformers, name)
    return kind(kind.config_class(**TINY[name] | {"initializer_range": 0.3} | more)).to(dtype)


def rows(count: int, seed: int = 0, shortest: int = 3, longest: int = 9) -> list[list[int]]:
    """Token ids of different lengths."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=g).tolist()
    return [torch.randint(3, 61, (n,), generator=g).tolist() for n in lengths]


def collate(name: str, items: list[dict], dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """A padded batch with labels, as the model's class wants it."""
    if "pixels" in items[0]:
        return {
            "pixel_values": torch.stack([item["pixels"] for item in items]).to(dtype),
            "labels": torch.tensor([item["label"] for item in items]),
        }
    pieces = [torch.tensor(item["input_ids"]) for item in items]
    ids = nn.utils.rnn.pad_sequence(pieces, batch_first=True)
    mask = (ids != 0).long()
    if "label" in items[0]:
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([item["label"] for item in items])}
    if name.startswith("T5"):
        targets = [torch.tensor(item["input_ids"][: 2 + len(item["input_ids"]) // 2]) for item in items]
        labels = nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-100)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def samples(name: str, count: int) -> list[dict]:
    """Items that `collate` takes."""
    if name.startswith("ViT"):
        g = torch.Generator().manual_seed(0)
        return [{"pixels": torch.randn(3, 16, 16, generator=g), "label": i % 3} for i in range(count)]
    return [
        {"input_ids": row, **({"label": i % 3} if "Classification" in name else {})}
        for i, row in enumerate(rows(count))
    ]


def arguments(folder: Path, **more: Any) -> transformers.TrainingArguments:
    """A few steps of plain SGD, so that differences of gradients show in the weights as they are."""
    settings = {
        "max_steps": 1, "per_device_train_batch_size": 8, "learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "use_cpu": True, "remove_unused_columns": False,
        "disable_tqdm": True, "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": False, "seed": 0,
    } | more  # fmt: skip
    return transformers.TrainingArguments(str(folder), **settings)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy."""
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def sparsify_argv(model: Path, data: Path, output: Path, *more: object, steps: int = 12) -> list[str]:
    """Arguments of a training of a second, with a training state every four steps."""
    argv = ["sparsify", "--model", model, "--data", data, "--output-dir", output, "--max-steps", steps]
    argv += ["--save-steps", 4, "--batch-size", 4, "--max-length", 32, "--eval-tokens", 500, "--device", "cpu"]
    return [str(a) for a in (*argv, *more)]
