"""Decoders that keep keys and values: they are the state of an OpenVINO model, in the form that other tools know.

Its inputs are `input_ids` and, where the model has them, `position_ids` of the new tokens alone, `attention_mask` of
all tokens so far, and `beam_idx`, the row of the state that each row goes on from. `reset_state` of an inference
request forgets everything.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from ..moe.cache_guard import trust

MASK, POSITIONS, BEAMS = "attention_mask", "position_ids", "beam_idx"
Feed = dict[str, np.ndarray]  # inputs of an OpenVINO model by name


class Cached(nn.Module):
    """A decoder as a function of its inputs, of keys and values so far, to logits, keys and values."""

    def __init__(self, model: nn.Module, names: Sequence[str]):
        super().__init__()
        self.model, self.names = model, tuple(names)

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Values of `names`, then keys and values of each layer in turn ``(batch, heads, length, width)``."""
        given, past = dict(zip(self.names, values, strict=False)), values[len(self.names) :]
        cache = DynamicCache()
        cache.layers = [_filled(*pair) for pair in zip(past[::2], past[1::2], strict=True)]
        trust(cache)
        output = self.model(**given, past_key_values=cache, use_cache=True)
        return output.logits, *_tensors(output.past_key_values)


def _filled(keys: torch.Tensor, values: torch.Tensor) -> DynamicLayer:
    """A layer that holds these, also if they are empty. (An update of an empty one is not traced as one of a full.)"""
    layer = DynamicLayer()
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    return layer


def _tensors(cache: DynamicCache) -> list[torch.Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


@torch.no_grad()
def why_not(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> str:
    """Why a model cannot be exported with its cache; empty if it can.

    Args:
        model: In evaluation mode.
        inputs: Of a small forward pass.
    """
    kind = type(model).__name__
    if not model.can_generate() or model.config.is_encoder_decoder or set(inputs) != {"input_ids", MASK}:
        return f"a {kind} is no decoder of text alone"
    cache = model(**inputs, use_cache=True).get("past_key_values")
    layers = getattr(cache, "layers", None) or []
    if not layers or any(type(layer) is not DynamicLayer or layer.keys.dim() != 4 for layer in layers):
        return f"what a {kind} remembers is not keys and values of all tokens (windows, recurrent layers)"
    return ""


def openvino_model(model: nn.Module, inputs: Mapping[str, torch.Tensor], convert: Any) -> Any:
    """The `openvino.Model` of a decoder, keys and values its state.

    Args:
        model: In evaluation mode, see `why_not`.
        inputs: `input_ids` and `attention_mask` of a small forward pass.
        convert: Called with a module and example inputs, gives an `openvino.Model`.
    """
    names, example, past = _example(model, inputs)
    result = convert(Cached(model, names), (*example, *past))
    keep = [f"past.{n // 2}.{'value' if n % 2 else 'key'}" for n in range(len(past))]
    name_ports(result, [*names, *keep], ["logits", *(f"new.{k}" for k in keep)])
    _make_state(result, keep, past)
    return result


def name_ports(model: Any, inputs: Iterable[str], outputs: Iterable[str]) -> None:
    """Give the inputs and outputs of an `openvino.Model` these names, and the nodes of inputs as well.

    OpenVINO's step to paged attention looks for a node of the name `input_ids`.
    """
    for ports, labels in ((model.inputs, inputs), (model.outputs, outputs)):
        for port, label in zip(ports, labels, strict=True):
            port.get_tensor().set_names({label})
    for port in model.inputs:
        port.get_node().set_friendly_name(port.get_any_name())


def _example(
    model: nn.Module, inputs: Mapping[str, torch.Tensor]
) -> tuple[list[str], tuple[torch.Tensor, ...], list[torch.Tensor]]:
    """Names and values of inputs that go on from a part of the text, and keys and values of that part."""
    ids, mask = inputs["input_ids"], inputs[MASK]
    known = ids.shape[1] // 2
    past = model(input_ids=ids[:, :known], attention_mask=mask[:, :known], use_cache=True).past_key_values
    given = {"input_ids": ids[:, known:], MASK: mask}
    if POSITIONS in inspect.signature(model.forward).parameters:
        given[POSITIONS] = torch.from_numpy(positions(mask.numpy(), ids.shape[1] - known))
    return list(given), tuple(given.values()), _tensors(past)


def _make_state(result: Any, names: Sequence[str], past: Sequence[torch.Tensor]) -> None:
    """Turn keys and values from inputs and outputs into state, empty at first, its rows chosen by `beam_idx`."""
    from openvino import PartialShape, opset13
    from openvino._offline_transformations import apply_make_stateful_transformation

    beams = opset13.parameter([-1], np.int32, name=BEAMS)
    beams.output(0).get_tensor().set_names({BEAMS})
    result.add_parameters([beams])
    for name, tensor in zip(names, past, strict=True):
        port = result.input(name)
        readers = port.get_target_inputs()
        chosen = opset13.gather(port, beams, opset13.constant(0))
        for reader in readers:
            reader.replace_source_output(chosen.output(0))
        port.get_node().set_partial_shape(PartialShape([-1, tensor.shape[1], -1, tensor.shape[3]]))
    result.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(result, {name: f"new.{name}" for name in names})
    rows = opset13.gather(opset13.shape_of(result.input("input_ids")), opset13.constant([0]), opset13.constant(0))
    for node in result.get_ops():
        if node.get_type_name() == "ReadValue":
            _, heads, _, width = node.get_output_partial_shape(0)
            sizes = (heads.get_length(), 0, width.get_length())
            shape = opset13.concat([rows, *(opset13.constant(np.array([size])) for size in sizes)], 0)
            node.set_arguments([opset13.broadcast(opset13.constant(np.float32(0)), shape).output(0)])
    result.validate_nodes_and_infer_types()


def positions(mask: np.ndarray, new: int) -> np.ndarray:
    """Places of the last `new` tokens, padding on the left not counted; ``(batch, length)`` to ``(batch, new)``."""
    return np.maximum(np.cumsum(mask, axis=-1) - 1, 0)[:, mask.shape[1] - new :]


def complete(feed: Feed, names: Sequence[str]) -> Feed:
    """With positions and rows of the state, where a model of these inputs wants them and they are not given."""
    ids, given = feed.get("input_ids"), dict(feed)
    if POSITIONS in names and POSITIONS not in given:
        given[POSITIONS] = positions(given[MASK], ids.shape[1])
    if BEAMS in names and BEAMS not in given:
        given[BEAMS] = np.arange(len(ids), dtype=np.int32)
    return given
