"""Tiny models, texts and runs for the tests of the command line; as a script, runs that are killed on purpose."""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

# 501 router steps, so that one training state is saved on the way.
SMALL = (
    "--experts", "8", "--router-width", "16", "--router-tokens", "2004", "--router-batch", "4", "--max-length", "32",
    "--calibration-tokens", "1000", "--eval-tokens", "500",
)  # fmt: skip
WORDS = ("the", "router", "sends", "every", "token", "to", "few", "experts", "and", "leaves", "most", "at", "rest")
TEXT_SIZES = {"vocab_size": 257, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
GPT2 = TEXT_SIZES | {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "n_inner": 64}
LAYERS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
BERT = TEXT_SIZES | LAYERS | {"intermediate_size": 48}


def save_model(class_name: str, folder: Path, tokenizer: bool = True, **config: object) -> Path:
    """A random model of this class, with weights large enough that its blocks matter, and a byte tokenizer."""
    torch.manual_seed(7)
    kind = getattr(transformers, class_name)
    kind(kind.config_class(**config, initializer_range=0.3)).save_pretrained(folder)
    if tokenizer:
        byte_tokenizer().save_pretrained(folder)
    return folder


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per byte, and an end-of-text token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {c: i for i, c in enumerate(["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **end)


def sentences(count: int, seed: int = 0) -> list[str]:
    """Random sentences."""
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=12)) + "." for _ in range(count)]


@dataclass(frozen=True)
class Result:
    """How a run of the command ended."""

    code: int
    out: str
    err: str


def run_in_process(capsys: object, *argv: object) -> Result:
    """`d2dmoe …` in this process."""
    from d2dmoe.cli import main

    capsys.readouterr()
    try:
        code = main([str(a) for a in argv])
    except SystemExit as stop:
        code = stop.code
    return Result(code, *capsys.readouterr())


def run_python(*argv: object, cwd: Path, environment: Mapping[str, str] = os.environ, timeout: int = 120) -> Result:
    """`python …` as a process of its own, on one thread."""
    done = subprocess.run(
        [sys.executable, *map(str, argv)],
        cwd=cwd,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def convert_argv(model: Path | str, data: Path | str, output: Path | str, *more: object) -> list[str]:
    """Arguments of a conversion of one or two seconds."""
    return [str(a) for a in ("convert", "--model", model, "--data", data, "--output-dir", output, *SMALL, *more)]


def weights(folder: Path) -> bytes:
    """The checkpoint's tensors, byte for byte."""
    return (folder / "model.safetensors").read_bytes()


def names(folder: Path) -> set[str]:
    """What lies in a folder."""
    return {path.name for path in folder.iterdir()}


def run_killed(jobs: Mapping[str, list[str]], cwd: Path) -> None:
    """Run commands that are killed as soon as something whose path ends like the key has got its final name.

    What torch pickles in the middle of a training state counts as well: `optimizer.pt`.
    """
    result = run_python(__file__, json.dumps(jobs), cwd=cwd, timeout=240)
    assert result.code == 0, result.err
    assert json.loads(result.out.splitlines()[-1]) == dict.fromkeys(jobs, -signal.SIGKILL), result.err


def _killed(ending: str, argv: list[str]) -> int:
    """Fork, run, be killed; forked, because importing the libraries takes longer than the run."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def deadly(write: Callable) -> Callable:
        def call(what: object, target: object, **more: object) -> None:
            write(what, target, **more)
            if str(target).endswith(ending):
                os.kill(os.getpid(), signal.SIGKILL)

        return call

    os.replace, torch.save = deadly(os.replace), deadly(torch.save)
    from d2dmoe.cli import main

    os._exit(main(argv))


if __name__ == "__main__":
    for library in ("accelerate", "datasets", "sklearn.cluster", "d2dmoe.pipeline.convert"):
        importlib.import_module(library)
    print(json.dumps({ending: _killed(ending, argv) for ending, argv in json.loads(sys.argv[1]).items()}))
