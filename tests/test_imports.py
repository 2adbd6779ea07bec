"""Which part of the package may import which, read off the syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter

import pytest
from conftest import ROOT

PACKAGE = ROOT / "d2dmoe"
# From top to bottom; a folder imports from those below it only. What is not named lies at the bottom.
FOLDERS = ("cli", "pipeline", "sparsify", "stages", "attention", "measure", "report", "discovery", "openvino", "moe",
           "kernels")  # fmt: skip
FILES = {".".join(p.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip("."): p
         for p in sorted(PACKAGE.rglob("*.py"))}  # fmt: skip


def imported(module: str) -> Iterator[str]:
    """Modules of this package, by their name below it, that a module imports anywhere in its text."""
    path = FILES[module]
    package = list(path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            for name in (alias.name for alias in node.names):
                inner = ".".join([*base, name])
                yield inner if inner in FILES else ".".join(base)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not any(name.split(".")[0] == "d2dmoe" for name in names), f"{path}: imports of our own are relative"


def rank(module: str) -> int:
    """Place of a module's folder, 0 for the top."""
    folder = module.split(".")[0]
    return FOLDERS.index(folder) if folder in FOLDERS else len(FOLDERS)


@pytest.mark.parametrize("module", [m for m in FILES if m.split(".")[0] in ("moe", "kernels") or m == "config.record"])
def test_a_loaded_checkpoint_needs_no_part_of_the_conversion(module):
    above = ("cli", "pipeline", "sparsify", "attention", "stages", "measure", "report", "discovery", "convert")
    assert not [name for name in imported(module) if name.split(".")[0] in above]


@pytest.mark.parametrize("module", [m for m in FILES if m.split(".")[0] == "kernels"])
def test_the_kernels_import_nothing_above_them(module):
    assert not [name for name in imported(module) if name.split(".")[0] != "kernels"]


@pytest.mark.parametrize("module", [m for m in FILES if m not in ("", "__main__", "convert")])
def test_arrows_go_down_only(module):
    assert not [name for name in imported(module) if name == "" or rank(name) < rank(module)]


def test_there_is_no_circle():
    TopologicalSorter({module: set(imported(module)) - {module} for module in FILES}).prepare()


def test_only_the_command_line_prints():
    calls = {
        module
        for module, path in FILES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    assert {module.split(".")[0] for module in calls} == {"cli"}
