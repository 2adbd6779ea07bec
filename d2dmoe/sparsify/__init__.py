"""Sparsity-regularised fine-tuning of a dense model: the first stage of the pipeline."""

from typing import Any

from .options import SparsifyConfig, SparsityConfig

__all__ = ["SparsifyConfig", "SparsifyTrainer", "SparsityConfig", "add_sparsity", "sparsify"]


def __getattr__(name: str) -> Any:
    """The rest needs torch, and `d2dmoe --help` does not: loaded when first asked for."""
    if name == "sparsify":
        from .run import sparsify

        return sparsify
    if name in __all__:
        from . import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
