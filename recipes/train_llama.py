"""Train a Llama-style model of 3 million parameters on TinyStories: the dense base of `recipes/llama_tinystories`.

    python recipes/train_llama.py --output-dir runs/llama-tinystories

Five layers of width 192, SwiGLU of 512, grouped queries, its own 4k byte-level BPE. Text: the second of the two
TinyStories files; held out: the first. Interrupted, it goes on from its last saved state when started again with
`--resume`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
from gpt2_mini.train import by_epoch, held_out_loss, make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from d2dmoe.config import DataConfig, TrainingConfig
from d2dmoe.data import make_batches, read_documents
from d2dmoe.training import train

TEXT, HELD_OUT = "stories_b.txt", "stories_a.txt"


def new_model(vocabulary: int, seed: int) -> LlamaForCausalLM:
    """Random weights."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=192, intermediate_size=512, num_hidden_layers=5, num_attention_heads=6,
            num_key_value_heads=3, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=0,
            eos_token_id=0,
        )
    )  # fmt: skip


def main() -> None:
    """Train, save, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path(os.environ.get("D2DMOE_DATA", "../shared/data")))
    parser.add_argument("--output-dir", type=Path, default=Path("runs/llama-tinystories"))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    arguments, started = parser.parse_args(), time.time()
    data = DataConfig(max_length=256, batch_size=arguments.batch_size)
    texts, others = (read_documents(str(arguments.data_dir / "tinystories" / f), "all") for f in (TEXT, HELD_OUT))
    tokenizer = make_tokenizer([d["text"] for d in texts], vocabulary=4096)
    pool, held_out = (make_batches(rows, tokenizer, data, packed=True) for rows in (texts, others))
    print(f"{pool.tokens} training tokens, {held_out.tokens} held out", flush=True)
    model = new_model(len(tokenizer), arguments.seed)
    config = TrainingConfig(
        steps=arguments.steps, learning_rate=arguments.learning_rate, weight_decay=0.1, bf16=True, seed=arguments.seed,
        save_every=200, log_every=50,
    )  # fmt: skip
    log = train(
        model, by_epoch(pool, arguments.seed),
        lambda m, b: m(input_ids=b["input_ids"], labels=b["input_ids"]).loss, config, name="llama",
        state_dir=arguments.output_dir.with_name(arguments.output_dir.name + ".state"), resume=arguments.resume,
        evaluate=lambda m: {"held_out": held_out_loss(m, held_out, limit=8)},
    )  # fmt: skip
    model.save_pretrained(arguments.output_dir)
    tokenizer.save_pretrained(arguments.output_dir)
    results = {
        "steps": arguments.steps, "minutes": round((time.time() - started) / 60, 1),
        "held_out_loss_nats": round(held_out_loss(model, held_out, limit=64), 4), "log": log,
    }  # fmt: skip
    (arguments.output_dir / "training.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps({key: value for key, value in results.items() if key != "log"}, indent=1))


if __name__ == "__main__":
    main()
