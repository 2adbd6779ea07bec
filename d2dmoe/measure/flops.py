"""Floating-point operations per token. One multiply-accumulate is two operations, everywhere."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..config.projections import ProjectionState
from ..moe.gating import set_gate
from ..moe.layer import DynamicFFN, GateState, layers
from ..moe.projection import DynamicProjection, around_attention, head_of, projections
from .observe import observing, observing_projections


def dense_ffn_flops(layer: DynamicFFN) -> int:
    """FLOPs before conversion: matrix products only, as `FlopCounterMode` counts them.

    They are those of the block, or of the projection around attention in whose place a network stands.
    """
    block, d_out = layer.block, layer.down_weight.shape[-1]
    return 2 * block.d_model * d_out * block.calls if block.role else neuron_flops(layer)


def neuron_flops(layer: DynamicFFN) -> int:
    """FLOPs of all neurons, without the zero neurons that fill up the last expert."""
    block, d_out = layer.block, layer.down_weight.shape[-1]
    ups = 2 if block.kind == "glu" else 1
    return 2 * block.width * (ups * block.d_model + d_out) * block.calls


def padding_flops(layer: DynamicFFN) -> int:
    """FLOPs of the zero neurons that fill up the last expert, with all experts on. The dense block has none."""
    return neuron_flops(layer) // layer.block.width * (layer.block.slots - layer.block.width)


def sparse_ffn_flops(layer: DynamicFFN, active: float, state: GateState | None = None) -> float:
    """FLOPs of the converted block at an active fraction: executed experts, router, gate, and stand-ins.

    `state` stands for the layer's own gate state.

    Neurons that fill up the last expert are executed like the others and counted. The gate costs one comparison per
    expert, a stand-in one vector addition per executed expert.
    """
    block, router, state = layer.block, layer.router, state or layer.gate_state
    cost = active * (neuron_flops(layer) + padding_flops(layer))
    if state.tau > 0:
        cost += (2 * (router.hidden.numel() + router.score.numel()) + block.experts) * block.calls
        if layer.constants is not None and state.stand_in is not None:
            cost += active * block.experts * layer.down_weight.shape[-1] * block.calls
            if layer.linear_in is not None:
                cost += 2 * (layer.linear_in[0].numel() + layer.linear_out[0].numel()) * block.calls
    return cost


def projection_flops(layer: DynamicProjection, active: float = 1.0, state: ProjectionState | None = None) -> float:
    """FLOPs per row of a projection with this share of its input channels; `state` stands for its own setting.

    Factors count as the two products that they are; the score of a channel is one multiplication.
    """
    p, state = layer.projection, state or layer.gate_state
    if state.method == "heads":
        return 2 * p.head_macs(state.ranks) * p.calls
    factors = 2 * p.factored_macs(state.ranks, state.candidates) if state.ranks else 0
    if state.method in ("low-rank", "svd-softmax"):
        return factors * p.calls
    return (2 * p.macs if state.method == "dense" else active * 2 * p.macs + factors + p.inputs) * p.calls


@torch.no_grad()
def model_flops(model: nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    """FLOPs of one forward pass with the gate in force: matrix products, convolutions and attention.

    `FlopCounterMode` counts them. It does not know the CPU's fused attention, so attention runs as matrix products. It
    asks every argument of a module that wants gradients for its history, which a view of a parameter lacks without
    gradients (DeBERTa), so no parameter wants any meanwhile.
    """
    wanting = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in wanting:
            parameter.requires_grad_(False)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(**inputs)
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)
    return counter.get_total_flops()


@dataclass
class DenseCost:
    """FLOPs of the dense model per token, which is a row of its first converted layer.

    Attributes:
        total: FLOPs of the whole model.
        rows: For each converted layer, the rows that one of its calls has for each token. Layers differ where a model
            merges patches (Swin), or reads more than it writes (T5).
        projection_rows: The same for each projection around attention.
        head_rows: The same for the head, where it is converted.
    """

    total: float
    rows: list[float]
    projection_rows: list[float] = field(default_factory=list)
    head_rows: float = 0.0

    def blocks(self, flops: Iterable[float]) -> float:
        """FLOPs per token of all blocks, from those per row of each."""
        return sum(row * each for row, each in zip(self.rows, flops, strict=True))

    def projections(self, flops: Iterable[float]) -> float:
        """FLOPs per token of all projections around attention, from those per row of each."""
        return sum(row * each for row, each in zip(self.projection_rows, flops, strict=True))

    def dense_projections(self, model: nn.Module) -> float:
        """The same with all of them dense."""
        return self.projections(projection_flops(layer, state=ProjectionState()) for layer in around_attention(model))

    def saved_by_head(self, model: nn.Module, state: ProjectionState | None = None) -> float:
        """FLOPs per token that the head saves with this setting, or with its own; 0 where it is not converted."""
        head = head_of(model)
        if head is None:
            return 0.0
        dense = projection_flops(head, state=ProjectionState())
        return self.head_rows * (dense - projection_flops(head, state=state))


def dense_cost(model: nn.Module, inputs: dict[str, torch.Tensor]) -> DenseCost:
    """Count the dense model on this batch."""
    with set_gate(model, active=1):
        rows, others, head = _rows_of_calls(model, inputs)
        relative = [[count / rows[0] for count in counts] for counts in (rows, others)]
        cost = DenseCost(model_flops(model, inputs) / rows[0], *relative, head_rows=head / rows[0])
    cost.total += cost.blocks(dense_ffn_flops(x) - neuron_flops(x) - padding_flops(x) for x in layers(model))
    return cost


def _rows_of_calls(model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[list[float], list[float], float]:
    """For each converted block, each projection around attention and the head, the rows of one call in one pass."""
    seen, projected = [0] * len(layers(model)), dict.fromkeys(projections(model), 0)

    def count(index, layer, x, hidden, scores, run):
        seen[index] += x.shape[0]

    def count_rows(layer, x, keep):
        projected[layer] += x.shape[0]

    count.needs_hidden = False
    with observing(model, count), observing_projections(model, count_rows):
        model(**inputs)
    seen = [total / layer.block.calls for total, layer in zip(seen, layers(model), strict=True)]
    others = [projected[layer] / layer.projection.calls for layer in around_attention(model)]
    if not seen[0]:
        return [1.0] * len(seen), [1.0] * len(others), 1.0
    head = head_of(model)
    return seen, others, projected[head] / head.projection.calls if head is not None else 0.0
