"""`d2dmoe verify`: a whole folder passes, and every damage is found and named."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cli_support import BERT, GPT2, convert_argv, run_in_process, save_model, sentences, weights
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from d2dmoe.cli import main
from d2dmoe.pipeline.folder import CHECKS, check_folder
from d2dmoe.tensors import header

SHARDS = {"one": "5GB", "many": "30KB"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A converted GPT-2 in one file and in several, and the same with other weights; a BERT."""
    root = tmp_path_factory.mktemp("verify")
    (root / "text.txt").write_text("\n".join(sentences(120)))
    save_model("GPT2LMHeadModel", root / "dense", **GPT2)
    save_model("BertForMaskedLM", root / "bert-dense", **BERT)
    for name, size in SHARDS.items():
        more = ("--active", "0.25,0.5", "--max-shard-size", size)
        assert main(convert_argv(root / "dense", root / "text.txt", root / name, *more)) == 0
    assert main(convert_argv(root / "dense", root / "text.txt", root / "other", "--active", "0.25,0.5",
                             "--seed", 1)) == 0  # fmt: skip
    assert main(convert_argv(root / "bert-dense", root / "text.txt", root / "bert", "--experts", 7)) == 0
    return {name: root / name for name in (*SHARDS, "other", "bert", "dense")}


@pytest.mark.parametrize("name", [*SHARDS, "bert"])
def test_a_whole_folder_passes(name, folders, capsys, tmp_path):
    result = run_in_process(capsys, "verify", folders[name], "--json", tmp_path / "rows.json")
    assert result.code == 0, result.err
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["check"] for row in rows] == list(CHECKS)
    assert all(row["ok"] and row["check"] in result.out for row in rows)
    found = {row["check"]: row["found"] for row in rows}
    assert found["checksums"].endswith(" tensors")
    assert found["budgets"].startswith("0.25, 0.5")


def failed(folder: Path) -> str:
    """The check that fails, and what it found."""
    last = list(check_folder(str(folder)))[-1]
    return "" if last["ok"] else f"{last['check']}: {last['found']}"


def tensors_in(folder: Path) -> list[tuple[Path, str, int, int]]:
    """File, name and place of every tensor."""
    found = []
    for file in sorted(folder.glob("*.safetensors")):
        entries, start = header(file)
        found += [(file, n, *(start + o for o in e["data_offsets"])) for n, e in entries.items()]
    return found


def flipped(folder: Path, chance: random.Random) -> str:
    """A bit of one tensor."""
    file, name, begin, end = chance.choice(tensors_in(folder))
    data = bytearray(file.read_bytes())
    data[chance.randrange(begin, end)] ^= 1 << chance.randrange(8)
    file.write_bytes(data)
    return f"checksums: {file.name}: the tensor {name} is not the one"


def flipped_header(folder: Path, chance: random.Random) -> str:
    """A letter of a tensor's name."""
    file, name, *_ = chance.choice(tensors_in(folder))
    file.write_bytes(file.read_bytes().replace(name.encode(), name[:-1].encode() + b"~", 1))
    return ": "


def truncated(folder: Path, chance: random.Random) -> str:
    file = chance.choice(sorted(folder.glob("*.safetensors")))
    data = file.read_bytes()
    file.write_bytes(data[: chance.randrange(len(data))])
    return f"files: {file.name} is truncated or damaged"


def changed(folder: Path, chance: random.Random, change: Callable[[dict, str], None]) -> tuple[str, str]:
    """Tensors changed and the file written again, as a well-formed one."""
    file, name, *_ = chance.choice(tensors_in(folder))
    tensors = load_file(file)
    change(tensors, name)
    save_file(tensors, file, metadata={"format": "pt"})
    return file.name, name


def missing(folder: Path, chance: random.Random) -> str:
    changed(folder, chance, lambda tensors, name: tensors.pop(name))
    return ": "


def extra(folder: Path, chance: random.Random) -> str:
    changed(folder, chance, lambda tensors, _: tensors.update({f"extra.{chance.random()}": torch.ones(3)}))
    return ": "


def renamed(folder: Path, chance: random.Random) -> str:
    changed(folder, chance, lambda tensors, name: tensors.update({f"{name}s": tensors.pop(name)}))
    return ": "


def nan(folder: Path, chance: random.Random) -> str:
    def change(tensors: dict, name: str) -> None:
        name = name if tensors[name].is_floating_point() else next(n for n in tensors if "order" not in n)
        tensors[name].view(-1)[chance.randrange(tensors[name].numel())] = chance.choice([float("nan"), float("inf")])

    changed(folder, chance, change)
    return "checksums: "


def reshaped(folder: Path, chance: random.Random) -> str:
    changed(folder, chance, lambda tensors, name: tensors.update({name: tensors[name].reshape(-1)[:-1].clone()}))
    return ": "


def swapped_tensors(folder: Path, chance: random.Random) -> str:
    def change(tensors: dict, name: str) -> None:
        alike = [n for n in tensors if tensors[n].shape == tensors[name].shape and not tensors[n].equal(tensors[name])]
        if alike:
            other = chance.choice(alike)
            tensors[name], tensors[other] = tensors[other], tensors[name]
        else:
            tensors[name] = tensors[name] + 1

    changed(folder, chance, change)
    return "checksums: "


def other_file(folder: Path, _: random.Random) -> str:
    """The weights of another conversion of the same model."""
    shutil.copy(folder.parent / "other.safetensors", folder / "model.safetensors")
    return ": "


def swapped_shards(folder: Path, chance: random.Random) -> str:
    files = sorted(folder.glob("*.safetensors"))
    if len(files) < 2:
        return other_file(folder, chance)
    first, second = chance.sample(files, 2)
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)
    return "files: "


def lost_file(folder: Path, chance: random.Random) -> str:
    file = chance.choice([*sorted(folder.glob("*.safetensors")), folder / "checksums.json", folder / "config.json"])
    file.unlink()
    return ": "


def record(folder: Path, chance: random.Random) -> str:
    """One value of the record."""
    config = json.loads((folder / "config.json").read_text())
    stored = config["quantization_config"]
    key = chance.choice(sorted(stored))
    match stored[key]:
        case list():
            stored[key] = chance.choice([stored[key][::-1], stored[key][:1], [], None])
        case dict():
            stored[key] = 3
        case value:
            stored[key] = chance.choice([f"{value}x", -7, [value], None])
    (folder / "config.json").write_text(json.dumps(config))
    return ": "


def config(folder: Path, chance: random.Random) -> str:
    """One value outside the record."""
    config = json.loads((folder / "config.json").read_text())
    key = chance.choice(["n_head", "activation_function", "layer_norm_epsilon", "n_layer", "model_type", "n_positions"])
    config[key] = {"n_head": 1, "activation_function": "relu", "layer_norm_epsilon": 0.1, "n_layer": 1,
                   "model_type": "gtp2", "n_positions": 32}[key]  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return ": "


KINDS = (flipped, flipped, flipped_header, truncated, missing, extra, renamed, nan, reshaped, swapped_tensors,
         swapped_shards, lost_file, record, config)  # fmt: skip


def damages(folders: dict[str, Path], root: Path, count: int) -> Iterator[tuple[Path, str, str]]:
    """Damaged copies of the folders, what was done, and how the sentence begins."""
    chance = random.Random(0)
    for number in range(count):
        kind, name = KINDS[number % len(KINDS)], chance.choice(list(SHARDS))
        folder = root / str(number) / "moe"
        shutil.copytree(folders[name], folder)
        shutil.copy(folders["other"] / "model.safetensors", folder.parent / "other.safetensors")
        yield folder, f"{number} {kind.__name__} {name}", kind(folder, chance)


def test_every_damage_is_found(folders, tmp_path):
    unseen = []
    for folder, what, begins in damages(folders, tmp_path, 112):
        found = failed(folder)
        if not (found.startswith(begins) or (begins == ": " and found)):
            unseen.append((what, begins, found))
        shutil.rmtree(folder.parent)
    assert not unseen


def test_the_first_failing_check_is_the_exit_code(folders, capsys, tmp_path):
    shutil.copytree(folders["one"], tmp_path / "moe")
    begins = flipped(tmp_path / "moe", random.Random(3)).partition(": ")[2]
    result = run_in_process(capsys, "verify", tmp_path / "moe", "--json", tmp_path / "rows.json")
    assert result.code == 1
    assert f"the check checksums failed: {begins}" in result.err
    assert "| checksums | failed |" in result.out
    assert [row["ok"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]] == [True, True, False]
    for wrong in (folders["dense"], tmp_path / "absent"):
        assert run_in_process(capsys, "verify", wrong).code == 1


@pytest.mark.parametrize("place", ["again", "moe"])
def test_saving_again_leaves_no_stale_checksums(place, folders, tmp_path):
    """Changed weights, saved into another folder or into the same one, are whole."""
    shutil.copytree(folders["one"], tmp_path / "moe")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    model.save_pretrained(tmp_path / place)
    assert failed(tmp_path / place) == ""
    rows = {row["check"]: row["found"] for row in check_folder(str(tmp_path / place))}
    assert rows["checksums"].startswith("none stored")
    assert weights(tmp_path / place) != weights(folders["one"])


def test_what_checksums_do_not_cover_is_found_without_them(folders, tmp_path):
    """Folders that were saved again: NaN, foreign tensors, and orders that are no permutation."""
    AutoModelForCausalLM.from_pretrained(folders["one"]).save_pretrained(tmp_path / "moe")
    whole = load_file(tmp_path / "moe/model.safetensors")
    key = "transformer.h.1.mlp.order"
    wrong = {
        "finite: model.safetensors: transformer.h.0.mlp.constants": {
            "transformer.h.0.mlp.constants": whole["transformer.h.0.mlp.constants"] / 0
        },
        "dense twin: the tensor foreign.weight belongs": {"foreign.weight": torch.ones(2)},
        f"experts: {key} holds no permutation": {key: whole[key].clamp_max(5)},
    }
    for begins, tensors in wrong.items():
        save_file({**whole, **tensors}, tmp_path / "moe/model.safetensors", metadata={"format": "pt"})
        assert failed(tmp_path / "moe").startswith(begins)
