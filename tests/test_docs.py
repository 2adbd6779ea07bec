"""README and guides against the project: links, anchors, commands, flags, quoted errors, Python examples."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import textwrap
import unicodedata
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT

from d2dmoe.cli import app
from d2dmoe.cli.flags import given
from d2dmoe.config import ConvertConfig, resolve
from d2dmoe.sparsify.options import (
    SparsifyConfig,
    further_options,
    resolve_sparsify,
    sparsify_stage,
    training_arguments,
)

GUIDES = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "recipes" / "README.md", *GUIDES]
VERBS = {module.NAME: module for module in app.VERBS}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`]+)`")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    """A page without its code blocks, its lines joined: inline code may go over a line end."""
    return re.sub(r"\s*\n(?=\S)", " ", FENCE.sub("", page.read_text()))


# --- links -----------------------------------------------------------------------------------------------------------


def headings(page: Path) -> list[str]:
    return [line.lstrip("#").strip() for line in FENCE.sub("", page.read_text()).splitlines() if re.match("#+ ", line)]


def anchors_of_github(titles: list[str]) -> set[str]:
    """Lower case, punctuation dropped, one hyphen for every space; repetitions get -1, -2, …"""
    found: dict[str, int] = {}
    for title in titles:
        slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {f"{slug}-{n}" if n else slug for slug, count in found.items() for n in range(count + 1)}


def anchors_of_mkdocs(titles: list[str]) -> set[str]:
    """ASCII only, runs of spaces and hyphens become one hyphen; repetitions get _1, _2, …"""
    found: dict[str, int] = {}
    for title in titles:
        ascii_only = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode()
        slug = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", ascii_only).strip().lower())
        found[slug] = found.get(slug, -1) + 1
    return {f"{slug}_{n}" if n else slug for slug, count in found.items() for n in range(count + 1)}


def broken(page: Path) -> Iterator[str]:
    """Relative links of a page that lead nowhere, on GitHub or on the site."""
    for link in LINK.findall(FENCE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        there = target.exists() and (page not in GUIDES or ROOT / "docs" in target.parents)
        if there and anchor:
            there = anchor in anchors_of_github(headings(target)) & anchors_of_mkdocs(headings(target))
        if not there:
            yield link


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_and_anchors_exist(page):
    assert not list(broken(page))


def test_a_broken_link_is_noticed(tmp_path):
    page = tmp_path / "p.md"
    page.write_text(
        "# One `--flag` two\n[a](gone.md) [b](#one---flag-two) [c](#two) [d](https://example.org) [e](p.md)\n"
    )
    assert list(broken(page)) == ["gone.md", "#one---flag-two", "#two"]  # the second is GitHub's anchor alone


def test_anchors():
    titles = ["Kernels and dispatch", "Again", "Again", "It's 2 × 3"]
    assert anchors_of_github(titles) == {"kernels-and-dispatch", "again", "again-1", "its-2--3"}
    assert anchors_of_mkdocs(titles) == {"kernels-and-dispatch", "again", "again_1", "its-2-3"}


def test_every_guide_is_in_the_navigation_and_linked_from_the_readme():
    navigation = (ROOT / "mkdocs.yml").read_text()
    readme = (ROOT / "README.md").read_text()
    for guide in GUIDES:
        assert f": {guide.name}\n" in navigation
        assert guide.name == "index.md" or f"(docs/{guide.name})" in readme


# --- the README ------------------------------------------------------------------------------------------------------


def test_the_readme_is_short_and_begins_with_the_two_commands():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) < 120
    commands = [line.partition("#")[0].strip() for line in lines[3:5]]
    assert commands == ["make demo", "make test"]


def test_pictures_are_small():
    pictures = list((ROOT / "docs" / "images").iterdir())
    assert pictures
    assert all(p.stat().st_size < 100_000 for p in pictures)


# --- commands --------------------------------------------------------------------------------------------------------


def commands(page: Path) -> list[str]:
    """Calls of `d2dmoe` in code blocks that are not Python, continued lines joined."""
    text = "\n".join(body for language, body in FENCE.findall(page.read_text()) if language != "python")
    return [line.strip() for line in text.replace("\\\n", " ").splitlines() if re.search(r"\bd2dmoe [a-z]", line)]


COMMANDS = [(page, command) for page in PAGES for command in commands(page)]


def parse(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Parse a command as the command line does, the values of `convert` and `sparsify` included; nothing runs."""
    words = shlex.split(command.replace("…", ""), comments=True)
    words = words[words.index("d2dmoe") + 1 :]

    def check(arguments, _):
        more = further_options(arguments.further)
        if words[0] == "convert":
            config = resolve(ConvertConfig, {**given(arguments, ConvertConfig), **more})
            both = config.sparsify != "skip" and sparsify_stage(config, str(tmp_path))
        else:
            both = words[0] == "sparsify" and resolve_sparsify({**given(arguments, SparsifyConfig), **more})
        if both:
            training_arguments(both[1], both[0], str(tmp_path))
        return 0

    for module in app.VERBS:
        monkeypatch.setattr(module, "run", check)
    monkeypatch.setattr(app, "_quiet", lambda: None)
    monkeypatch.chdir(tmp_path)
    try:
        code = app.main([*words, "--debug"])
    except SystemExit as stop:
        code = stop.code
    assert code == 0, command


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{name(p)}: {c[:60]}" for p, c in COMMANDS])
def test_commands_parse(page, command, monkeypatch, tmp_path):
    parse(command, monkeypatch, tmp_path)


WRONG = [
    "d2dmoe convert --model a --activ 0.5",
    "d2dmoe convert --model a --gate best",
    "d2dmoe bench --model a --plt b",
    "d2dmoe sparsify --model a --max-stps 3",
    "d2dmoe convert --model a --sparsify l1 --sparsify-alhpa 1",
]


@pytest.mark.parametrize("command", WRONG)
def test_a_wrong_command_is_noticed(command, monkeypatch, tmp_path):
    with pytest.raises((AssertionError, app.UserError)):
        parse(command, monkeypatch, tmp_path)


@cache
def flags(verb: str) -> set[str]:
    """The flags of a verb, with those of the library that it hands flags on to."""
    from transformers import TrainingArguments

    parsers = next(
        action for action in app._parser()._actions if action.choices and "convert" in action.choices
    ).choices
    own = {flag for action in parsers[verb]._actions for flag in action.option_strings}
    return own | ({"--" + f.name.replace("_", "-") for f in fields(TrainingArguments)} if verb == "sparsify" else set())


# Of the scripts in recipes/, of mkdocs, and the beginning of others.
NOT_OURS = {"--config", "--log", "--methods", "--seeds", "--only", "--shapes", "--presets", "--folder", "--compile",
            "--strict", "--sparsify-", "--quick", "--paper", "--base", "--table", "--record",
            "--eval-data"}  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_flags_in_the_text_exist(page):
    for code in CODE.findall(prose(page)):
        verb = re.match(r"d2dmoe ([a-z]+)", code)
        known = flags(verb[1]) if verb else NOT_OURS.union(*map(flags, VERBS))
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", code)) <= known, code


# --- quoted errors ---------------------------------------------------------------------------------------------------


@cache
def sentences() -> list[str]:
    """Every text in the package, with `…` where a value is filled in."""
    found = []
    for path in (ROOT / "d2dmoe").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            if all(isinstance(p, ast.FormattedValue) or isinstance(getattr(p, "value", None), str) for p in parts):
                found.append("".join(p.value if isinstance(p, ast.Constant) else "…" for p in parts))
    return found


def stands_in_the_source(quoted: str) -> bool:
    parts = [re.escape(part) for part in quoted.split("…")]
    return any(re.search(".*".join(parts), sentence, re.DOTALL) for sentence in sentences())


QUOTED = re.findall(r"^### `(.+)`$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("quoted", QUOTED)
def test_quoted_errors_stand_in_the_source(quoted):
    assert stands_in_the_source(quoted)


def test_a_misquoted_error_is_noticed():
    assert len(QUOTED) > 20
    assert not stands_in_the_source("--model …: no such directory; check the path")


# --- Python ----------------------------------------------------------------------------------------------------------

EXAMPLES = [(p, textwrap.dedent(body)) for p in PAGES for language, body in FENCE.findall(p.read_text())
            if language == "python"]  # fmt: skip


@pytest.mark.parametrize(("page", "code"), EXAMPLES, ids=[name(page) for page, _ in EXAMPLES])
def test_python_examples_use_names_that_exist(page, code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "d2dmoe":
            assert hasattr(importlib.import_module("d2dmoe"), node.attr)
