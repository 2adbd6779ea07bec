"""Train a BERT of 4 million parameters to tell six emotions of sentences apart from scratch: small enough to travel.

    python recipes/train_bert.py --output-dir runs/bert-mini-emotion

Four layers of width 256 with GELU, its own WordPiece vocabulary of 4k, dropout; words of a sentence are left out at
random in training. Interrupted, it goes on from its last saved state when started again with `--resume`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
from minilm_emotion.finetune import LABELS, accuracy, by_length, read
from tokenizers import BertWordPieceTokenizer
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from d2dmoe.config import TrainingConfig
from d2dmoe.training import attention_for, train


def make_tokenizer(texts: list[str], vocabulary: int) -> BertTokenizerFast:
    """Lower-case WordPiece, trained on these texts."""
    pieces = BertWordPieceTokenizer(lowercase=True)
    pieces.train_from_iterator(texts, vocab_size=vocabulary, min_frequency=2, show_progress=False)
    return BertTokenizerFast(vocab=pieces.get_vocab(), do_lower_case=True, model_max_length=64)


def new_model(vocabulary: int, seed: int) -> BertForSequenceClassification:
    """Random weights."""
    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=vocabulary, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4,
            max_position_embeddings=64, type_vocab_size=1, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.1,
            id2label=dict(enumerate(LABELS)), label2id={name: i for i, name in enumerate(LABELS)},
        )
    )  # fmt: skip


def without_words(batch: dict[str, torch.Tensor], share: float, unknown: int, seed: int) -> dict[str, torch.Tensor]:
    """A random share of the tokens unknown; the first one stays."""
    gone = torch.rand(batch["input_ids"].shape, generator=torch.Generator().manual_seed(seed)) < share
    gone[:, 0] = False
    return batch | {"input_ids": batch["input_ids"].masked_fill(gone, unknown)}


def main() -> None:
    """Train, save, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path(os.environ.get("D2DMOE_DATA", "../shared/data")))
    parser.add_argument("--output-dir", type=Path, default=Path("runs/bert-mini-emotion"))
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--leave-out", type=float, default=0.1, help="share of the tokens that a training step hides")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    arguments, started = parser.parse_args(), time.time()
    files = {part: arguments.data_dir / "emotion" / f"{part}.txt" for part in ("train", "val", "test")}
    sentences = files["train"].read_text(encoding="utf-8").splitlines()[1:]
    tokenizer = make_tokenizer([line.rsplit(";", 1)[0] for line in sentences], vocabulary=4096)
    parts = {part: read(file, tokenizer, arguments.batch_size) for part, file in files.items()}
    model = new_model(len(tokenizer), arguments.seed)
    per_epoch = len(parts["train"])
    epochs: dict[int, object] = {}

    def batch_at(number: int) -> dict[str, torch.Tensor]:
        epoch, index = divmod(number, per_epoch)
        if epoch not in epochs:
            epochs.clear()
            epochs[epoch] = by_length(parts["train"], arguments.seed + epoch)
        return without_words(epochs[epoch][index], arguments.leave_out, tokenizer.unk_token_id, number)

    def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        return torch.nn.functional.cross_entropy(logits, batch["labels"], label_smoothing=0.1)

    config = TrainingConfig(
        steps=arguments.epochs * per_epoch, learning_rate=arguments.learning_rate, weight_decay=0.05,
        adam_betas=(0.9, 0.99), bf16=True, seed=arguments.seed, save_every=500, log_every=50,
    )  # fmt: skip
    with attention_for(model, 64, bf16=True):
        log = train(
            model, batch_at, loss, config, name="bert", resume=arguments.resume,
            state_dir=arguments.output_dir.with_name(arguments.output_dir.name + ".state"),
            evaluate=lambda m: {"val_accuracy": accuracy(m, parts["val"])},
        )  # fmt: skip
    model.save_pretrained(arguments.output_dir)
    tokenizer.save_pretrained(arguments.output_dir)
    results = {
        "epochs": arguments.epochs, "minutes": round((time.time() - started) / 60, 1),
        **{f"{part}_accuracy": accuracy(model, parts[part]) for part in ("val", "test")}, "log": log,
    }  # fmt: skip
    (arguments.output_dir / "training.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps({key: value for key, value in results.items() if key != "log"}, indent=1))


if __name__ == "__main__":
    main()
