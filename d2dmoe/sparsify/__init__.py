"""Sparsity-regularised fine-tuning of a dense model: the first stage of the pipeline."""

from typing import Any

from .options import SparsifyConfig, SparsityConfig

__all__ = ["SparsifyConfig", "SparsifyTrainer", "SparsityConfig", "activation_shares", "add_sparsity"]


def __getattr__(name: str) -> Any:
    """The rest needs torch, and `d2dmoe --help` does not: loaded when first asked for."""
    if name == "activation_shares":
        from .statistics import activation_shares

        return activation_shares
    if name in __all__:
        from . import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
