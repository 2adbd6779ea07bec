"""The page on a conversion: its numbers are those of the folder, and what comes from outside is escaped."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from cli_support import convert_argv, names, save_model, sentences
from transformers import AutoModelForCausalLM, AutoTokenizer

from d2dmoe.config import D2DMoEConfig, DataConfig
from d2dmoe.config.projections import Projection, ProjectionState
from d2dmoe.data import make_batches
from d2dmoe.measure.usage import collect_usage, token_texts
from d2dmoe.moe.gating import set_gate
from d2dmoe.moe.layer import layers
from d2dmoe.quality import quality_loss
from d2dmoe.report import page, pictures
from d2dmoe.report.conversions import read_conversion
from d2dmoe.report.page import write_report

pytestmark = pytest.mark.usefixtures("one_thread")
HOSTILE = '<script>alert("x")</script> & <b>bold</b> $x_1$'


class Reader(HTMLParser):
    """The tables of a page, its spans with a share, and what it refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.tokens: list[tuple[str, str]] = []
        self.tags: set[str] = set()
        self.sources: list[str] = []
        self._in: str | None = None

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.add(tag)
        self.sources += [v for k, v in attrs if k in ("src", "href", "xlink:href", "data", "action") and v]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._in = "cell"
        elif tag == "span":
            self.tokens.append((values["title"], ""))
            self._in = "token"

    def handle_endtag(self, tag):
        if tag in ("td", "th", "span"):
            self._in = None

    def handle_data(self, data):
        if self._in == "cell":
            self.tables[-1][-1][-1] += data
        elif self._in == "token":
            share, text = self.tokens[-1]
            self.tokens[-1] = (share, text + data)


def read(file: Path) -> Reader:
    reader = Reader()
    reader.feed(file.read_text())
    return reader


@pytest.fixture
def folder(home: Path, tmp_path: Path) -> Path:
    """A copy of the converted folder, to change."""
    return Path(shutil.copytree(home / "first", tmp_path / "first"))


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def with_times(folder: Path, rows: list[dict]) -> None:
    (folder / "bench.json").write_text(json.dumps({"machine": {"processor": "Some CPU"}, "rows": rows}))


def time_row(active: float, sparse: float, dense: float = 20.0, **more) -> dict:
    return {
        "phase": "prefill", "batch": 8, "context": 64, "active": active, "sparse_ms": sparse, "dense_ms": dense,
        "threads": 1, "dtype": "float32", "tokens": 512, "active_fraction": active, "speedup": dense / sparse,
        "ideal": 1 / active, "ms": {"eager": dense, "sparse": sparse}, "way": "",
        "quartiles_ms": {"eager": [dense, dense], "sparse": [sparse, sparse]}, **more,
    }  # fmt: skip


# --- what a conversion writes ----------------------------------------------------------------------------------------


def test_a_conversion_writes_page_pictures_and_counts(home):
    assert names(home / "first") >= {"report.html", "report.json", "report"}
    budgets = ("25", "50", "75")
    wanted = {"quality-flops.png", "layers.png", *(f"{k}-{b}.png" for k in ("experts", "k") for b in budgets)}
    assert names(home / "first" / "report") == wanted
    assert (home / "first" / "report.json").stat().st_size < 20_000


def test_the_table_of_budgets_holds_the_numbers_of_the_results(home):
    rows = results(home / "first")["rows"]
    header, *body = read(home / "first" / "report.html").tables[0]
    assert header[:6] == ["asked", "active", "FFN FLOPs", "model FLOPs", "perplexity", "dense perplexity"]
    assert [line[0] for line in body] == ["active 0.25", "active 0.5", "active 0.75", "dense"]
    for row, line in zip(rows, body, strict=True):
        keys = ("active_fraction", "flops_fraction_ffn", "flops_fraction_model")
        values = [row[k] for k in keys] + [row["metric"]["value"], row["dense"]["value"], quality_loss(row)]
        assert line[1:7] == [f"{value:.4g}" for value in values]


def test_the_page_needs_nothing_from_elsewhere(home):
    reader = read(home / "first" / "report.html")
    assert all(source.startswith(("#", "data:")) for source in reader.sources)
    assert not reader.tags & {"script", "link", "iframe", "object"}
    text = (home / "first" / "report.html").read_text()
    assert 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text
    assert "currentColor" in text
    assert "url(http" not in text
    assert "@import" not in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len({*ids})


def test_the_head_tells_model_base_data_machine_date_and_command(home):
    text = (home / "first" / "report.html").read_text()
    found = results(home / "first")
    shown = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text))
    assert (shown["model"], shown["base"], shown["data"]) == ("first", "dense", "text.txt")
    assert shown["machine"].startswith(found["machine"]["processor"])
    assert shown["date"] == found["date"].replace("T", " ").replace("+00:00", " UTC")
    assert f"<pre>{' '.join(found['command'])}</pre>" in text
    assert str(home) not in text


# --- what is counted -------------------------------------------------------------------------------------------------


def test_counts_are_those_of_the_model(home):
    model = AutoModelForCausalLM.from_pretrained(home / "first", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(home / "first")
    texts = [{"text": text} for text in sentences(30, seed=5)]
    data = DataConfig(max_length=32, batch_size=4, sequences="documents")
    batches = make_batches(texts, tokenizer, data, packed=False, vocabulary=257)
    usage = collect_usage(model, batches, tokenizer, samples=2)
    seen: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    with set_gate(model, active=0.25):
        for item in batches.items:  # one by one, so without padding
            for number, layer in enumerate(layers(model)):
                layer.observer = lambda _l, _x, _h, _s, run, n=number: seen[n].append(run.clone())
                layer.observer.needs_hidden = False
            with torch.no_grad():
                model(torch.tensor([item["input_ids"]]))
    quarter = usage["budgets"][0]
    assert quarter["active"] == 0.25
    assert usage["count"] == batches.tokens
    for number, layer in enumerate(quarter["layers"]):
        run = torch.cat(seen[number])
        assert layer["usage"] == pytest.approx(run.float().mean(0).tolist(), abs=2e-3)
        assert layer["active"] == pytest.approx(run.float().mean().item(), abs=1e-3)
        assert sum(layer["k"]) == batches.tokens
        wanted = torch.bincount(run.sum(1), minlength=9).tolist()
        assert sum(abs(a - b) for a, b in zip(layer["k"], wanted, strict=True)) <= 2  # near ties
    first = usage["samples"][0]
    ids = batches.items[0]["input_ids"]
    assert "".join(first["pieces"]) == tokenizer.decode(ids)
    mean = torch.stack([seen[n][0].float().mean(1) for n in (0, 1)]).mean(0)
    assert dict(first["active"])[0.25] == pytest.approx(mean.tolist(), abs=2e-3)


def test_many_experts_are_counted_in_steps(home):
    from d2dmoe.measure.usage import UsageCounter

    class Wide:
        class block:
            experts = 200

    counter, run = UsageCounter(), torch.zeros(10, 200, dtype=torch.bool)
    for token in range(10):
        run[token, : token * 20] = True
    counter(0, Wide, torch.zeros(10, 4), None, None, run)
    assert counter.k[0].nonzero().flatten().tolist() == list(range(0, 200, 20))
    assert counter.runs[0][0] == 9


def test_the_text_of_tokens_that_share_a_character(home):
    tokenizer = AutoTokenizer.from_pretrained(home / "dense")
    ids = tokenizer("aé – 🦉!")["input_ids"]
    pieces = token_texts(ids, tokenizer)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == "aé – 🦉!"
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert token_texts([3, 14], None) == ["3 ", "14 "]


def test_images_get_a_map_of_their_patches(d2dmoe, tmp_path):
    image = pytest.importorskip("PIL.Image")
    from transformers import ViTImageProcessor

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    save_model("ViTForImageClassification", tmp_path / "vit", tokenizer=False, image_size=16, patch_size=4, **sizes)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    (tmp_path / "images").mkdir()
    rows = []
    for number in range(60):
        noise = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
        image.fromarray(noise.numpy()).save(tmp_path / "images" / f"{number}.png")
        rows.append({"path": str(tmp_path / "images" / f"{number}.png"), "bytes": None})
    import datasets

    table = datasets.Dataset.from_dict({"image": [r["path"] for r in rows]}).cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "images.parquet")
    d2dmoe(*convert_argv(tmp_path / "vit", tmp_path / "images.parquet", tmp_path / "out", "--active", "0.5"))
    usage = json.loads((tmp_path / "out" / "report.json").read_text())
    assert usage["kind"] == "images"
    assert len(usage["samples"]) == 3
    for sample in usage["samples"]:
        ((active, grid),) = sample["active"]
        assert active == 0.5
        assert (len(grid), len(grid[0])) == (4, 4)
    assert names(tmp_path / "out" / "report") >= {"image-1.png", "image-2.png", "image-3.png"}
    assert "Compute by patch" in (tmp_path / "out" / "report.html").read_text()


# --- text from outside -----------------------------------------------------------------------------------------------


def test_text_and_names_are_escaped(home, d2dmoe, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"{HOSTILE} {line}" for line in sentences(150)))
    out = tmp_path / "<i>$a$ & b"
    argv = convert_argv(home / "dense", text, out, "--active", "0.5")
    d2dmoe(*argv, "--report-samples", 2)
    reader, page = read(out / "report.html"), (out / "report.html").read_text()
    assert not reader.tags & {"script", "i", "b"} - {"i"}
    assert "<script" not in page
    assert "<i>$a$" not in page
    assert "&lt;script&gt;" in "".join(re.sub(r"</?span[^>]*>", "", page))
    assert '<script>alert("x")</script>' in "".join(text for _, text in reader.tokens)
    assert "&lt;i&gt;$a$ &amp; b" in page
    usage = json.loads((out / "report.json").read_text())
    shares = [f"{share:.0%}" for sample in usage["samples"] for share in dict(sample["active"])[0.5]]
    assert [share for share, _ in reader.tokens] == shares


def test_samples_can_be_left_out(home, d2dmoe, tmp_path):
    d2dmoe(*convert_argv(home / "dense", home / "text.txt", tmp_path / "out", "--report-samples", 0))
    assert json.loads((tmp_path / "out" / "report.json").read_text())["samples"] == []
    assert read(tmp_path / "out" / "report.html").tokens == []


# --- d2dmoe report ---------------------------------------------------------------------------------------------------


def test_the_page_is_made_again_and_the_folder_is_still_whole(folder, d2dmoe):
    before = (folder / "report.html").read_text()
    (folder / "report.html").unlink()
    shutil.rmtree(folder / "report")
    result = d2dmoe("report", folder)
    assert result.out == f"{folder}/report.html, and 8 pictures in {folder}/report\n"
    assert (folder / "report.html").read_text() == before
    assert len(names(folder / "report")) == 8
    assert "| checksums | ok |" in d2dmoe("verify", folder).out


def test_times_of_bench_are_shown_and_go_into_the_card(folder, d2dmoe):
    with_times(folder, [time_row(0.25, 8.0), time_row(0.5, 12.5)])
    d2dmoe("report", folder)
    reader = read(folder / "report.html")
    header, *body = reader.tables[0]
    place = header.index("measured time")
    assert [line[place] for line in body] == ["8 ms, 2.50×", "12.5 ms, 1.60×", "", ""]
    assert reader.tables[1][1] == ["prefill", "8", "64", "0.25", "8", "20", "2.50", "1", "float32", "Some CPU"]
    assert "quality-time.png" in names(folder / "report")
    card = (folder / "README.md").read_text()
    assert "on Some CPU, 1 threads" in card
    assert "8 (8–8)" in card
    d2dmoe("report", folder)
    assert (folder / "README.md").read_text() == card


def test_without_counts_the_results_alone_are_shown(folder, d2dmoe):
    (folder / "report.json").unlink()
    d2dmoe("report", folder)
    page = (folder / "report.html").read_text()
    assert "there is no report.json, so experts, layers and samples are missing" in page
    assert f"{results(folder)['rows'][0]['metric']['value']:.4g}" in page
    assert "Layers and experts" not in page


def test_several_conversions_side_by_side(home, folder, d2dmoe, tmp_path):
    paper = convert_argv(home / "dense", home / "text.txt", tmp_path / "paper", "--preset", "paper")
    d2dmoe(*paper)
    d2dmoe("report", folder, tmp_path / "paper", "--output", tmp_path / "both.html")
    reader = read(tmp_path / "both.html")
    _, *body = reader.tables[0]
    wanted = [("first", row) for row in results(folder)["rows"]]
    wanted += [("paper (the paper's rule)", row) for row in results(tmp_path / "paper")["rows"]]
    assert [line[0] for line in body] == [name for name, _ in wanted]
    assert [line[5] for line in body] == [f"{row['metric']['value']:.4g}" for _, row in wanted]
    assert names(tmp_path / "both") == {"quality-flops.png"}
    svg = re.search(r"<svg.*?</svg>", (tmp_path / "both.html").read_text(), re.DOTALL)[0]
    assert "first</text>" in svg
    assert "paper (the paper's rule)</text>" in svg


def test_a_budget_is_called_by_the_goal_of_the_user(folder, d2dmoe):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["budgets"][1]["objective"] = "flops=0.91"
    (folder / "config.json").write_text(json.dumps(config))
    d2dmoe("report", folder)
    _, *body = read(folder / "report.html").tables[0]
    assert [line[0] for line in body] == ["active 0.25", "flops 0.91", "active 0.75", "dense"]


def test_the_curves_are_the_rows(folder):
    from d2dmoe.report.conversions import read_conversion

    conversion = read_conversion(folder)
    line, star, _ = pictures.quality_against_flops([conversion]).axes[0].lines
    rows = conversion.rows
    assert line.get_xydata().tolist() == [[row["flops_fraction_model"], row["metric"]["value"]] for row in rows]
    assert star.get_xydata().tolist() == [[1.0, rows[0]["dense"]["value"]]]
    lines = pictures.compute_by_layer(conversion.usage).axes[0].lines
    for line, budget in zip(lines, conversion.usage["budgets"], strict=True):
        assert list(line.get_ydata()) == [layer["active"] for layer in budget["layers"]]


def test_without_matplotlib_there_are_tables(folder, d2dmoe, monkeypatch):
    find = pictures.find_spec
    monkeypatch.setattr(pictures, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    shutil.rmtree(folder / "report")
    d2dmoe("report", folder)
    page = (folder / "report.html").read_text()
    assert "pip install d2dmoe-toolkit[plot]" in page
    assert "<svg" not in page
    assert not (folder / "report").exists()
    table = read(folder / "report.html").tables[1]
    usage = json.loads((folder / "report.json").read_text())
    assert [line[2] for line in table[1:]] == [f"{layer['active']:.4g}" for layer in usage["budgets"][0]["layers"]]


def test_nothing_was_evaluated(home, d2dmoe, tmp_path):
    d2dmoe(*convert_argv(home / "dense", home / "text.txt", tmp_path / "out"), "--eval-tokens", 0)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "nothing was evaluated (--eval-tokens 0)" in page


def damage(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)


BAD = {
    "no folder": (lambda f: shutil.rmtree(f), "no such folder"),
    "no results": (lambda f: (f / "results.json").unlink(), "has no results.json"),
    "results no json": (lambda f: damage(f, "results.json", "{"), "results.json: cannot be read"),
    "results a list": (lambda f: damage(f, "results.json", "[]"), "results.json: is not a JSON object"),
    "results of others": (lambda f: damage(f, "results.json", '{"rows": [{"a": 1}]}'), "holds other figures"),
    "results without rows": (lambda f: damage(f, "results.json", "{}"), "holds other figures"),
    "sparsified": (lambda f: damage(f, "results.json", '{"rows": [{"model": "after"}]}'), "sparsified dense model"),
    "counts no json": (lambda f: damage(f, "report.json", "\udc80".encode("utf8", "surrogateescape").hex() + "{"),
                       "report.json: cannot be read"),
    "counts of others": (lambda f: damage(f, "report.json", '{"budgets": 3}'), "report.json: holds other"),
    "recipe": (lambda f: damage(f, "recipe.yaml", "a: [1"), "recipe.yaml: is not valid YAML"),
    "bench": (lambda f: damage(f, "bench.json", "nonsense"), "bench.json: cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_folders_are_refused_with_a_sentence(kind, folder, d2dmoe):
    spoil, words = BAD[kind]
    spoil(folder)
    error = d2dmoe("report", folder, code=1).err
    assert words in error
    assert error.count("\n") == 1


def test_other_mistakes(home, folder, d2dmoe, tmp_path):
    assert "must end in .html" in d2dmoe("report", folder, "--output", tmp_path / "a.pdf", code=1).err
    assert "cannot be written" in d2dmoe("report", folder, "--output", folder / "config.json" / "a.html", code=1).err
    other = folder.with_name("other")
    shutil.copytree(folder, other)
    content = results(other)
    for row in content["rows"]:
        row["metric"]["name"] = "cosine_to_dense"
    damage(other, "results.json", json.dumps(content))
    error = d2dmoe("report", folder, other, code=1).err
    assert "is measured by perplexity" in error
    assert "by cosine_to_dense" in error
    d2dmoe("report", code=2)


def test_a_fault_in_the_report_does_not_cost_the_conversion(home, d2dmoe, tmp_path, monkeypatch):
    monkeypatch.setattr("d2dmoe.pipeline.reporting.collect_usage", lambda *_, **__: 1 / 0)
    result = d2dmoe(*convert_argv(home / "dense", home / "text.txt", tmp_path / "out"))
    assert "without a report: ZeroDivisionError" in result.err
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert "there is no report.json" in (tmp_path / "out" / "report.html").read_text()


def test_the_report_is_written_before_the_folder_appears(home, d2dmoe, tmp_path, monkeypatch):
    def interrupt(*_, **__) -> None:
        assert not (tmp_path / "out").exists()
        raise KeyboardInterrupt

    argv = convert_argv(home / "dense", home / "text.txt", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("d2dmoe.pipeline.reporting.write_report", interrupt)
        d2dmoe(*argv, code=130)
    assert names(tmp_path) == {"out.partial"}
    d2dmoe(*argv, "--resume")
    assert names(tmp_path) == {"out"}
    assert {"report.html", "report.json"} <= names(tmp_path / "out")


def test_a_converted_model_converted_again_takes_no_old_report_along(home):
    from d2dmoe.hub import companions

    assert not {name for name in companions(str(home / "first")) if "report" in name}


def test_write_report_names_its_files(folder, tmp_path):
    files = write_report([folder], tmp_path / "page.html")
    assert files[0] == tmp_path / "page.html"
    assert all(file.is_file() for file in files)


def test_what_projections_do_is_told_by_budget(folder):
    """As the record says it: ranks and shares of low rank, channels, and dense ones."""
    record = json.loads((folder / "config.json").read_text())["quantization_config"]
    stored = D2DMoEConfig.from_dict(record)
    assert page.projection_table(read_conversion(folder)) is None
    stored.projections = [
        Projection("h.0.attn.c_attn", "qkv", 0, 8, 24, [8, 8, 8], rank=8),
        Projection("h.0.attn.c_proj", "o", 1, 8, 8, [8], rank=8),
    ]
    fused, single = ProjectionState("low-rank", (2, 1, 0)), ProjectionState("low-rank", (2,))
    both = [[fused, ProjectionState("channels", (1,), 0.5)], [ProjectionState("channels", (), 0.1), single]]
    for budget, states in zip(stored.budgets, [*both, [ProjectionState()] * 2], strict=True):
        budget.projection_states = states
    record = {"quant_method": "d2dmoe", **stored.to_dict()}
    table = page.projection_table(replace(read_conversion(folder), record=record))
    assert table["header"] == ["projection in h.0.attn", "at 25 %", "at 50 %", "at 75 %"]
    assert table["rows"] == [
        ["c_attn", "rank 2+1+0 (25%)", "channels", "dense"],
        ["c_proj", "channels, rank 1 for the rest", "rank 2 (50%)", "dense"],
    ]


def test_names_lose_the_beginning_that_they_share():
    names = ["bert.encoder.layer.0.output.dense", "bert.encoder.layer.10.output.dense"]
    assert page._shortened(names) == (["0.output.dense", "10.output.dense"], "bert.encoder.layer")
    assert page._shortened(["a.b", "lm_head"]) == (["a.b", "lm_head"], "")
    assert page._shortened(["a.b.c"]) == (["a.b.c"], "")
