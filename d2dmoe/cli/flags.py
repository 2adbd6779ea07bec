"""Make flags from dataclasses; read values from flags and recipe files."""

from __future__ import annotations

import argparse
import inspect
import types
import typing
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from ..errors import UserError


def add_fields(parser: argparse.ArgumentParser, config_class: type) -> None:
    """Add a flag for every field. Flags have no defaults: a flag that is not given must not override a recipe.

    The help has a group for each dataclass that this one inherits fields from.
    """
    hints = typing.get_type_hints(config_class)
    groups: dict[type, Any] = {}
    for f in fields(config_class):
        if f.metadata.get("hidden"):
            continue
        owner = next(c for c in config_class.__mro__ if f.name in inspect.get_annotations(c))
        if owner not in groups:
            title = inspect.cleandoc(owner.__doc__ or "").split("\n")[0].rstrip(".")
            groups[owner] = parser.add_argument_group(title)
        default = f.default if f.default is not MISSING else f.default_factory()
        many, kind = f.metadata.get("many"), _plain(hints[f.name])
        shown = ",".join(map(str, default)) if many else default
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": f.name, "choices": f.metadata.get("choices")}
        options["help"] = f.metadata["help"] + ("" if default in (None, "", 0) else f" (default: {shown})")
        flag = "--" + f.name.replace("_", "-")
        if kind is bool:
            groups[owner].add_argument(
                flag, action=argparse.BooleanOptionalAction, **{k: options[k] for k in ("default", "dest", "help")}
            )
        else:
            groups[owner].add_argument(
                flag, type=numbers if many else kind, metavar=None if options["choices"] else f.name.upper(), **options
            )


def _plain(hint: Any) -> type:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(a for a in typing.get_args(hint) if a is not type(None))
    return hint if isinstance(hint, type) else str


def numbers(text: str) -> list[float]:
    """A comma-separated list of numbers; `25%` is 0.25."""
    try:
        return [float(p[:-1]) / 100 if p.endswith("%") else float(p) for p in map(str.strip, text.split(",")) if p]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a comma-separated list of numbers") from None


def given(arguments: argparse.Namespace, config_class: type) -> dict[str, Any]:
    """The fields of this dataclass for which a flag was given."""
    names = {f.name for f in fields(config_class)}
    return {k: v for k, v in vars(arguments).items() if k in names}


def read_recipe(path: str | None) -> dict[str, Any]:
    """The keys of a recipe file; none without a file.

    Raises:
        UserError: If it cannot be read, is not YAML, or is not a mapping.
    """
    if not path:
        return {}
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--recipe {path}: {error.strerror}; give a YAML file of convert's keys") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" near line {mark.line + 1}" if mark else ""
        raise UserError(f"--recipe {path}: not valid YAML{where}; write one `key: value` per line") from None
    if not isinstance(content, dict):
        raise UserError(f"--recipe {path}: not a mapping; write one `key: value` per line")
    return {str(key): value for key, value in content.items()}
