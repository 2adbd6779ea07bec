"""Every metric against a second computation, and what `eval` prints, draws and refuses."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cli_support import BERT, GPT2, WORDS, byte_tokenizer, convert_argv, run_in_process, save_model, sentences
from torch.nn.functional import cosine_similarity, cross_entropy
from zoo import converted_tiny, tiny

from d2dmoe import UserError, hub, set_gate
from d2dmoe.data import Batches
from d2dmoe.measure.evaluate import evaluate
from d2dmoe.measure.metrics import METRICS, choose_metric, possible_metrics
from d2dmoe.moe.layer import layers
from d2dmoe.report import compare_table, eval_table

HALF, QUARTER = {"active": 0.5}, {"active": 0.25}
SPECIAL, MASK = [0, 1, 2], 3
TOKENIZER = SimpleNamespace(all_special_ids=[*SPECIAL, MASK], mask_token_id=MASK)


def sequences(count: int, lengths: tuple[int, int] = (4, 12), labels: int = 0) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    items = []
    for _ in range(count):
        length = int(torch.randint(*lengths, (1,), generator=generator))
        item = {"input_ids": torch.randint(4, 99, (length,), generator=generator).tolist()}
        if labels:
            item["label"] = int(torch.randint(labels, (1,), generator=generator))
        items.append(item)
    return items


@torch.no_grad()
def alone(model: torch.nn.Module, items: list[dict], setting: dict[str, float]) -> list:
    """Outputs of the model for one item at a time: no padding, nothing shared with `evaluate`."""
    with set_gate(model, **setting):
        return [model(input_ids=torch.tensor([item["input_ids"]])) for item in items]


def values(row: dict) -> dict[str, float]:
    """All figures of a row by name."""
    return {row["metric"]["name"]: row["metric"]["value"], **row["metrics"]}


# --- values ----------------------------------------------------------------------------------------------------------


def test_perplexity_of_padded_text():
    model, items = converted_tiny("gpt2"), sequences(9)
    rows = evaluate(model, Batches(items, 4), [QUARTER, HALF, {"active": 1.0}])
    for row, setting in zip(rows, (QUARTER, HALF, {"active": 1.0}), strict=True):
        nats = 0.0
        for item, output in zip(items, alone(model, items, setting), strict=True):
            nats += cross_entropy(output.logits[0, :-1], torch.tensor(item["input_ids"][1:]), reduction="sum").item()
        loss = nats / sum(len(item["input_ids"]) - 1 for item in items)
        assert values(row) == pytest.approx({"perplexity": math.exp(loss), "loss": loss}, rel=1e-5)
        assert row["dense"]["value"] == rows[2]["metric"]["value"]
        assert row["dense_metrics"] == rows[2]["metrics"]
        assert row["tokens"] == sum(len(item["input_ids"]) for item in items)
        assert row["active_fraction"] == pytest.approx(setting["active"])
    assert len({row["metric"]["value"] for row in rows}) == 3


def test_masked_lm_masks_the_same_ordinary_tokens_for_every_row(monkeypatch):
    model, items = converted_tiny("bert"), sequences(60)
    for item in items:
        item["input_ids"] = [1, *item["input_ids"], 2]
    seen, forward = [], model.forward
    monkeypatch.setattr("d2dmoe.measure.evaluate._milliseconds", lambda *_: 0.0)

    @functools.wraps(forward)
    def spy(**inputs):
        seen.append((inputs, forward(**inputs)))
        return seen[-1][1]

    monkeypatch.setattr(model, "forward", spy)
    padded = Batches(items, 20, pad_id=5)  # an ordinary token: only the attention mask tells
    rows = evaluate(model, padded, [QUARTER, HALF], tokenizer=TOKENIZER)
    passes = seen[:9]  # dense, quarter, half; three times
    true = torch.nn.utils.rnn.pad_sequence([torch.tensor(i["input_ids"]) for i in items], True, padding_value=5)
    masked_share = []
    for point in range(3):
        nats, count = 0.0, 0
        for number, (inputs, output) in enumerate(passes[point::3]):
            original = true[number * 20 : number * 20 + 20, : inputs["input_ids"].shape[1]]
            changed = inputs["input_ids"] != original
            assert torch.equal(inputs["input_ids"], passes[3 * number][0]["input_ids"])
            assert (inputs["input_ids"][changed] == MASK).all()
            assert not changed[inputs["attention_mask"] == 0].any()
            assert not (changed & torch.isin(original, torch.tensor(SPECIAL))).any()
            chances = output.logits.softmax(-1).gather(-1, original[..., None])[..., 0]
            nats, count = nats - chances[changed].log().sum().item(), count + int(changed.sum())
            masked_share.append(changed.sum() / ((original > 3) & (inputs["attention_mask"] == 1)).sum())
        figures = [rows[0]["dense"]["value"], rows[0]["metric"]["value"], rows[1]["metric"]["value"]]
        assert figures[point] == pytest.approx(math.exp(nats / count), rel=1e-5)
    assert 0.1 < sum(masked_share) / len(masked_share) < 0.2
    again, other = (evaluate(model, padded, [HALF], tokenizer=TOKENIZER, seed=seed)[0]["metric"] for seed in (0, 1))
    assert again == rows[1]["metric"] != other


def test_accuracy_and_kl_of_a_classifier():
    model, items = converted_tiny("bert-classifier"), sequences(30, labels=3)
    rows = evaluate(model, Batches(items, 7), [QUARTER, {"active": 1}])
    dense = torch.cat([o.logits for o in alone(model, items, {"active": 1})]).double().softmax(-1).numpy()
    ours = torch.cat([o.logits for o in alone(model, items, QUARTER)]).double().softmax(-1).numpy()
    labels = np.array([item["label"] for item in items])
    expected = {
        "accuracy": (ours.argmax(1) == labels).mean(),
        "kl_to_dense": (dense * np.log(dense / ours)).sum(1).mean(),
        "agreement": (ours.argmax(1) == dense.argmax(1)).mean(),
    }
    assert values(rows[0]) == pytest.approx(expected, rel=1e-4)
    assert expected["kl_to_dense"] > 1e-3
    everything = {"accuracy": (dense.argmax(1) == labels).mean(), "kl_to_dense": 0.0, "agreement": 1.0}
    assert values(rows[1]) == pytest.approx(everything, abs=1e-9)
    assert rows[0]["dense"]["value"] == everything["accuracy"]
    for item in items:
        del item["label"]
    (unlabelled,) = evaluate(model, Batches(items, 7), [QUARTER])
    assert unlabelled["metric"] == {"name": "kl_to_dense", "value": rows[0]["metrics"]["kl_to_dense"]}


def test_accuracy_of_an_image_classifier():
    model = converted_tiny("vit")
    images = torch.randn(12, 3, 16, 16)
    labels = torch.arange(12) % 2
    batches = [{"pixel_values": images[i : i + 5], "labels": labels[i : i + 5]} for i in (0, 5, 10)]
    (row,) = evaluate(model, batches, [HALF])
    with torch.no_grad(), set_gate(model, **HALF):
        right = [int(model(pixel_values=image[None]).logits.argmax()) for image in images]
    assert row["metric"] == {"name": "accuracy", "value": np.mean(np.array(right) == labels.numpy())}
    assert row["tokens"] == 12


def ranks(numbers: np.ndarray) -> np.ndarray:
    return np.argsort(np.argsort(numbers))


def test_embeddings_leave_padding_out(monkeypatch):
    monkeypatch.setattr("d2dmoe.measure.metrics.SENTENCES_RANKED", 11)
    model, items = converted_tiny("bert").bert, sequences(20)
    model.config.quantization_config = converted_tiny("bert").config.quantization_config
    (row,) = evaluate(model, Batches(items, 6), [QUARTER])
    ours, dense = (
        torch.stack([o.last_hidden_state[0].mean(0) for o in alone(model, items, setting)])
        for setting in (QUARTER, {"active": 1})
    )
    pairs = []
    for side in (ours[:11], dense[:11]):
        pairs.append(np.array([cosine_similarity(side[i], side[j], 0) for i in range(11) for j in range(i)]))
    expected = {
        "embedding": cosine_similarity(ours, dense).mean().item(),
        "rank_correlation": np.corrcoef(ranks(pairs[0]), ranks(pairs[1]))[0, 1],
    }
    assert values(row) == pytest.approx(expected, rel=1e-4)
    assert row["dense"]["value"] == pytest.approx(1)
    assert row["dense_metrics"] == pytest.approx({"rank_correlation": 1})
    assert expected["embedding"] < 0.999


def test_cosine_of_every_token_that_is_not_padding():
    model, items = converted_tiny("bert"), sequences(9)
    (row,) = evaluate(model, Batches(items, 4), [QUARTER], metric="cosine_to_dense")
    ours, dense = (torch.cat([o.logits[0] for o in alone(model, items, s)]) for s in (QUARTER, {"active": 1}))
    assert row["metric"]["value"] == pytest.approx(cosine_similarity(ours, dense, dim=-1).mean().item(), rel=1e-5)


def test_a_dense_model_is_one_row():
    model = tiny("gpt2")
    (row,) = evaluate(model, Batches(sequences(5), 2), [QUARTER, HALF])
    assert (row["gate"], row["active_fraction"], row["flops_fraction_model"]) == ("none", 1, 1)
    assert row["metric"]["value"] == row["dense"]["value"]


def test_a_dense_model_is_compared_with_what_it_was():
    """A training is measured against the model before it, not against its own result."""
    items = sequences(9, labels=3)
    before, after = tiny("bert-classifier"), tiny("bert-classifier")
    for parameter in after.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    same, changed = (evaluate(m, Batches(items, 4), [], original=before) for m in (before, after))
    alone = evaluate(after, Batches(items, 4), [])
    assert len(same) == len(changed) == 1
    assert values(same[0])["kl_to_dense"] == pytest.approx(0, abs=1e-6)
    assert values(alone[0])["kl_to_dense"] == pytest.approx(0, abs=1e-6)
    assert values(changed[0])["kl_to_dense"] > 1e-3
    assert changed[0]["metric"] == alone[0]["metric"]
    assert changed[0]["dense"]["value"] == same[0]["metric"]["value"]


def test_the_dense_model_runs_once_for_all_rows_and_batches_are_not_kept(monkeypatch):
    seen: list[float | str] = []

    class Watched(Batches):
        def __getitem__(self, number):
            batch = super().__getitem__(number)
            seen.append("batch")
            return batch

    monkeypatch.setattr("d2dmoe.measure.evaluate._milliseconds", lambda *_: 0.0)
    model, batches = converted_tiny("bert-classifier"), Watched(sequences(20, labels=3), 5)
    model.register_forward_pre_hook(lambda *_: seen.append(layers(model)[0].gate_state.tau))
    evaluate(model, batches, [QUARTER, HALF, {"tau": 0.0}])
    passes = seen[seen.index(0) - 1 :]  # without the looks at the first batch
    assert passes[:16] == ["batch", 0, 0.75, 0.5] * 4
    assert [p for p in passes[16:] if p != "batch"] == [0, 0]  # FLOPs


# --- which metric ----------------------------------------------------------------------------------------------------

TEXT, LABELLED = {"input_ids": torch.ones(1, 2)}, {"input_ids": torch.ones(1, 2), "labels": torch.ones(1)}


@pytest.mark.parametrize(
    ("name", "batch", "metric"),
    [
        ("gpt2", TEXT, "perplexity"),
        ("llama", LABELLED, "perplexity"),
        ("bert", TEXT, "masked_lm"),
        ("distilbert", LABELLED, "masked_lm"),
        ("bert-classifier", LABELLED, "accuracy"),
        ("bert-classifier", TEXT, "kl_to_dense"),
        ("vit", {"pixel_values": torch.ones(1), "labels": torch.ones(1)}, "accuracy"),
        ("swin", {"pixel_values": torch.ones(1)}, "kl_to_dense"),
        ("t5", TEXT, "cosine_to_dense"),
        ("imagegpt", {"pixel_values": torch.ones(1)}, "cosine_to_dense"),
        ("whisper", {"input_features": torch.ones(1)}, "cosine_to_dense"),
    ],
)
def test_the_natural_metric(name, batch, metric):
    model = tiny(name)
    assert possible_metrics(type(model), model.config, batch, TOKENIZER)[0] == metric
    assert choose_metric("cosine_to_dense", type(model), model.config, batch) == "cosine_to_dense"


def test_the_natural_metric_of_bare_models_and_of_subclasses():
    bert, classifier = tiny("bert"), tiny("bert-classifier")
    assert possible_metrics(type(bert.bert), bert.config, TEXT) == ["embedding", "cosine_to_dense"]
    assert possible_metrics(type(bert), bert.config, TEXT) == ["cosine_to_dense"]  # no mask token
    mine = type("Mine", (type(classifier),), {})
    assert possible_metrics(mine, classifier.config, LABELLED)[0] == "accuracy"
    classifier.config.problem_type = "multi_label_classification"
    assert possible_metrics(mine, classifier.config, LABELLED) == ["cosine_to_dense"]


@pytest.mark.parametrize("metric", [name for name in METRICS if name not in ("perplexity", "cosine_to_dense")])
def test_a_metric_that_does_not_fit(metric):
    model = tiny("gpt2")
    with pytest.raises(UserError, match=rf"--metric {metric}: .*GPT2LMHeadModel.*perplexity, cosine_to_dense"):
        choose_metric(metric, type(model), model.config, LABELLED, TOKENIZER)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 `gpt2` and a classifier `classifier`, each also converted (`gpt2-moe`, `classifier-moe`), and data."""
    from d2dmoe.cli import main

    home = tmp_path_factory.mktemp("evaluate")
    (home / "text.txt").write_text("\n".join(sentences(120)))
    classes = dict(zip(WORDS[:3], range(3), strict=True))
    rows = [f"{text};{WORDS[len(text) % 3]}" for text in sentences(60)]
    (home / "labelled.txt").write_text("\n".join(["text;label_name", *rows]))
    save_model("GPT2LMHeadModel", home / "gpt2", **GPT2)
    names = {"id2label": {i: n for n, i in classes.items()}, "label2id": classes}
    save_model("BertForSequenceClassification", home / "classifier", **BERT, **names)
    save_model("BertForMaskedLM", home / "bert", **BERT)
    for name, data in (("gpt2", "text.txt"), ("classifier", "labelled.txt")):
        assert main(convert_argv(home / name, home / data, home / f"{name}-moe")) == 0
    return home


@pytest.fixture
def d2dmoe_eval(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    def run(*argv: object, code: int = 0):
        result = run_in_process(capsys, "eval", *argv, "--max-length", 32, "--json", tmp_path / "f.json")
        assert result.code == code, result.err
        assert "Traceback" not in result.err
        if code:
            assert len(result.err.strip().splitlines()) == 1 or code == 2
            return result.err
        return result.out, json.loads((tmp_path / "f.json").read_text())["rows"]

    return run


def test_a_classifier_is_converted_and_evaluated_with_names_of_classes(home, d2dmoe_eval):
    from transformers import AutoModelForSequenceClassification

    _, (dense,) = d2dmoe_eval("--model", home / "classifier", "--data", home / "labelled.txt")
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(home / "classifier"), byte_tokenizer()
    right = 0
    for line in (home / "labelled.txt").read_text().splitlines()[1:]:
        text, _, name = line.partition(";")
        ids = tokenizer(text, truncation=True, max_length=32, return_tensors="pt")["input_ids"]
        right += model.config.label2id[name] == int(model(ids).logits.argmax())
    assert dense["metric"] == {"name": "accuracy", "value": pytest.approx(right / 60)}
    out, rows = d2dmoe_eval("--model", home / "classifier-moe", "--data", home / "labelled.txt", "--active", "0.25,1")
    assert out.splitlines()[0].endswith("| accuracy | dense accuracy | kl_to_dense | agreement |")
    assert rows[1]["metric"] == dense["metric"]
    assert rows[0]["metrics"]["kl_to_dense"] > 0
    results = json.loads((home / "classifier-moe" / "results.json").read_text())
    assert results["rows"][0]["metric"]["name"] == "accuracy"


def test_compare_puts_folders_side_by_side(home, d2dmoe_eval, tmp_path):
    argv = ["--data", home / "text.txt", "--tokens", 500, "--active", "0.25,0.5"]
    out, rows = d2dmoe_eval("--compare", home / "gpt2-moe", home / "gpt2", *argv, "--plot", tmp_path / "p.png")
    first, *lines = (line.strip("| ").split(" | ") for line in out.splitlines())
    assert first == ["perplexity (model FLOPs)", "gpt2-moe", "gpt2"]
    assert [line[0] for line in lines[1:]] == ["active 0.25", "active 0.5", "active 1"]
    quarter = next(row for row in rows if row.get("active") == 0.25)
    assert lines[1][1] == f"{quarter['metric']['value']:.4g} ({quarter['flops_fraction_model']:.3f})"
    assert [Path(row["model"]).name for row in rows] == ["gpt2-moe", "gpt2-moe", "gpt2"]
    assert rows[2]["metric"]["value"] == pytest.approx(rows[0]["dense"]["value"], rel=1e-5)
    _, alone = d2dmoe_eval("--model", home / "gpt2-moe", *argv)
    assert [row["metric"] for row in alone] == [row["metric"] for row in rows[:2]]
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_compare_at_thresholds():
    def row(model, tau, value):
        return {"model": model, "tau": tau, "active_fraction": 0.3, "flops_fraction_model": 0.5,
                "metric": {"name": "perplexity", "value": value}}  # fmt: skip

    text = compare_table([row("a/x", 0.5, 2.0), row("b/x", 0.25, 3.0), row("b/x", 0.5, 4.0)])
    assert text.splitlines()[2:] == ["| tau 0.25 |  | 3 (0.500) |", "| tau 0.5 | 2 (0.500) | 4 (0.500) |"]
    assert "| a/x | b/x |" in text


def test_the_plot_shows_the_rows(home, d2dmoe_eval, tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    argv = ["--data", home / "text.txt", "--tokens", 500, "--active", "0.5,0.25,1", "--plot", tmp_path / "p.svg"]
    _, rows = d2dmoe_eval("--model", home / "gpt2-moe", *argv)
    line, dense = drawn[0].axes[0].lines
    points = sorted((row["flops_fraction_model"], row["metric"]["value"]) for row in rows)
    assert list(zip(line.get_xdata(), line.get_ydata(), strict=True)) == points
    assert set(dense.get_ydata()) == {rows[0]["dense"]["value"]}


def test_a_table_of_rows_from_before_further_metrics():
    row = {"active_fraction": 1.0, "flops_fraction_ffn": 1.0, "flops_fraction_model": 1.0, "ms_per_token": 1.0}
    assert "perplexity" in eval_table([row | {"metric": {"name": "perplexity", "value": 2.0}, "dense": {"value": 2.0}}])


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(d2dmoe_eval, monkeypatch):
    """What `eval` says, having loaded no weights."""
    monkeypatch.setattr(hub, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    return lambda *argv, code=1: d2dmoe_eval(*argv, code=code)


def test_no_model(refused):
    assert "one of the arguments --model --compare is required" in refused("--data", "builtin", code=2)


def test_no_labels(home, refused):
    said = refused("--model", home / "classifier", "--data", home / "text.txt", "--metric", "accuracy")
    assert "--metric accuracy: the data has no labels; name their column with --label-column" in said


def test_unknown_label(home, refused, tmp_path):
    (tmp_path / "t.csv").write_text("text,label\nsome text,the\nmore text,joy\n")
    said = refused("--model", home / "classifier-moe", "--data", tmp_path / "t.csv")
    assert "label 'joy' is none of the model's, the, router, sends" in said
    assert "no column 'mood'" in refused(
        "--model", home / "classifier", "--data", tmp_path / "t.csv", "--label-column", "mood"
    )


def test_metrics_that_do_not_fit(home, refused):
    data = ["--data", home / "text.txt"]
    said = refused("--model", home / "gpt2-moe", *data, "--metric", "accuracy")
    assert "--metric accuracy: does not fit a GPT2LMHeadModel; possible here: perplexity, cosine_to_dense" in said
    said = refused("--model", home / "bert", *data, "--metric", "masked_lm")
    assert "no tokenizer with a mask token" in said
    assert "invalid choice: 'bleu'" in refused("--model", home / "gpt2", *data, "--metric", "bleu", code=2)


def test_models_that_cannot_be_compared(home, refused):
    said = refused("--compare", home / "gpt2", home / "classifier", "--data", home / "text.txt")
    assert "gpt2 is measured by perplexity and" in said
    assert "classifier by kl_to_dense" in said


def test_plots_that_cannot_be_drawn(home, refused, tmp_path, monkeypatch):
    argv = ["--model", home / "gpt2", "--data", home / "text.txt", "--plot"]
    assert "must end in one of .png" in refused(*argv, tmp_path / "p.txt")
    assert "cannot be written" in refused(*argv, home / "text.txt" / "p.png")
    monkeypatch.setattr("d2dmoe.report.plots.find_spec", lambda _: None)
    assert "matplotlib is not installed; pip install 'd2dmoe-toolkit[plot]'" in refused(*argv, tmp_path / "p.png")


def test_a_bar_knows_its_end(capsys):
    """Passes over batches show how much is left."""
    model = tiny("gpt2").eval()
    data = Batches([{"input_ids": list(range(5, 13))}] * 6, 2)
    evaluate(model, data, [], metric="perplexity")
    assert "3/3" in capsys.readouterr().err
