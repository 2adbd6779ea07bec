"""What `import d2dmoe` registers with `transformers`, at once or as soon as somebody imports it.

`transformers` takes seconds to import, so `import d2dmoe` waits for the user's own import of it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# A module of transformers: the one of ours that registers itself there when imported.
FOLLOWS = {
    "transformers.quantizers.auto": "d2dmoe.moe.quantizer",
    "transformers.activations": "d2dmoe.moe.fatrelu",
}


class PostImportHook(MetaPathFinder):
    """Has ours imported right after theirs, in the thread that imports theirs."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of the other finders; executing its module goes on to ours."""
        if fullname not in FOLLOWS:
            return None
        found = (f.find_spec(fullname, path, target) for f in sys.meta_path if f is not self)
        spec = next((s for s in found if s is not None), None)
        if spec is not None and spec.loader is not None:
            _go_on(spec.loader, fullname)
        return spec


def _go_on(loader: Loader, theirs: str) -> None:
    """Have this loader of one module of theirs import ours when it has executed it."""
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        _import_ours(theirs)

    loader.exec_module = exec_module


def _import_ours(theirs: str) -> None:
    """Unless it is being imported: it registers itself in its end, and waiting for another thread's import of it, which
    may wait for the module that we are in, would hold up both."""
    if FOLLOWS[theirs] not in sys.modules:
        importlib.import_module(FOLLOWS[theirs])


def register_late() -> None:
    """Register with those parts of `transformers` that are there, and with the others when they come."""
    if not any(isinstance(finder, PostImportHook) for finder in sys.meta_path):
        sys.meta_path.insert(0, PostImportHook())
    for theirs in FOLLOWS:
        if theirs in sys.modules:
            _import_ours(theirs)
