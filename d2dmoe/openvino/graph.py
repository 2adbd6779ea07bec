"""From a loaded converted model to an OpenVINO model, each converted layer one operation `DynamicFFN`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import UserError
from ..kernels import Tiles, native
from ..kernels.quads import SLACK
from ..moe.gating import set_gate
from ..moe.layer import DynamicFFN, layers
from ..moe.prepared import settings
from . import cache
from .attributes import NUMBERS
from .extension import extension_library

BUDGET = "budget"  # name of the input that says which budget runs


@torch.library.custom_op("d2dmoe::openvino_layer", mutates_args=())
def marked(x: torch.Tensor, number: int, d_out: int) -> torch.Tensor:
    """Stands for a converted layer while a model is traced: ``(…, d_model)`` to zeros ``(…, d_out)``."""
    return x.new_zeros((*x.shape[:-1], d_out))


@marked.register_fake
def _marked(x: torch.Tensor, number: int, d_out: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], d_out))


class _Mark(nn.Module):
    """Takes the place of a layer."""

    def __init__(self, place: int, d_out: int):
        super().__init__()
        self.place, self.d_out = place, d_out

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        return torch.ops.d2dmoe.openvino_layer(x, self.place, self.d_out)


class _Traced(nn.Module):
    """A model whose inputs come in a fixed order, and whose outputs are a tuple of tensors."""

    def __init__(self, model: nn.Module, names: Sequence[str]):
        super().__init__()
        self.model, self.names = model, tuple(names)
        self.fixed = {"use_cache": False} if hasattr(model.config.get_text_config(), "use_cache") else {}

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.outputs(*values).values())

    def outputs(self, *values: torch.Tensor) -> dict[str, torch.Tensor]:
        """By name."""
        found = self.model(**dict(zip(self.names, values, strict=True)), **self.fixed, return_dict=True)
        return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def check_layers(model: nn.Module) -> None:
    """Check that the native library can do every converted layer.

    Raises:
        UserError: Naming the first one that it cannot.
    """
    for layer in layers(model):
        if layer.activation is None:
            raise UserError(
                f"{layer.block.name}: the native library does not have its activation, {layer.block.activation}, so "
                f"OpenVINO cannot run it as experts; export the dense model with --dense"
            )


def layer_inputs(
    layer: DynamicFFN, states: Sequence[Any], expert_dtype: str | None
) -> tuple[np.ndarray, dict[str, int | str]]:
    """What the operation of a layer gets at some settings of its gate.

    Args:
        layer: In fp32.
        states: A `GateState` for each budget.
        expert_dtype: One of `kernels.EXPERT_DTYPES`.

    Returns:
        Its tensors as bytes, each at the start of a cache line and once only if all budgets have the same, and the
        attributes, with the places of the tensors.
    """
    shared: Tiles = {}
    plans = [
        native.Plan(
            layer.prepared.tensors(layer, state, None), layer.activation, *settings(state), tiles=shared,
            expert_dtype=expert_dtype,
        )
        for state in states
    ]  # fmt: skip
    pieces: list[np.ndarray] = []
    places, end = {}, 0
    for field, key in native.FIELDS.items():
        values = _of_budgets([plan.keep.get(key) for plan in plans])
        if values:
            stride = _padded(values[0].nbytes)
            places[field] = (end, stride if len(values) > 1 else 0)
            end += stride * len(values)
            pieces += [np.pad(_as_bytes(value), (0, stride - value.nbytes)) for value in values]
    fields = [plan.layer for plan in plans]
    attributes: dict[str, int | str] = {name: max(getattr(each, name) for each in fields) for name in NUMBERS}
    attributes["tensors"] = " ".join(places)
    attributes["offsets"] = " ".join(str(offset) for offset, _ in places.values())
    attributes["strides"] = " ".join(str(stride) for _, stride in places.values())
    attributes["taus"] = " ".join(repr(float(each.tau)) for each in fields)
    attributes["tops"] = " ".join(str(each.top) for each in fields)
    return np.concatenate(pieces), attributes


def _of_budgets(found: list[torch.Tensor | None]) -> list[torch.Tensor]:
    """One tensor where all budgets have the same, else one for each; none where no budget has any."""
    present = next((tensor for tensor in found if tensor is not None), None)
    if present is None:
        return []
    values = [torch.zeros_like(present) if tensor is None else tensor.detach() for tensor in found]
    return values[:1] if all(torch.equal(value, values[0]) for value in values) else values


def _padded(size: int) -> int:
    """Bytes up to the next cache line, with those that the library may read behind a tensor."""
    return -(-(size + SLACK) // 64) * 64


def _as_bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).numpy().reshape(-1)


def make_node(x: Any, budget: Any, tensors: np.ndarray, attributes: Mapping[str, int | str]) -> Any:
    """The operation as a node of a graph, in C++ or, without a compiler, in Python."""
    from openvino import opset13
    from openvino.utils.node_factory import NodeFactory

    inputs = [x, budget, opset13.constant(tensors).output(0)]
    library = extension_library()
    if library is None:
        from .python_operation import DynamicFFN as InPython

        return InPython(inputs, **attributes)
    factory = NodeFactory()
    factory.add_extension(str(library))
    return factory.create("DynamicFFN", inputs, dict(attributes))


@torch.no_grad()
def openvino_model(
    model: nn.Module, inputs: Mapping[str, torch.Tensor], actives: Sequence[float], expert_dtype: str | None = None,
    cached: bool = False,
) -> Any:  # fmt: skip
    """Trace a converted model.

    Args:
        model: In fp32, in evaluation mode; its converted layers are taken out of it.
        inputs: Of a small forward pass; their sizes stay open in the result.
        actives: Budgets that the result can run at, as of `set_gate`.
        expert_dtype: One of `kernels.EXPERT_DTYPES`.
        cached: See `trace`.

    Returns:
        `openvino.Model`. With several budgets it has one more input, the number of the one in `actives`.

    Raises:
        UserError: If a layer is of a kind that the native library does not have.
    """
    from openvino import opset13
    from openvino.frontend.pytorch import ConversionExtension

    check_layers(model)
    found = layers(model)
    states: dict[DynamicFFN, list] = {layer: [] for layer in found}
    for active in actives:
        with set_gate(model, active=active):
            for layer in found:
                states[layer].append(layer.gate_state)
    held = opset13.constant(np.array(0, dtype=np.int32))  # where there are several, a parameter takes its place
    operations = [(layer, layer_inputs(layer, states[layer], expert_dtype)) for layer in found]
    names = {module: name for name, module in model.named_modules(remove_duplicate=False)}

    def convert(context: Any) -> list:
        tensors, attributes = operations[int(context.get_values_from_const_input(1))][1]
        return make_node(context.get_input(0), held.output(0), tensors, attributes).outputs()

    for place, layer in enumerate(found):
        model.set_submodule(names[layer], _Mark(place, layer.down_weight.shape[-1]))
    result = trace(model, inputs, ConversionExtension("d2dmoe::openvino_layer", convert), cached=cached)
    if len(actives) == 1:  # then other programs need not know of budgets
        return result
    parameter = opset13.parameter([], np.int32, name=BUDGET)
    held.output(0).replace(parameter.output(0))
    result.add_parameters([parameter])
    parameter.output(0).get_tensor().set_names({BUDGET})
    return result


@torch.no_grad()
def trace(model: nn.Module, inputs: Mapping[str, torch.Tensor], *extensions: Any, cached: bool = False) -> Any:
    """The `openvino.Model` of a Hugging Face model, its inputs and outputs named as there.

    Args:
        model: In evaluation mode.
        inputs: Of a small forward pass; their sizes stay open in the result.
        extensions: Of OpenVINO's frontend for PyTorch.
        cached: Keys and values of a decoder are its state, see `cache`.
    """
    import openvino as ov

    def convert(module: nn.Module, example: tuple[torch.Tensor, ...]) -> Any:
        given = {"example_input": example, **({"extension": list(extensions)} if extensions else {})}
        with warnings.catch_warnings():  # of sizes that could be taken for constants; outputs are compared instead
            warnings.simplefilter("ignore")
            try:
                return ov.convert_model(module.eval(), **given)
            except Exception as error:  # whatever its frontend does not know
                reason = next(line for line in reversed(str(error).splitlines()) if line.strip()).strip()
                raise UserError(f"OpenVINO cannot take over a {type(model).__name__}: {reason}") from error

    if cached:
        return cache.openvino_model(model, inputs, convert)
    traced = _Traced(model, list(inputs))
    outputs = list(traced.outputs(*inputs.values()))
    result = convert(traced, tuple(inputs.values()))
    cache.name_ports(result, inputs, outputs)
    return result
