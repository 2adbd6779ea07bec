"""The loopback hub serves what the real client libraries ask for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hub_mirror import hub_mirror, mirror_environment


@pytest.fixture(autouse=True)
def _misleading_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Settings of the calling shell that a mirrored subprocess must not follow."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")


def _run(code: str, endpoint: str, tmp_path: Path, *arguments: str) -> str:
    """Run Python code as a client of the mirror and return what it prints."""
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=mirror_environment(endpoint, tmp_path / "cache"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_model_from_the_mirror_equals_the_local_one(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=32, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "src")
    code = """
import sys, torch
from transformers import AutoModelForCausalLM
ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [39, 0, 7, 7, 31, 20, 11, 12]])
with torch.no_grad():
    mirrored, local = (AutoModelForCausalLM.from_pretrained(name)(ids).logits for name in ("org/tiny", sys.argv[1]))
print(tuple(local.shape), bool(local.std() > 0), torch.equal(mirrored, local))
"""
    log: list[str] = []
    with hub_mirror({"org/tiny": tmp_path / "src"}, log=log) as endpoint:
        printed = _run(code, endpoint, tmp_path, str(tmp_path / "src"))
    assert printed.split("\n")[-2] == "(2, 8, 40) True True"
    downloads = [line for line in log if line.startswith('"GET /org/tiny/resolve/') and "/model.safetensors" in line]
    assert len(downloads) == 1
    assert " 200 " in downloads[0]
    assert (tmp_path / "cache" / "hub" / "models--org--tiny").is_dir()
    assert not (tmp_path / "elsewhere").exists()


def test_an_unknown_repository_is_an_error_that_names_it(tmp_path: Path) -> None:
    code = """
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained("org/absent")
except OSError as error:
    print(f"OSError: {error}")
"""
    (tmp_path / "src").mkdir()
    with hub_mirror({"org/tiny": tmp_path / "src"}) as endpoint:
        printed = _run(code, endpoint, tmp_path)
    assert "OSError: org/absent is not a local folder and is not a valid model identifier" in printed


def test_a_data_set_from_the_mirror_has_both_splits(tmp_path: Path) -> None:
    texts = {"train": ["one", "two", "three"], "validation": ["vier – fünf"]}
    (tmp_path / "data").mkdir()
    for split, rows in texts.items():
        lines = "".join(json.dumps({"text": row}) + "\n" for row in rows)
        (tmp_path / "data" / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    code = """
import json
from datasets import load_dataset
print(json.dumps({split: list(rows["text"]) for split, rows in load_dataset("org/data").items()}))
"""
    with hub_mirror({}, {"org/data": tmp_path / "data"}) as endpoint:
        printed = _run(code, endpoint, tmp_path)
    assert json.loads(printed.split("\n")[-2]) == texts
