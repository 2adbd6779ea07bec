"""`convert --sparsify`: training and conversion by one command, one recipe, one resume."""

import json

import pytest
import yaml
from cli_support import convert_argv, run_in_process, run_killed, save_model, sentences, weights

from d2dmoe.config import ConvertConfig, UserError, resolve

GPT2 = {"vocab_size": 257, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "n_embd": 16, "n_layer": 2,
        "n_head": 2, "n_positions": 64, "n_inner": 64}  # fmt: skip
TRAINING = ("--sparsify-activation", "relu", "--sparsify-max-steps", "8", "--sparsify-alpha", "0.01",
            "--sparsify-learning-rate", "3e-3", "--sparsify-save-steps", "4", "--device", "cpu")  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("sparsified")
    save_model("GPT2LMHeadModel", place / "dense", **GPT2)
    (place / "text.txt").write_text("\n".join(sentences(200)))
    return place


FAST = ("--preset", "training-free", "--active", "0.5")


def argv(place, output, *more):
    return convert_argv(
        place / "dense", place / "text.txt", place / output, *FAST, "--sparsify", "hoyer", *TRAINING, *more
    )


def test_one_command_is_the_two_after_each_other(place, capsys):
    result = run_in_process(capsys, *argv(place, "one"))
    assert result.code == 0, result.err
    own = ["--activation", "relu", "--max-steps", 8, "--alpha", 0.01, "--learning-rate", "3e-3", "--device", "cpu"]
    first = run_in_process(
        capsys, "sparsify", "--model", place / "dense", "--data", place / "text.txt", "--max-length", 32,
        "--output-dir", place / "sparse", "--eval-tokens", 500, *own,
    )  # fmt: skip
    assert first.code == 0, first.err
    second = run_in_process(capsys, *convert_argv(place / "sparse", place / "text.txt", place / "two", *FAST))
    assert second.code == 0, second.err
    assert weights(place / "one") == weights(place / "two")
    one = json.loads((place / "one" / "results.json").read_text())
    assert one["rows"][0]["metric"] == json.loads((place / "two" / "results.json").read_text())["rows"][0]["metric"]
    before, after = one["sparsify"]["rows"]
    assert after["nonzero"] < 0.9 < before["nonzero"]
    assert json.loads((place / "one" / "config.json").read_text())["activation_function"] == "relu"
    recipe = yaml.safe_load((place / "one" / "recipe.yaml").read_text())
    assert recipe["sparsify"] == "hoyer"
    assert recipe["sparsify_options"]["alpha"] in (0.01, "0.01")
    assert not (place / "one.partial").exists()
    again = run_in_process(
        capsys, "convert", "--recipe", place / "one" / "recipe.yaml", "--model", place / "dense", "--data",
        place / "text.txt", "--output-dir", place / "again",
    )  # fmt: skip
    assert again.code == 0, again.err
    assert weights(place / "again") == weights(place / "one")


@pytest.mark.slow  # kills of each half by itself are in test_resume.py and in pipeline/
def test_killed_in_either_half_it_goes_on_to_the_same_bytes(place, capsys):
    assert run_in_process(capsys, *argv(place, "whole")).code == 0
    for ending, output in (("before.json", "early"), ("sparsified", "between"), ("routers.safetensors", "late")):
        run_killed({ending: argv(place, output)}, cwd=place)
        assert not (place / output).exists()
        stopped = run_in_process(capsys, *argv(place, output))
        assert "holds an interrupted" in stopped.err
        other = run_in_process(capsys, *argv(place, output, "--sparsify-weight-decay", "0.3", "--resume"))
        assert "sparsify_options changed" in other.err
        assert run_in_process(capsys, *argv(place, output, "--resume")).code == 0
        assert weights(place / output) == weights(place / "whole")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--sparsify-alhpa", "1"], "unknown option --alhpa; did you mean --alpha"),
        (["--sparsify-model", "x"], "--sparsify-model: follows from convert's own flags"),
        (["--sparsify-alpha", "-1"], "--alpha -1.0: must be 0 or more"),
        (["--sparsify-task", "classification"], "--task classification: a GPT2LMHeadModel has no such head"),
    ],
)
def test_mistakes_are_named_before_anything_is_made(place, capsys, more, message):
    result = run_in_process(capsys, *argv(place, "bad", *more))
    assert result.code == 1
    assert message in result.err
    assert not (place / "bad.partial").exists()


def test_options_without_the_stage():
    with pytest.raises(UserError, match="--sparsify-alpha belongs to --sparsify"):
        resolve(ConvertConfig, {"model": "x", "sparsify_alpha": 1})
    recipe = {"sparsify": "l1", "sparsify_alpha": 1, "sparsify_max_steps": 3}
    config = resolve(ConvertConfig, recipe, {"sparsify_alpha": 2})
    assert config.sparsify_options == {"alpha": 2, "max_steps": 3}
