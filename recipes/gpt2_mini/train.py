"""Train `checkpoints/gpt2-mini` from scratch: a GPT-2 of 6 layers with its own 8k byte-level BPE.

    python recipes/gpt2_mini/train.py --data-dir ../shared/data --output-dir checkpoints/gpt2-mini

Text: WikiText-2 train, the first of the two TinyStories files, and the calibration part of the built-in text. Held
out: WikiText-2 valid, the second TinyStories file, and the held-out part of the built-in text. Interrupted, it goes on
from its last saved state when started again with `--resume`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

from d2dmoe.config import DataConfig, TrainingConfig
from d2dmoe.data import Batches, make_batches, read_documents
from d2dmoe.training import train

END = "<|endoftext|>"
SOURCES = {
    "WikiText-2": (("wikitext2/train.txt", "all"), ("wikitext2/valid.txt", "all")),
    "TinyStories": (("tinystories/stories_a.txt", "all"), ("tinystories/stories_b.txt", "all")),
    "built-in text": (("builtin", "calibration"), ("builtin", "held_out")),
}


def documents(data_dir: Path, source: str, part: str) -> list[dict]:
    """Documents of one source; relative paths are below `data_dir`."""
    return read_documents(source if source == "builtin" else str(data_dir / source), part)


def make_tokenizer(texts: list[str], vocabulary: int) -> GPT2TokenizerFast:
    """A byte-level BPE trained on the training text."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=vocabulary, special_tokens=[END], show_progress=False)
    state = json.loads(bpe.to_str())["model"]
    return GPT2TokenizerFast(
        vocab=state["vocab"], merges=[tuple(m) for m in state["merges"]], eos_token=END, bos_token=END, unk_token=END
    )


@torch.no_grad()
def held_out_loss(model: GPT2LMHeadModel, batches: Batches, limit: int | None = None) -> float:
    """Mean loss in nats per token over full sequences."""
    losses = [
        model(input_ids=b["input_ids"], labels=b["input_ids"]).loss.item() * len(b["input_ids"])
        for b in list(batches)[:limit]
    ]
    rows = sum(len(b["input_ids"]) for b in list(batches)[:limit])
    return sum(losses) / rows


def new_model(vocabulary: int, seed: int) -> GPT2LMHeadModel:
    """Six layers of width 256 with random weights, without dropout."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary, n_positions=256, n_embd=256, n_layer=6, n_head=4, n_inner=1024,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def by_epoch(pool: Batches, seed: int) -> Callable[[int], dict[str, torch.Tensor]]:
    """Batches by number, shuffled anew in each epoch; the last batch of an epoch is left out where it is not full."""
    per_epoch = len(pool.items) // pool.batch_size
    shuffled = lru_cache(maxsize=1)(lambda epoch: pool.shuffled(seed=seed + epoch))
    return lambda number: shuffled(number // per_epoch)[number % per_epoch]


def fit(
    model: GPT2LMHeadModel, pool: Batches, held_out: dict[str, Batches], arguments: argparse.Namespace
) -> list[dict[str, float]]:
    """Train on the pool; returns the log."""
    step_model = torch.compile(model) if arguments.compile else model
    config = TrainingConfig(
        steps=arguments.steps, learning_rate=arguments.learning_rate, weight_decay=0.1, bf16=True, seed=arguments.seed,
        save_every=200, log_every=50,
    )  # fmt: skip
    return train(
        model, by_epoch(pool, arguments.seed),
        lambda _, b: step_model(input_ids=b["input_ids"], labels=b["input_ids"]).loss, config, name="gpt2-mini",
        state_dir=arguments.output_dir.with_name(arguments.output_dir.name + ".state"), resume=arguments.resume,
        evaluate=lambda m: {name: held_out_loss(m, b, limit=8) for name, b in held_out.items()},
    )  # fmt: skip


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path(os.environ.get("D2DMOE_DATA", "../shared/data")))
    parser.add_argument("--output-dir", type=Path, default=Path("checkpoints/gpt2-mini"))
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="torch.compile the training step (needs a C++ compiler)")
    parser.add_argument("--resume", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Train, save, measure."""
    arguments, started = parse(), time.time()
    data = DataConfig(max_length=256, batch_size=arguments.batch_size)
    texts = {name: documents(arguments.data_dir, *sources[0]) for name, sources in SOURCES.items()}
    tokenizer = make_tokenizer([d["text"] for rows in texts.values() for d in rows], vocabulary=8192)
    training = [make_batches(rows, tokenizer, data, packed=True) for rows in texts.values()]
    held_out = {
        name: make_batches(documents(arguments.data_dir, *sources[1]), tokenizer, data, packed=True)
        for name, sources in SOURCES.items()
    }
    print({name: b.tokens for name, b in zip(SOURCES, training, strict=True)}, "training tokens", flush=True)
    model = new_model(len(tokenizer), arguments.seed)
    pool = Batches([item for batches in training for item in batches.items], data.batch_size)
    log = fit(model, pool, held_out, arguments)
    model.to(torch.bfloat16).save_pretrained(arguments.output_dir)
    tokenizer.save_pretrained(arguments.output_dir)
    reloaded = GPT2LMHeadModel.from_pretrained(arguments.output_dir, dtype=torch.float32)
    results = {
        "command": "python recipes/gpt2_mini/train.py" + (" --compile" if arguments.compile else ""),
        "steps": arguments.steps,
        "tokens_seen": arguments.steps * data.batch_size * data.max_length,
        "minutes": round((time.time() - started) / 60, 1),
        "held_out_loss_nats": {name: round(held_out_loss(reloaded, b), 4) for name, b in held_out.items()},
        "log": log,
    }
    (arguments.output_dir / "training.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps({k: v for k, v in results.items() if k != "log"}, indent=1))


if __name__ == "__main__":
    main()
