"""`d2dmoe push`: what is sent to the hub, and folders that are not sent."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cli_support import run_python
from hub_mirror import mirror_environment
from hub_upload import COMMIT, hub_upload

pytestmark = pytest.mark.usefixtures("one_thread")
SEVERAL = """
import json, sys
from d2dmoe.cli import main
print(json.dumps([main(argv) for argv in json.loads(sys.argv[1])]))
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def folder(home: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(home / "first", tmp_path / "first"))


def sparsified(home: Path, folder: Path) -> Path:
    """A folder in the form that `sparsify` leaves."""
    shutil.copytree(home / "dense", folder)
    rows = [{"model": "before"}, {"model": "after"}]
    (folder / "results.json").write_text(json.dumps({"rows": rows}))
    (folder / "recipe.yaml").write_text("regulariser: hoyer\n")
    (folder / "README.md").write_text("---\ntags: [d2dmoe]\n---\n")
    return folder


def test_what_is_sent(home, folder, tmp_path):
    (folder / ".cache").mkdir()
    (folder / ".cache" / "secret").write_text("mine")
    dense = sparsified(home, tmp_path / "sparse")
    with hub_upload() as hub:
        environment = mirror_environment(hub.endpoint, tmp_path / "cache")
        flags = ["--private", "--token", "hf_secret", "--message", "First", "--json", "f.json"]
        calls = [
            ["push", str(folder), "me/converted", *flags], ["push", str(dense), "me/sparse", "--token", "hf_secret"],
            ["push", str(folder), "me/forbidden", "--token", "hf_secret"],
        ]  # fmt: skip
        result = run_python("-c", SEVERAL, json.dumps(calls), cwd=tmp_path, environment=environment)
    assert result.code == 0, result.err
    *addresses, codes = result.out.splitlines()
    assert json.loads(codes) == [0, 0, 1], result.err
    assert addresses == [f"{hub.endpoint}/me/converted", f"{hub.endpoint}/me/sparse"]
    sent = {path: data for path, data in contents(folder).items() if not path.startswith(".cache")}
    assert hub.files["me/converted"] == sent
    assert hub.files["me/sparse"] == contents(dense)
    assert "model.safetensors" in hub.large
    assert "report.html" in sent
    assert [(asked["organization"], asked["name"]) for asked in hub.created] == [("me", "converted"), ("me", "sparse")]
    assert [bool(asked.get("private") or asked.get("visibility") == "private") for asked in hub.created] == [
        True,
        False,
    ]
    assert hub.messages == ["First", "Upload by d2dmoe"]
    assert hub.tokens == {"Bearer hf_secret"}
    assert "me/forbidden: the hub refuses the upload (403); log in with `hf auth login`, or give --token" in result.err
    record = json.loads((tmp_path / "f.json").read_text())
    assert record["rows"][0] == {
        "repository": "me/converted", "address": addresses[0], "commit": COMMIT, "files": len(sent),
    }  # fmt: skip
    assert "hf_secret" not in (tmp_path / "f.json").read_text()
    assert "hf_secret" not in result.err + result.out


def test_no_hub(folder, d2dmoe, monkeypatch):
    class ConnectError(Exception):
        """As the HTTP library of huggingface_hub calls it; which library that is differs between its releases."""

    def unreachable(*_, **__) -> None:
        raise ConnectError("[Errno 111] Connection refused")

    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", unreachable)
    error = d2dmoe("push", folder, "me/converted", code=1).err
    assert "me/converted: the hub cannot be reached" in error
    assert "is no hub id" in d2dmoe("push", folder, "me/too/many", code=1).err


def change_config(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(file.read_text().replace('"n_head": 2', '"n_head": 4'))


BAD = {
    "nothing": (lambda f: shutil.rmtree(f), "no such folder"),
    "working folder": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "no card": (lambda f: (f / "README.md").unlink(), "has no README.md"),
    "no results": (lambda f: (f / "results.json").unlink(), "has no results.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "there is no safetensors file"),
    "truncated": (lambda f: (f / "model.safetensors").write_bytes(b"12345678"), "is truncated or damaged"),
    "changed": (change_config, "config.json is not the one that d2dmoe wrote"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_folders_that_are_not_complete(kind, folder, d2dmoe):
    spoil, words = BAD[kind]
    spoil(folder)
    error = d2dmoe("push", folder, "me/converted", code=1).err
    assert error.startswith(f"d2dmoe: {folder}: ")
    assert words in error


def test_folders_of_others(home, d2dmoe, tmp_path):
    folder = sparsified(home, tmp_path / "sparse")
    assert (
        "HF_HUB_OFFLINE is set" in d2dmoe("push", folder, "me/sparse", code=1).err
    )  # complete: only the hub is missing
    (folder / "results.json").write_text('{"rows": []}')
    assert "was neither converted nor sparsified" in d2dmoe("push", folder, "me/sparse", code=1).err
    assert "has no results.json" in d2dmoe("push", home / "dense", "me/dense", code=1).err
