"""Files that are either the old ones or the new ones, whenever the process dies."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from .errors import UserError

DIGESTED = 2**28  # bytes of files whose contents are compared, a second's work; beyond that their times decide


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A temporary name beside `file`, which takes the place of `file` once the block has written it.

    Yields:
        The temporary path.
    """
    scratch = file.with_name(file.name + ".tmp")
    yield scratch
    os.replace(scratch, file)


def read_yaml(file: Path) -> dict[str, Any]:
    """What a YAML file maps; nothing if there is no such file, or no mapping in it.

    Raises:
        UserError: If it is damaged.
    """
    if not file.is_file():
        return {}
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        raise UserError(f"{file}: is not valid YAML; copy it again from where it came from") from None
    return content if isinstance(content, dict) else {}


def write_text(file: Path, text: str) -> None:
    """Write a text file under a temporary name and rename it."""
    with replacing(file) as scratch:
        scratch.write_text(text)


def is_lfs_pointer(data: bytes) -> bool:
    """Whether this is the beginning of a file that Git LFS has not fetched, and that only names the real one."""
    return data.startswith(b"version https://git-lfs.github.com/spec/")


def identity(files: Mapping[str, Path]) -> dict[str, Any]:
    """What tells whether files are still the same ones: sizes, times and, unless they are large, a digest.

    Args:
        files: By the name that they go by.
    """
    found = {name: path.stat() for name, path in files.items()}
    digest = hashlib.blake2b(digest_size=16)
    small = sum(stat.st_size for stat in found.values()) <= DIGESTED
    for path in files.values() if small else ():
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return {
        "sizes": {name: stat.st_size for name, stat in found.items()},
        "times": [stat.st_mtime_ns for stat in found.values()],
        "digest": digest.hexdigest() if small else "",
    }


def same_files(then: Any, now: Any) -> bool:
    """Are these the same files? Other times alone do not make them others where the contents are known.

    Args:
        then, now: What `identity` gave, with further keys that must be equal.
    """
    if not (isinstance(then, dict) and isinstance(now, dict)):
        return then == now
    either = {"times", "digest"}
    if {k: v for k, v in then.items() if k not in either} != {k: v for k, v in now.items() if k not in either}:
        return False
    return then.get("times") == now.get("times") or then.get("digest") == now.get("digest") != ""
