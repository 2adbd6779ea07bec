"""Another activation in a trained model: which config key holds it is found by trial, not by a table of classes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from ..discovery.blocks import discover
from ..discovery.skeleton import skeleton
from ..errors import UserError
from ..moe.fatrelu import fatrelu_name


def activation_name(kind: str, threshold: float = 0.0) -> str:
    """The name that stands in a config: `relu`, or `fatrelu_0.05`."""
    return fatrelu_name(threshold) if kind == "fatrelu" else kind


def swapped_config(model_class: type[PreTrainedModel], config: Any, activation: str) -> Any:
    """A copy of `config` whose model computes every feed-forward block with `activation`.

    Every text value that names an activation, on any level of the config, is replaced in turn, and a model without
    weights is built from what would be on disk. A replacement stays where it changes a block.

    Raises:
        UserError: If blocks remain that no key changes.
    """
    found = discover(skeleton(model_class, config))
    if all(block.activation == activation for block in found.blocks):
        return copy.deepcopy(config)
    best, left = config, _others(found.blocks, activation)
    for path, value in _candidates(config.to_dict(), activation):
        trial = _with_value(best, path, value)
        try:
            blocks = discover(skeleton(model_class, trial)).blocks
        except Exception:  # not a value that this key takes
            continue
        others = _others(blocks, activation)
        if len(blocks) >= len(found.blocks) and len(others) < len(left):
            best, left = trial, others
    if left:
        raise UserError(
            f"--activation {activation.partition('_')[0]}: no key of the config holds the activation "
            f"{left[0].activation} of {left[0].name}; use --activation keep"
        )
    return best


def _others(blocks: list, activation: str) -> list:
    return [block for block in blocks if block.activation != activation]


def _candidates(values: dict[str, Any], activation: str, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple, str]]:
    """Paths of keys that hold an activation's name, or end with one (`gated-gelu`), and the value to try."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _candidates(value, activation, (*path, key))
        elif isinstance(value, str):
            prefix, dash, last = value.rpartition("-")
            if value in ACT2FN:
                yield (*path, key), activation
            elif dash and last in ACT2FN:
                yield (*path, key), f"{prefix}-{activation}"


def _with_value(config: Any, path: tuple[str, ...], value: str) -> Any:
    """What is read back from disk after one value was changed there."""
    values = config.to_dict()
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    changed = type(config).from_dict(values)
    for name in ("_commit_hash", "_name_or_path"):
        if hasattr(config, name):
            setattr(changed, name, getattr(config, name))
    return changed


def swap_activation(model: PreTrainedModel, activation: str) -> PreTrainedModel:
    """The same weights, not copied, in a model with another activation.

    Args:
        model: Loaded model; it shares its parameters with the result.
        activation: `relu`, or `fatrelu_…` (see `activation_name`).

    Raises:
        UserError: If no key of the config holds the activation.
    """
    from accelerate import init_empty_weights

    config = swapped_config(type(model), model.config, activation)
    config._attn_implementation = model.config._attn_implementation
    with init_empty_weights(include_buffers=False):
        swapped = type(model)(config)
    swapped.load_state_dict(model.state_dict(), assign=True, strict=False)
    swapped.tie_weights()
    for name, parameter in model.named_parameters():
        swapped.get_parameter(name).requires_grad_(parameter.requires_grad)
    if getattr(model, "generation_config", None) is not None:
        swapped.generation_config = copy.deepcopy(model.generation_config)
    for name, buffer in model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        swapped.get_submodule(owner)._buffers[leaf] = buffer
    return swapped.train(model.training)
