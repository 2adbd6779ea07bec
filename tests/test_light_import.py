"""`import d2dmoe` and the help of the command are light, and the loader is there whatever was imported first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import randomise_routers
from transformers import GPT2Config, GPT2LMHeadModel

import d2dmoe
from d2dmoe.config import D2DMoEConfig
from d2dmoe.discovery import discover
from d2dmoe.moe.loader import attach

HEAVY = "heavy = {'torch', 'transformers', 'numpy', 'datasets', 'sklearn'} & set(sys.modules)\nassert not heavy, heavy"
VERBS = ("convert", "sparsify", "eval", "bench", "report", "verify", "push", "export", "list", "env")


def run(code: str, *arguments: object) -> str:
    """What a new process prints."""
    command = [sys.executable, "-c", f"import sys\n{code}", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted GPT-2 whose activation transformers does not know."""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, activation_function="fatrelu_0.05")
    model = GPT2LMHeadModel(config).eval()
    blocks = discover(model).blocks
    for block in blocks:
        block.experts = 8
    record = D2DMoEConfig(blocks, "topk", "zero", router_width=8)
    attach(model, record, [torch.arange(block.width) for block in blocks])
    randomise_routers(model)
    folder = tmp_path_factory.mktemp("light") / "model"
    model.save_pretrained(folder)
    return folder


def test_importing_the_package_imports_nothing_heavy():
    run(f"import d2dmoe\nd2dmoe.__version__, d2dmoe.ConvertConfig, d2dmoe.UserError, dir(d2dmoe)\n{HEAVY}")


def test_every_public_name_is_there():
    assert set(d2dmoe.__all__) <= set(dir(d2dmoe))
    assert all(getattr(d2dmoe, name) is not None for name in d2dmoe.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'convrt'"):
        d2dmoe.convrt  # noqa: B018


HELP = """
from d2dmoe.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert not end.code
"""


@pytest.mark.parametrize("words", [["--help"], ["--version"], *([verb, "--help"] for verb in VERBS)], ids=" ".join)
def test_help_needs_nothing_heavy(words):
    assert run(HELP + HEAVY, *words)


LOAD = """
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(*sorted({type(m).__name__ for m in model.modules()} & {"DynamicFFN", "FATReLU"}))
"""
ORDERS = {
    "ours first": "import d2dmoe",
    "theirs first": "from transformers import AutoModelForCausalLM\nimport transformers.quantizers.auto\nimport d2dmoe",
    "theirs begun": "import transformers\nimport d2dmoe",
    "ours twice": "import d2dmoe, importlib\nimportlib.reload(d2dmoe)",
    "the loader itself": "import d2dmoe.moe.loader",
}


@pytest.mark.parametrize(
    "order",
    [
        pytest.param(o, marks=pytest.mark.slow if o in ("ours twice", "the loader itself", "theirs begun") else ())
        for o in ORDERS
    ],
)
def test_the_loader_is_there_whatever_was_imported_first(order, folder):
    assert run(ORDERS[order] + LOAD, folder).split() == ["DynamicFFN", "FATReLU"]


def test_two_threads_may_import_ours_and_theirs_at_once(folder):
    """The hook runs in the thread that imports theirs, while another may hold the lock of ours and wait for theirs."""
    threads = """
import d2dmoe, threading, importlib
names = ["transformers.quantizers.auto", "d2dmoe.moe.quantizer"]
errors, barrier = [], threading.Barrier(len(names))
def work(name):
    barrier.wait()
    try:
        importlib.import_module(name)
    except BaseException as error:
        errors.append((name, repr(error)))
workers = [threading.Thread(target=work, args=(name,)) for name in names]
[w.start() for w in workers]
[w.join() for w in workers]
assert not errors, errors
"""
    assert run(threads + LOAD, folder).split() == ["DynamicFFN", "FATReLU"]
