"""Ways out of a converted folder: the original dense model, and adapters of the original model put on this one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from .. import hub
from ..config.record import Block
from ..errors import UserError
from ..files import replacing
from ..moe.check import check_permutation
from ..moe.loader import localise
from ..moe.packing import NEURONS_LAST, layout_of
from ..tensors import CHECKSUMS, weight_files
from ..twin import open_dense

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Dimension of the neurons in the tensors that an adapter has for an up or gate projection, and for a down projection.
OF_UP = {"lora_A.weight": None, "lora_B.weight": 0, "lora_B.bias": 0, "lora_magnitude_vector": 0,
         "lora_magnitude_vector.weight": 0, "bias": 0, "base_layer.bias": 0}  # fmt: skip
OF_DOWN = {"lora_A.weight": 1, "lora_B.weight": None, "lora_B.bias": None, "lora_magnitude_vector": None,
           "lora_magnitude_vector.weight": None, "bias": None, "base_layer.bias": None}  # fmt: skip


def neuron_orders(name: str, blocks: list[Block]) -> dict[str, torch.Tensor]:
    """The place that each neuron of a block had in the original model, by the block's name.

    Raises:
        UserError: If the checkpoint stores none, because an earlier release wrote it, or what it stores is damaged.
    """
    found: dict[str, torch.Tensor] = {}
    for file in weight_files(Path(name)):
        with safe_open(file, framework="pt") as opened:
            found.update({key: opened.get_tensor(key) for key in opened.keys() if key.endswith(".order")})  # noqa: SIM118
    orders = {}
    for block in blocks:
        keys = [
            k for k in found if f".{k}".endswith(f".{block.name}.order") or f".{block.name}.order".endswith(f".{k}")
        ]
        if not keys:
            raise UserError(
                f"{name} does not store the order of the neurons of {block.name}, because an earlier release wrote it; "
                f"convert the model again"
            )
        check_permutation(block.name, found[keys[0]], block.width)
        orders[block.name] = found[keys[0]].long()
    return orders


def open_record(name: str) -> tuple[Any, list[Block]]:
    """Config and blocks of a converted folder.

    Raises:
        UserError: If it is none.
    """
    if not Path(name).is_dir():
        raise UserError(f"{name}: no such folder; give one that convert has written")
    config = hub.read_config(name)
    record = hub.conversion_record(config)
    if record is None:
        raise UserError(f"{name} is no converted checkpoint; give a folder that convert has written")
    hub.check_safetensors(name)
    return config, record.blocks


def check_output(output: str) -> Path:
    """The folder to write.

    Raises:
        UserError: If something is there already.
    """
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{output} is there already, and not an empty folder; name another one")
    return folder


@torch.no_grad()
def export_dense(name: str, output: str) -> int:
    """Write the dense model with its neurons in their original order.

    Args:
        name: Converted folder.
        output: New folder, with all files of the old one that are not the conversion's own.

    Returns:
        The number of blocks.

    Raises:
        UserError: If the folder is not a converted one, stores no order, or the output is not empty.
    """
    folder, (config, blocks) = check_output(output), open_record(name)
    if any(block.role for block in blocks):
        raise UserError(
            f"{name} holds no dense model, because networks stand in the places of projections around attention "
            f"(--attention mlp); use the model it was made from"
        )
    orders = neuron_orders(name, blocks)
    model, _ = open_dense(name, config, "auto")
    for number, block in enumerate(blocks):
        _reorder(model, localise(model, block, number) or block, orders[block.name].argsort())
    model.save_pretrained(folder)
    for path, source in hub.companions(name).items():
        if path != CHECKSUMS and not (folder / path).exists():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / path)
    return len(blocks)


def _reorder(model: nn.Module, block: Block, order: torch.Tensor) -> None:
    """Take the neurons of a dense block in this order."""
    for role, path in (("up", block.up), ("gate", None if block.fused else block.gate), ("down", block.down)):
        linear = path and model.get_submodule(path)
        if path:
            halves = bool(block.fused) and role == "up"
            dim = 1 if layout_of(linear, "down" if role == "down" else "up") in NEURONS_LAST else 0
            linear.weight.data = _taken(linear.weight.data, order, dim, halves)
            if linear.bias is not None and role != "down":
                linear.bias.data = _taken(linear.bias.data, order, 0, halves)


def _taken(tensor: torch.Tensor, order: torch.Tensor, dim: int, halves: bool) -> torch.Tensor:
    """Rows or columns in this order; of a fused projection in both halves."""
    order = torch.cat([order, order + len(order)]) if halves else order
    return tensor.index_select(dim, order).contiguous()


def export_adapter(adapter: str, name: str, output: str) -> int:
    """Write a LoRA of the original model for the dense model in a converted folder, whose neurons are in another order.

    Args:
        adapter: Folder that peft has saved.
        name: Converted folder.
        output: New folder.

    Returns:
        The number of tensors whose neurons changed their places.

    Raises:
        UserError: If one of the folders is not what it should be, or the adapter changes a block in another way.
    """
    folder, source = check_output(output), Path(adapter)
    if not (source / ADAPTER).is_file() or not (source / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"--adapter {adapter}: has no {ADAPTER} and {ADAPTER_CONFIG}; give a folder that peft has saved"
        )
    config, blocks = open_record(name)
    try:
        tensors, settings = load_file(source / ADAPTER), json.loads((source / ADAPTER_CONFIG).read_text())
    except (SafetensorError, ValueError):
        raise UserError(f"--adapter {adapter}: {ADAPTER} or {ADAPTER_CONFIG} is damaged; copy it again") from None
    base = getattr(hub.model_class(config, name), "base_model_prefix", "")
    moved = permuted_adapter(tensors, blocks, neuron_orders(name, blocks), base)
    shutil.copytree(source, folder, dirs_exist_ok=True)
    with replacing(folder / ADAPTER) as scratch:
        save_file({**tensors, **moved}, scratch, metadata={"format": "pt"})
    settings["base_model_name_or_path"] = name
    (folder / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    return len(moved)


def permuted_adapter(
    tensors: Mapping[str, torch.Tensor], blocks: list[Block], orders: Mapping[str, torch.Tensor], base: str = ""
) -> dict[str, torch.Tensor]:
    """The tensors of an adapter that belong to a block, with its neurons in the order of the experts.

    Args:
        tensors: Of `adapter_model.safetensors`.
        blocks: The converted blocks.
        orders: See `neuron_orders`.
        base: `base_model_prefix` of the model's class, which paths in either may have.

    Raises:
        UserError: If an adapter of another kind than LoRA changes a block.
    """
    parts: dict[str, tuple[Block, bool]] = {}
    for block in blocks:
        parts.update({path.removeprefix(f"{base}."): (block, False) for path in (block.up, block.gate) if path})
        parts[block.down.removeprefix(f"{base}.")] = (block, True)
    moved = {}
    for key, tensor in tensors.items():
        plain = key.removeprefix("base_model.model.").removeprefix(f"{base}.")
        path = next((p for p in parts if plain.startswith(f"{p}.")), None)
        if path is not None:
            block, down = parts[path]
            if block.role:
                raise UserError(
                    f"--adapter: {key} adapts a projection around attention in whose place a network stands "
                    f"(--attention mlp); train one without {path.rpartition('.')[2]}"
                )
            what, known = plain.removeprefix(f"{path}."), OF_DOWN if down else OF_UP
            if what not in known or (known[what] is not None and tensor.ndim <= known[what]):
                raise UserError(f"--adapter: {key} is no part of a LoRA; only LoRAs can be converted")
            if known[what] is not None:
                moved[key] = _taken(tensor, orders[block.name], known[what], bool(block.fused) and not down)
    return moved
