"""Files that are either the old ones or the new ones, whenever the process dies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A temporary name beside `file`, which takes the place of `file` once the block has written it.

    Yields:
        The temporary path.
    """
    scratch = file.with_name(file.name + ".tmp")
    yield scratch
    os.replace(scratch, file)


def write_text(file: Path, text: str) -> None:
    """Write a text file under a temporary name and rename it."""
    with replacing(file) as scratch:
        scratch.write_text(text)


def is_lfs_pointer(data: bytes) -> bool:
    """Whether this is the beginning of a file that Git LFS has not fetched, and that only names the real one."""
    return data.startswith(b"version https://git-lfs.github.com/spec/")
