"""A second text: its figures are those of an evaluation of its own, wherever they are shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_support import convert_argv
from huggingface_hub import ModelCard
from test_page import read

from d2dmoe.quality import quality_loss

pytestmark = pytest.mark.usefixtures("one_thread")
LIMITS = ("--max-length", 32, "--tokens", 500)


def rows_of(file: Path) -> list[dict]:
    return json.loads(file.read_text())["rows"]


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """Text unlike the calibration text."""
    file = tmp_path_factory.mktemp("other") / "other.txt"
    file.write_text("\n".join(f"{n * n} apples, {n} pears; total {n * n + n}?" for n in range(120)))
    return file


@pytest.fixture(scope="module")
def drifted(home, other, tmp_path_factory) -> Path:
    """A conversion that was also evaluated on the other text."""
    from d2dmoe.cli import main

    out = tmp_path_factory.mktemp("drifted") / "out"
    assert main([*convert_argv(home / "dense", home / "text.txt", out), "--also-eval", str(other)]) == 0
    return out


def test_the_figures_equal_those_of_an_evaluation_of_its_own(home, other, drifted, d2dmoe, tmp_path):
    d2dmoe("eval", "--model", drifted, "--data", other, *LIMITS, "--json", tmp_path / "own.json")
    own, rows = rows_of(tmp_path / "own.json"), rows_of(drifted / "results.json")
    assert len(own) == len(rows) == 4
    for row, wanted in zip(rows, own, strict=True):
        drift = row["drift"]
        assert drift["data"] == "other.txt"
        assert drift["tokens"] == wanted["tokens"]
        assert drift["active_fraction"] == pytest.approx(wanted["active_fraction"], rel=1e-6)
        assert drift["metric"]["name"] == wanted["metric"]["name"] == "perplexity"
        assert drift["metric"]["value"] == pytest.approx(wanted["metric"]["value"], rel=1e-5)
        assert drift["dense"]["value"] == pytest.approx(wanted["dense"]["value"], rel=1e-5)
        assert drift["metric"]["value"] != row["metric"]["value"]
    flags = ["--data", home / "text.txt", "--part", "held_out", *LIMITS, "--also-eval", other]
    result = d2dmoe("eval", "--model", drifted, *flags, "--json", tmp_path / "both.json")
    both = rows_of(tmp_path / "both.json")
    for row, wanted in zip(both, rows, strict=True):
        assert row["metric"]["value"] == pytest.approx(wanted["metric"]["value"], rel=1e-5)
        assert row["drift"]["metric"]["value"] == pytest.approx(wanted["drift"]["metric"]["value"], rel=1e-5)
    columns = ("active", "perplexity", "loss increase")
    assert "| " + " | ".join(f"{name} | {name} on other.txt" for name in columns) + " |" in result.out
    assert f"| {both[0]['drift']['active_fraction']:.4g} |" in result.out


def test_report_and_card_show_it(home, drifted):
    rows = rows_of(drifted / "results.json")
    table = next(t for t in read(drifted / "report.html").tables if "second text" in t[0])
    for row, line in zip(rows, table[1:], strict=True):
        drift = row["drift"]
        values = [row["active_fraction"], drift["active_fraction"], row["metric"]["value"], drift["metric"]["value"]]
        values += [drift["dense"]["value"], quality_loss(row), quality_loss(drift)]
        assert line[1:] == ["other.txt", *(f"{value:.4g}" for value in values)]
    card = ModelCard.load(drifted / "README.md")
    assert "## Drift" in card.text
    assert card.text.index("## Drift") < card.text.index("## Limits")
    found = {(r.dataset_name, r.metric_type, r.metric_args["active_fraction"]): r.metric_value
             for r in card.data.eval_results}  # fmt: skip
    for row in rows:
        assert found["text.txt", "perplexity", row["active_fraction"]] == row["metric"]["value"]
        drift = row["drift"]
        assert found["other.txt", "perplexity", drift["active_fraction"]] == drift["metric"]["value"]


def test_models_side_by_side_keep_their_drift(home, other, drifted, d2dmoe):
    flags = ["--data", home / "text.txt", *LIMITS, "--also-eval", other, "--active", 0.5]
    out = d2dmoe("eval", "--compare", drifted, home / "dense", *flags).out
    assert "| model | active | active on other.txt |" in out
    assert "\n| out |" in out
    assert "\n| dense |" in out


def test_a_second_text_that_cannot_be_used(home, d2dmoe, tmp_path):
    argv = convert_argv(home / "dense", home / "text.txt", tmp_path / "out")
    assert "--also-eval gone.txt: no such file" in d2dmoe(*argv, "--also-eval", "gone.txt", code=1).err
    (tmp_path / "short.txt").write_text("few")
    error = d2dmoe(*argv, "--also-eval", tmp_path / "short.txt", code=1).err
    assert f"--also-eval {tmp_path}/short.txt: its text has 3 tokens" in error
    error = d2dmoe(*argv, "--also-eval", home / "text.txt", "--eval-tokens", 0, code=1).err
    assert "--eval-tokens 0 measures nothing" in error
    assert not (tmp_path / "out").exists()
    argv = ["eval", "--model", home / "first", "--data", home / "text.txt", *LIMITS]
    assert "--also-eval gone.txt: no such file" in d2dmoe(*argv, "--also-eval", "gone.txt", code=1).err
