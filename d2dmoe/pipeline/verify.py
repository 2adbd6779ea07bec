"""Compare the converted model, all experts on, with the dense one it came from."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ..discovery.inputs import Batch, on_small_inputs
from ..errors import UserError
from ..moe.layer import layers

VERIFY_TOLERANCE, MODEL_TOLERANCE = 1e-4, 1e-3  # of a block; of the whole model, where rounding adds up


@torch.no_grad()
def block_outputs(
    model: PreTrainedModel, blocks: list, batch: Batch | None = None
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Input and output of every block in one small forward pass of the dense model; for `batch` see `model_outputs`."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    inputs: dict[str, torch.Tensor] = {}
    handles = []
    for block in blocks:
        up, down = model.get_submodule(block.up), model.get_submodule(block.down)
        handles.append(
            up.register_forward_pre_hook(lambda m, a, n=block.name: inputs.__setitem__(n, a[0].detach().clone()))
        )
        handles.append(
            down.register_forward_hook(
                lambda m, a, o, n=block.name: seen.__setitem__(n, (inputs[n], o.detach().clone()))
            )
        )
    try:
        on_small_inputs(model, lambda inputs: model(**inputs), batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen


@torch.no_grad()
def model_outputs(model: PreTrainedModel, batch: Batch | None = None) -> dict[str, torch.Tensor]:
    """The floating-point outputs of the model for one small input: a corner of `batch` where none else can be made."""

    def run(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        return model(**inputs)

    with torch.random.fork_rng():
        output = on_small_inputs(model, run, batch)
    return {k: v for k, v in output.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}


def relative_error(value: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference, relative to the norm wanted."""
    return float((value - wanted).norm() / wanted.norm().clamp_min(1e-12))


@torch.no_grad()
def verify(
    model: PreTrainedModel, reference: dict[str, tuple[torch.Tensor, torch.Tensor]], output: dict[str, torch.Tensor],
    batch: Batch | None = None,
) -> None:  # fmt: skip
    """Compare every block and the whole model, all experts on, with the dense ones; for `batch` see `model_outputs`.

    Raises:
        UserError: Naming the block or output and its relative error.
    """
    for layer in layers(model):
        x, dense = reference[layer.block.name]
        error = relative_error(layer(x), dense)
        if not error <= VERIFY_TOLERANCE:
            raise UserError(
                f"{layer.block.name}: as experts it differs from the dense block by {error:.2g} relative "
                f"(allowed {VERIFY_TOLERANCE:g}), so this model is not converted"
            )
    for name, value in model_outputs(model, batch).items():
        error = relative_error(value, output[name])
        if not error <= MODEL_TOLERANCE:
            raise UserError(
                f"with all experts on, the model's {name} differ from the dense ones by {error:.2g} relative "
                f"(allowed {MODEL_TOLERANCE:g}), so this model is not converted"
            )
