"""Train all routers in one pass over the frozen model, with layer inputs held for one batch at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...config.options import RouterConfig, TrainingConfig
from ...data.batches import Batches
from ...measure.observe import run_observed
from ...moe.gating import set_gate
from ...moe.layer import DynamicFFN, layers
from ...training import train
from .targets import RouterTarget

ROWS_HELD = 8192  # rows of every layer kept at a time


def binary_cross_entropy(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Between targets in [0, 1] and the probabilities `1 - exp(-score)` of the non-negative scores, mean."""
    scores = scores.clamp(1e-6, 50.0)
    return (scores * (1 - targets) - targets * torch.log(-torch.expm1(-scores))).mean()


LOSSES = {"mse": torch.nn.functional.mse_loss, "bce": binary_cross_entropy}


class RouterBank(nn.Module):
    """The routers of all layers as one trainable module; what else the model has is not trained."""

    def __init__(self, converted: list[DynamicFFN], loss: str = "mse"):
        super().__init__()
        self.loss = LOSSES[loss]
        self.routers = nn.ModuleList(layer.router for layer in converted)

    def forward(self, samples: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """Sum over layers of the loss between scores and targets (Szatkowski et al. 2024, eq. 4, for `mse`).

        Layers may lie on different devices (`device_map`); samples are where their layer is.
        """
        device = self.routers[0].hidden.device
        losses = [
            self.loss(router(x), target).to(device) for router, (x, target) in zip(self.routers, samples, strict=True)
        ]
        return torch.stack(losses).sum()


class RouterSamples:
    """Layer inputs and expert norms, by micro-batch number.

    One forward pass of the dense model fills a buffer with the rows of one data batch for every layer; it serves
    `per_pass` micro-batches of rows drawn without replacement and is then dropped. Memory: rows of one batch times
    (d_model + experts) per layer. Data batches repeat in a new order when they are used up.
    """

    def __init__(self, model: nn.Module, batches: Batches, rows: int, seed: int, target: RouterTarget):
        self.model, self.batches, self.rows, self.seed, self.target = model, batches, rows, seed, target
        per_batch = max(1, batches.tokens // max(len(batches), 1))
        self.per_pass = max(1, min(per_batch, ROWS_HELD) // rows)
        self._held: tuple[int, list[tuple[torch.Tensor, torch.Tensor]]] = (-1, [])
        self._order: tuple[int, Batches | None] = (-1, None)

    def __call__(self, number: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """`(inputs, targets)` of every layer for micro-batch `number`."""
        pass_number, part = divmod(number, self.per_pass)
        if self._held[0] != pass_number:
            self._held = (-1, [])  # let go of the last pass before the next one
            self._held = (pass_number, self._capture(pass_number))
        out = []
        for x, target in self._held[1]:
            start = part % len(x)  # the last data batch may have fewer rows than a pass has parts: they serve again
            out.append((x[start :: self.per_pass][: self.rows], target[start :: self.per_pass][: self.rows]))
        return out

    def _batch(self, pass_number: int) -> dict[str, Any]:
        epoch, index = divmod(pass_number, len(self.batches))
        if self._order[0] != epoch:
            self._order = (epoch, self.batches.shuffled(self.seed + epoch))
        return self._order[1][index]

    @torch.no_grad()
    def _capture(self, pass_number: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        held: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + pass_number)

        def collect(index, layer, x, hidden, scores, run):
            room = min(ROWS_HELD // layer.block.calls, x.shape[0])
            keep = torch.randperm(x.shape[0], generator=generator)[:room].to(x.device)
            x, hidden = x[keep].clone(), hidden[:, keep]
            held.setdefault(index, []).append((x, self.target(index, layer, x, hidden)))

        with set_gate(self.model, tau=0):
            run_observed(self.model, [self._batch(pass_number)], collect)
        return [tuple(torch.cat(parts) for parts in zip(*held.pop(i), strict=True)) for i in sorted(held)]


def train_routers(
    model: nn.Module, batches: Batches, config: RouterConfig, *, state_dir: Path | None = None, resume: bool = False
) -> list[dict[str, float]]:
    """Train the routers of a converted model on their layers' inputs; returns the training log.

    Args:
        model: Converted model; only its routers change, from a random start if `router_fit` is `trained`.
        batches: Calibration batches.
        config: Sizes and seed.
        state_dir: Where resumable states go.
        resume: Continue from there.
    """
    converted = layers(model)
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    for index, layer in enumerate(converted):
        if config.router_fit == "trained":
            layer.router.reset(config.seed * 1000 + index)
        layer.router.requires_grad_(True)
    target = RouterTarget(model, batches.first(config.calibration_tokens), config.router_target)
    samples = RouterSamples(model, batches, config.router_batch, config.seed, target)
    settings = TrainingConfig(
        steps=max(1, config.router_tokens // config.router_batch),
        learning_rate=config.router_learning_rate,
        adam_betas=(0.9, 0.99),
        seed=config.seed,
        save_every=500,
    )
    try:
        return train(
            RouterBank(converted, config.router_loss), samples, lambda bank, batch: bank(batch), settings,
            name="routers", state_dir=state_dir, resume=resume, placed=True,
        )  # fmt: skip
    finally:
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)
