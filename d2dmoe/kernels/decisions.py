"""Decisions that took timing, kept in a file of the user's cache, so that each machine makes them once.

The file is a convenience: it may be absent, damaged or not writable, and then decisions are made again. Two processes
that decide at once may lose one of the two decisions, never the file.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from .cpu import native

KEPT = 4096  # the latest so many decisions of a machine


def file() -> Path | None:
    """`ways.json` in `$D2DMOE_CACHE`, by default `d2dmoe` in the user's cache; `None` where that is set to nothing."""
    folder = os.environ.get("D2DMOE_CACHE")
    if folder is None:
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "d2dmoe")
    return Path(folder) / "ways.json" if folder else None


def processor() -> str:
    """The processor's name, or what kind it is where it has none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@cache
def machine() -> str:
    """What a decision holds for: processor, PyTorch, our library and the kernels chosen by the environment."""
    library = f"{zlib.crc32(native.LIBRARY.read_bytes()):08x}" if native.LIVE else "none"
    isa = os.environ.get("D2DMOE_ISA", "")
    return f"{processor()}, {os.cpu_count()} cores, torch {torch.__version__}, library {library}{isa and ', ' + isa}"


class Decisions:
    """What was chosen on this machine, by key; read from the file when first asked."""

    def __init__(self, where: Callable[[], Path | None] = file) -> None:
        self.where = where
        self.known: dict[str, str] | None = None

    def get(self, key: str) -> str | None:
        """The decision, `None` before it was made."""
        if self.known is None:
            self.known = self._read().get(machine(), {})
        return self.known.get(key)

    def put(self, key: str, way: str) -> None:
        """Keep a decision, here and in the file."""
        stored = self._read()
        self.known = {**(self.known or {}), key: way}
        ours = {**stored.get(machine(), {}), **self.known}
        self._write({**stored, machine(): dict(list(ours.items())[-KEPT:])})

    def clear(self) -> None:
        """Forget this machine's decisions, on disk as well."""
        self.known = {}
        stored = self._read()
        if stored.pop(machine(), None) is not None:
            self._write(stored)

    def _read(self) -> dict[str, dict[str, str]]:
        path = self.where()
        try:
            stored = json.loads(path.read_text()) if path is not None else {}
            return {str(m): {str(k): str(v) for k, v in ways.items()} for m, ways in stored.items()}
        except (OSError, ValueError, AttributeError):
            return {}

    def _write(self, stored: dict[str, dict[str, str]]) -> None:
        path = self.where()
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as scratch:
                json.dump(stored, scratch, indent=0)
            os.replace(scratch.name, path)
        except OSError:  # no home, no room, no right to write
            return
