"""Which of the added parameters a fine-tuning changes: none, unless it asks for them."""

from __future__ import annotations

from torch import nn

from ..errors import UserError
from .gating import NOT_CONVERTED
from .layer import layers
from .projection import projections


def trainable(model: nn.Module, *, routers: bool = False, stand_ins: bool = False) -> nn.Module:
    """Choose which of the parameters that the conversion added learn when the model is fine-tuned.

    A converted model trains like the dense one: routers, stand-ins and the bases of projections are frozen. With
    `routers`, gradients reach the routers through the gate by a straight-through estimate
    (`kernels.gates.straight_through`). Routers and stand-ins have no gradient while everything runs (`active=1`); DDP
    then needs `find_unused_parameters=True`.

    Args:
        model: Converted model, changed in place.
        routers: Train the routers.
        stand_ins: Train the stand-ins of the budget in force.

    Returns:
        The same model.

    Raises:
        UserError: If the model is not converted.
    """
    found = layers(model)
    if not found and not projections(model):
        raise UserError(NOT_CONVERTED)
    for layer in found:
        layer.router.requires_grad_(routers)
        layer.soft_gate = routers
        for parameter in layer.stand_ins().values():
            parameter.requires_grad_(stand_ins)
    for layer in projections(model):
        for name in layer.ADDED:
            getattr(layer, name).requires_grad_(False)
    return model
