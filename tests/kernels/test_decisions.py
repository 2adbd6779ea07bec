"""Decisions that took timing: made once on a machine, whatever becomes of the file they are kept in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from d2dmoe.kernels import decisions, dispatch
from d2dmoe.kernels.decisions import Decisions, machine

PLACE = ("mlp", 8, 32, 4, torch.float32)


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of decisions; the process has none of its own."""
    monkeypatch.setenv("D2DMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dispatch, "_STORED", Decisions())
    monkeypatch.setattr(dispatch, "_TAKEN", {})
    return tmp_path / "cache" / "ways.json"


def choose(monkeypatch: pytest.MonkeyPatch, name: str, tokens: int = 4) -> tuple[str, int]:
    """What is chosen where timing would say `name`, and how often it was asked."""
    asked: list[int] = []
    monkeypatch.setattr(dispatch, "fastest", lambda ways, x: asked.append(len(x)) or name)
    return dispatch.choose_way(PLACE, {"sparse": None, "dense": None}, torch.empty(tokens, 8)), len(asked)


def as_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_STORED", Decisions())
    monkeypatch.setattr(dispatch, "_TAKEN", {})


def test_a_later_process_does_not_time_again(stored, monkeypatch):
    assert choose(monkeypatch, "dense") == ("dense", 1)
    assert choose(monkeypatch, "sparse") == ("dense", 0)
    as_a_new_process(monkeypatch)
    assert choose(monkeypatch, "sparse") == ("dense", 0)
    assert choose(monkeypatch, "sparse", tokens=64) == ("sparse", 1)
    assert set(json.loads(stored.read_text())) == {machine()}
    assert sorted(json.loads(stored.read_text())[machine()].values()) == ["dense", "sparse"]
    assert [p.name for p in stored.parent.iterdir()] == ["ways.json"]


def test_another_machine_decides_for_itself(stored, monkeypatch):
    choose(monkeypatch, "dense")
    as_a_new_process(monkeypatch)
    monkeypatch.setattr(decisions, "machine", lambda: "another")
    assert choose(monkeypatch, "sparse") == ("sparse", 1)
    assert len(json.loads(stored.read_text())) == 2  # sharing a home, neither loses its own


def test_forgotten_for_good(stored, monkeypatch):
    choose(monkeypatch, "dense")
    dispatch.forget_ways()
    as_a_new_process(monkeypatch)
    assert choose(monkeypatch, "sparse") == ("sparse", 1)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"m": 3}', "null", '"x"', "\x00\xff"])
def test_a_damaged_file_is_as_none(text, stored, monkeypatch):
    stored.parent.mkdir()
    stored.write_text(text)
    assert choose(monkeypatch, "dense") == ("dense", 1)
    as_a_new_process(monkeypatch)
    assert choose(monkeypatch, "sparse") == ("dense", 0)


def test_a_way_that_is_no_more_is_decided_again(stored, monkeypatch):
    choose(monkeypatch, "packed")
    as_a_new_process(monkeypatch)
    assert choose(monkeypatch, "sparse") == ("sparse", 1)


def test_nowhere_to_write(stored, monkeypatch):
    stored.parent.write_text("a file where the folder should be")
    assert choose(monkeypatch, "dense") == ("dense", 1)
    assert choose(monkeypatch, "sparse") == ("dense", 0)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"D2DMOE_CACHE": ""}, None),
        ({"D2DMOE_CACHE": "a"}, "a/ways.json"),
        ({"XDG_CACHE_HOME": "b"}, "b/d2dmoe/ways.json"),
        ({"HOME": "/c"}, "/c/.cache/d2dmoe/ways.json"),
    ],
)
def test_where_it_lies(variables, expected, monkeypatch):
    for name in ("D2DMOE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert decisions.file() == (Path(expected) if expected else None)


def test_processes_that_decide_at_once_leave_a_file_that_can_be_read(stored):
    code = (
        "import sys; from d2dmoe.kernels.decisions import Decisions\n"
        "d = Decisions()\n"
        "for n in range(50): d.put(f'{sys.argv[1]} {n}', 'dense')"
    )
    env = {**os.environ, "D2DMOE_CACHE": str(stored.parent)}
    runs = [subprocess.Popen([sys.executable, "-c", code, str(k)], env=env) for k in range(2)]
    assert [run.wait() for run in runs] == [0, 0]
    assert len(json.loads(stored.read_text())[machine()]) >= 50
    assert [p.name for p in stored.parent.iterdir()] == ["ways.json"]
