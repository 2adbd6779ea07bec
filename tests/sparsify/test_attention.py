"""Which attention trains: the plain one for short sequences in bf16 on a processor, and the model's own afterwards."""

from __future__ import annotations

import pytest
from cli_support import run_in_process

from d2dmoe import training
from d2dmoe.pipeline import sparsify
from d2dmoe.sparsify.trainer import SparsifyTrainer


@pytest.mark.parametrize(
    ("bf16", "longest", "wanted"), [(True, 128, "eager"), (True, 16, "sdpa"), (False, 128, "sdpa")]
)
def test_short_sequences_in_bf16_train_by_plain_attention(home, tmp_path, capsys, monkeypatch, bf16, longest, wanted):
    seen, after = [], []
    train, trained = SparsifyTrainer.train, sparsify._trained

    def watched(self, *args, **kwargs):
        seen.append(self.model.config._attn_implementation)
        return train(self, *args, **kwargs)

    def kept(*args):
        after.append(trained(*args))
        return after[0]

    monkeypatch.setattr(SparsifyTrainer, "train", watched)
    monkeypatch.setattr(sparsify, "_trained", kept)
    monkeypatch.setattr(training, "SHORT", longest)
    result = run_in_process(
        capsys, "sparsify", "--model", home / "gpt2", "--data", home / "text.txt", "--max-length", 32, "--max-steps", 1,
        "--output-dir", tmp_path / "out", "--device", "cpu", *(["--bf16", "true"] if bf16 else []),
    )  # fmt: skip
    assert result.code == 0, result.err
    assert seen == [wanted]
    assert after[0].config._attn_implementation == "sdpa"
    assert "attn" not in " ".join(
        key for key in (tmp_path / "out" / "config.json").read_text().split() if "impl" in key
    )
