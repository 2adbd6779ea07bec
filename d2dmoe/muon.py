"""Muon for the matrices inside a model and AdamW for the rest, as one optimiser.

A model trained from scratch in few steps needs a third of them: see `recipes/vit_cifar10`. `torch.optim.Muon` takes
matrices alone, and a training wants one optimiser with one schedule and one state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


class MuonWithAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` (Jordan et al. 2024) with the step sizes of AdamW, and AdamW beside it.

    Args:
        matrices: Parameters ``(out, in)`` for Muon.
        others: Groups of parameters for AdamW.
        lr: Peak learning rate of both: Muon's updates are scaled to the root mean square of AdamW's, 0.2 (Liu et al.,
            "Muon is Scalable for LLM Training", arXiv 2502.16982).
        betas: Of AdamW.
        weight_decay: Decoupled, of the matrices. A group of `others` has its own.
    """

    def __init__(
        self, matrices: list[nn.Parameter], others: list[dict[str, Any]], lr: float, betas: tuple[float, float],
        weight_decay: float,
    ):  # fmt: skip
        self._parts: list[torch.optim.Optimizer] = []
        parts = [torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")]
        if others:
            parts.append(torch.optim.AdamW(others, lr=lr, betas=betas))
        super().__init__([group for part in parts for group in part.param_groups], {"lr": lr})
        self._parts = parts
        self._share()

    def _share(self) -> None:
        """Let the two work on this one's groups and state: schedules and saved states know only these."""
        taken = 0
        for part in self._parts:
            count = len(part.param_groups)
            part.state, part.param_groups = self.state, self.param_groups[taken : taken + count]
            taken += count

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One step of both."""
        if closure is not None:
            raise ValueError("a closure would be evaluated twice; call backward before step")
        for part in self._parts:
            part.step()


def inner_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Matrices that Muon is for: those of a model's body, neither embeddings nor the head, which stay with AdamW."""
    body = model.base_model if isinstance(model, PreTrainedModel) else model
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    inner = {id(parameter) for parameter in body.parameters()} - tables
    return [p for p in model.parameters() if p.requires_grad and p.ndim == 2 and id(p) in inner]
