"""Distil a network of two layers for each projection around attention (Szatkowski et al. 2024, sec. 3.4).

All of them are trained at once on what the projections read in the dense model, whose passes go on meanwhile: memory
holds the rows of a few batches. A network works on inputs and outputs of mean 0 and variance 1, so that one learning
rate fits them all; the scales are folded into its weights at the end. It starts as the best linear map that it can be:
two neurons of opposite signs pass a number on, `relu(a) - relu(-a) = a`, so half as many ranks as neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config.options import AttentionConfig, TrainingConfig
from ..config.projections import Projection
from ..config.record import Block
from ..data.batches import Batches
from ..discovery.inputs import on_small_inputs
from ..measure.observe import model_inputs, pieces, real_rows, trunk_below
from ..moe.network import put_network
from ..moe.packing import matrix_of, sizes
from ..training import train

ROWS_HELD, BYTES_HELD = 8192, 2**29  # of every tensor that projections read; of all of them
STATISTICS_TOKENS = 8192
FLOOR = 1e-4  # of an output's variance, relative to the mean variance
SAVE_EVERY = 500  # steps
Rows = dict[int, list[torch.Tensor]]  # what a group of projections reads, ``(rows, inputs)`` each


class Normalised(nn.Module):
    """The network of one projection, between inputs and outputs of mean 0 and variance 1.

    Args:
        dense: The projection.
        block: What stands in its place.
        x, y: Inputs ``(rows, inputs)`` and outputs ``(rows, outputs)`` that the scales are taken from.
        seed: Of the start.
    """

    def __init__(self, dense: nn.Module, block: Block, x: torch.Tensor, y: torch.Tensor, seed: int):
        super().__init__()
        self._dense = [dense]  # in a list: not a part of this
        generator = torch.Generator().manual_seed(seed)
        for name, tensor in (("x", x.double()), ("y", y.double())):
            variance = tensor.var(0, correction=0)
            scale = (variance + FLOOR * variance.mean().clamp_min(1e-12)).sqrt()
            self.register_buffer(f"{name}_mean", tensor.mean(0).to(x))
            self.register_buffer(f"{name}_scale", scale.to(x))

        first = torch.randn(block.width, x.shape[1], generator=generator, dtype=torch.double) * x.shape[1] ** -0.5
        second = torch.zeros(y.shape[1], block.width, dtype=torch.double)
        into, out = self._best_factors(((x - self.x_mean) / self.x_scale).double(), block.width // 2)
        first[: 2 * len(into)] = torch.cat([into, -into])
        second[:, : 2 * len(into)] = torch.cat([out, -out], 1)
        self.first_weight, self.second_weight = (nn.Parameter(w.to(x)) for w in (first, second))
        self.first_bias, self.second_bias = (nn.Parameter(x.new_zeros(len(w))) for w in (first, second))

    def _best_factors(self, x: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors ``(rank, inputs)`` and ``(outputs, rank)`` of the projection, best on inputs ``(rows, inputs)``.

        Each number between them has variance 1. Directions without variance are left out.
        """
        weight = matrix_of(self._dense[0]).detach().double()
        weight = weight * self.x_scale.double() / self.y_scale.double()[:, None]
        values, vectors = torch.linalg.eigh(weight @ (x.T @ x / len(x)) @ weight.T)
        values, vectors = values[-rank:], vectors[:, -rank:]
        kept = values > 1e-9 * values[-1].clamp_min(1e-12)
        deviations, vectors = values[kept].sqrt(), vectors[:, kept]
        return (vectors.T @ weight / deviations[:, None]).cpu(), (vectors * deviations).cpu()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Squared error on inputs ``(rows, inputs)``, as a share of each output's variance, mean over outputs."""
        linear = nn.functional.linear
        with torch.no_grad():
            wanted = (self._dense[0](x) - self.y_mean) / self.y_scale
        hidden = torch.relu(linear((x - self.x_mean) / self.x_scale, self.first_weight, self.first_bias))
        return (linear(hidden, self.second_weight, self.second_bias) - wanted).square().mean()

    @torch.no_grad()
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of the `ProjectionNetwork` that computes the same from the inputs as they are."""
        weight = self.first_weight / self.x_scale
        return {
            "weight": weight, "bias": self.first_bias - weight @ self.x_mean,
            "down.weight": self.second_weight * self.y_scale[:, None],
            "down.bias": self.second_bias * self.y_scale + self.y_mean,
        }  # fmt: skip


class Bank(nn.Module):
    """The networks of all projections as one trainable module."""

    def __init__(self, networks: Sequence[Normalised], groups: Sequence[int]):
        super().__init__()
        self.networks, self.groups = nn.ModuleList(networks), list(groups)

    def forward(self, rows: dict[int, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Sum and mean over networks of their errors, from what each group reads ``(rows, inputs)``."""
        device = self.networks[0].x_mean.device  # layers may lie on different devices (`device_map`)
        pairs = zip(self.networks, self.groups, strict=True)
        errors = torch.stack([network(rows[group]).to(device) for network, group in pairs])
        return {"loss": errors.sum(), "error": errors.mean()}


class Reading:
    """Runs the dense model without its head, and gives what its projections read, padding left out."""

    def __init__(self, model: nn.Module, projections: Sequence[Projection]):
        self.model = model
        self.first = {p.group: p.name for p in reversed(projections)}  # the first of each group
        self.trunk = trunk_below(model, [p.name for p in projections])

    @torch.no_grad()
    def __call__(self, batches: Sequence[dict[str, Any]], rows: int) -> Rows:
        """Go through batches until every group has so many rows, or they are at an end."""
        held: Rows = {group: [] for group in self.first}
        with self._hooks(held) as current:
            for batch in pieces(batches):
                current["mask"] = batch.get("attention_mask")
                self.trunk(**model_inputs(self.model, batch))
                if all(sum(map(len, parts)) >= rows for parts in held.values()):
                    break
        return held

    @contextmanager
    def _hooks(self, held: Rows) -> Iterator[dict[str, torch.Tensor | None]]:
        current: dict[str, torch.Tensor | None] = {"mask": None}

        def watch(group: int) -> Callable:
            def hook(_: nn.Module, args: tuple) -> None:
                x = args[0].reshape(-1, args[0].shape[-1])
                wanted = real_rows(current["mask"], len(x))
                held[group].append(x.clone() if wanted is None else x[wanted.to(x.device)])

            return hook

        handles = [self.model.get_submodule(name).register_forward_pre_hook(watch(group))
                   for group, name in self.first.items()]  # fmt: skip
        try:
            yield current
        finally:
            for handle in handles:
                handle.remove()


class Samples:
    """Rows for each group, by micro-batch number.

    The rows of a few batches are held, shuffled, and serve `per_pass` micro-batches; then the model goes through the
    next ones. The text repeats in a new order when it is used up.

    Args:
        reading: Gives the rows.
        batches: Calibration batches.
        rows: Rows of a micro-batch.
        per_batch: Rows that a batch gives a group.
        seed: Of the orders.
    """

    def __init__(self, reading: Reading, batches: Batches, rows: int, per_batch: int, seed: int):
        self.reading, self.batches, self.rows, self.seed = reading, batches, rows, seed
        read = [reading.model.get_submodule(name) for name in reading.first.values()]
        width = sum(sizes(linear)[0] * linear.weight.element_size() for linear in read)  # bytes of a row of each
        self.held = max(rows, min(ROWS_HELD, BYTES_HELD // width))
        self.at_once = max(1, min(self.held // per_batch, len(batches)))
        self.per_pass = max(1, min(self.held, self.at_once * per_batch) // rows)
        self._kept: tuple[int, dict[int, torch.Tensor]] = (-1, {})
        self._order: tuple[int, Batches | None] = (-1, None)

    def __call__(self, number: int) -> dict[int, torch.Tensor]:
        """What each group reads, ``(rows, inputs)``, for micro-batch `number`."""
        place, part = divmod(number, self.per_pass)
        if self._kept[0] != place:
            self._kept = (-1, {})  # let go of the last rows before the next ones
            self._kept = (place, self._read(place))
        return {group: x[part % len(x) :: self.per_pass][: self.rows] for group, x in self._kept[1].items()}

    def _read(self, place: int) -> dict[int, torch.Tensor]:
        epoch, part = divmod(place, -(-len(self.batches) // self.at_once))
        if self._order[0] != epoch:
            self._order = (epoch, self.batches.shuffled(self.seed + epoch))
        numbers = range(part * self.at_once, min((part + 1) * self.at_once, len(self.batches)))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + place)
        found = {}
        for group, parts in self.reading((self._order[1][n] for n in numbers), self.held).items():
            x = torch.cat(parts)
            found[group] = x[torch.randperm(len(x), generator=generator)[: self.held].to(x.device)]
        return found


def make_bank(
    model: nn.Module, projections: Sequence[Projection], blocks: Sequence[Block], batches: Batches, seed: int
) -> tuple[Bank, Reading, int]:
    """Untrained networks, what gives them their rows, and the rows that a batch gives."""
    reading, few = Reading(model, projections), batches.first(STATISTICS_TOKENS)
    rows = {group: torch.cat(parts) for group, parts in reading(few, 2**62).items()}
    networks = []
    for number, (projection, block) in enumerate(zip(projections, blocks, strict=True)):
        dense, x = model.get_submodule(projection.name), rows[projection.group]
        with torch.no_grad():
            y = dense(x)
        networks.append(Normalised(dense, block, x, y, seed * 1000 + number))
    per_batch = max(map(len, rows.values())) // len(few)
    return Bank(networks, [p.group for p in projections]), reading, max(1, per_batch)


def distil_networks(
    model: nn.Module, projections: Sequence[Projection], blocks: Sequence[Block], batches: Batches,
    config: AttentionConfig, *, seed: int = 0, state_dir: Path | None = None, resume: bool = False,
) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:  # fmt: skip
    """Distil a network for each projection of a dense model; the model itself stays as it is.

    Args:
        model: Dense model in evaluation mode.
        projections: The projections.
        blocks: What stands in the place of each.
        batches: Calibration batches.
        config: Tokens, batch and learning rate.
        seed: Of starts and orders.
        state_dir: Where resumable states go.
        resume: Continue from there.

    Returns:
        Tensors of all networks by their names in the model, and the training log; its `error` is the mean share of the
        outputs' variance that the networks miss.
    """
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    bank, reading, per_batch = make_bank(model, projections, blocks, batches, seed)
    samples = Samples(reading, batches, config.attention_batch, per_batch, seed)
    settings = TrainingConfig(
        steps=max(1, config.attention_tokens // config.attention_batch), learning_rate=config.attention_learning_rate,
        adam_betas=(0.9, 0.99), clip=0.0, seed=seed, save_every=SAVE_EVERY,
    )  # fmt: skip
    try:
        log = train(
            bank, samples, lambda bank, rows: bank(rows), settings,
            name="attention", state_dir=state_dir, resume=resume, placed=True,
        )  # fmt: skip
    finally:
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)
    pairs = zip(blocks, bank.networks, strict=True)
    return {f"{b.name}.{name}": t for b, network in pairs for name, t in network.tensors().items()}, log


@torch.no_grad()
def install_networks(model: nn.Module, blocks: Sequence[Block], tensors: dict[str, torch.Tensor]) -> None:
    """Put distilled networks in the places of the projections of a dense model."""
    for block in blocks:
        network = put_network(model, block)
        for name, parameter in network.named_parameters():
            parameter.copy_(tensors[f"{block.name}.{name}"])
            parameter.requires_grad_(True)


@torch.no_grad()
def in_running_order(model: nn.Module, blocks: Sequence[Block], batch: dict[str, Any] | None = None) -> list[Block]:
    """Blocks in the order in which the model first runs them.

    Args:
        model: Dense model.
        blocks: Feed-forward blocks, and those that are to stand in the places of projections.
        batch: A batch of the data, in case that the model does not run on inputs made from its config.
    """
    names: list[str] = []
    handles = [model.get_submodule(b.up).register_forward_pre_hook(lambda m, a, n=b.name: names.append(n))
               for b in blocks]  # fmt: skip
    try:
        on_small_inputs(model, lambda inputs: model(**inputs), batch)
    finally:
        for handle in handles:
            handle.remove()
    places = {name: place for place, name in reversed([*enumerate(names)])}
    return sorted(blocks, key=lambda block: places.get(block.name, len(names)))
