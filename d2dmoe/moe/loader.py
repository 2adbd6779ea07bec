"""Opening and saving converted checkpoints through `transformers`: the steps that `quantizer.py` has it take.

On disk a checkpoint is the dense model, its neurons merely reordered, plus router and stand-in tensors. Modules are
swapped on the meta device, dense tensors are packed while they load and unpacked when they are saved.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

from ..config.record import Block, D2DMoEConfig
from ..errors import UserError
from ..tensors import shapes_in
from .cache_guard import guard_narrow_heads
from .check import check_block, check_config, check_tensors, refuse_part
from .gating import set_gate
from .layer import DynamicFFN, layers
from .mount import fill, make_layer, mount
from .network import put_networks
from .packing import Neurons, dense_tensors, pack, unpack
from .projected import check_projected, localise_projections, mount_projections
from .projection import projections
from .quantization import D2DMoEQuantizationConfig
from .trainable import trainable


def swap_modules(model: PreTrainedModel, config: D2DMoEConfig, files: Iterable[Any] = ()) -> None:
    """Put layers without weights in the place of the blocks of a dense skeleton.

    Args:
        model: The skeleton.
        config: The record of the checkpoint.
        files: Its weight files, where there are some.

    Raises:
        UserError: If the class has none of the blocks that the checkpoint lists, or the record does not fit its
            modules or the tensors in the files.
    """
    check_config(config)
    put_networks(model, config.blocks, _prefixes(model))
    here = {n: here for n, block in enumerate(config.blocks) if (here := localise(model, block, n)) is not None}
    if not here:
        raise UserError(f"{type(model).__name__} has none of the {len(config.blocks)} blocks of this checkpoint")
    for number, block in here.items():
        check_block(model, number, block)
        mount(model, make_layer(model, number, block, config, budgets=len(config.budgets)))
    shapes = shapes_in(files)
    mount_projections(model, localise_projections(model, config, _prefixes(model), shapes))
    check_tensors(layers(model), shapes, model.base_model_prefix)
    check_projected(projections(model), shapes, model.base_model_prefix)
    _keep_packed(model)
    _guard_initialisation(model)


def _guard_initialisation(model: PreTrainedModel) -> None:
    """Let an initialisation that reaches into a replaced block pass it by (Switch Transformers has such a one).

    It writes to tensors only that the checkpoint lacks, and those are reported.
    """
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part._init_weights = _guarded(part._init_weights)


def _guarded(initialise: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
    def guarded(module: nn.Module) -> None:
        try:
            initialise(module)
        except AttributeError:
            if not any(isinstance(part, DynamicFFN) for part in module.modules()):
                raise

    return guarded


def finish(model: PreTrainedModel, config: D2DMoEConfig, dtype: torch.dtype | None) -> None:
    """After the weights have come: an ordinary floating-point model with its default budget set.

    Raises:
        UserError: If a tensor of a layer was not in the checkpoint.
    """
    _take_marks_off(model)
    _refuse_missing(model)
    model.register_load_state_dict_pre_hook(pack_state)
    if dtype is not None:  # converted tensors keep the file's dtype in transformers 5.17
        cast(model, dtype)
    if len(layers(model)) != len(config.blocks):
        keep = {layer.number for layer in layers(model)}
        config.keep_blocks([number in keep for number in range(len(config.blocks))])
    if len(projections(model)) != len(config.projections):
        keep = {layer.number for layer in projections(model)}
        config.keep_projections([number in keep for number in range(len(config.projections))])
        for place, layer in enumerate(projections(model)):
            layer.number = place
    trainable(model)
    guard_narrow_heads(model)
    set_gate(model, active=config.default_active)


def _take_marks_off(model: PreTrainedModel) -> None:
    """Undo what marks a model as quantised: it is an ordinary floating-point model."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.__dict__.pop("_init_weights", None)  # see `_guard_initialisation`
            module.is_quantized = False
            module.__dict__.pop("quantization_method", None)
            module.__dict__.pop("hf_quantizer", None)
            module.config._is_quantized = False


def _refuse_missing(model: PreTrainedModel) -> None:
    """A tensor that was not in the checkpoint would be silently wrong; `transformers` marks those that were."""
    for layer in layers(model):
        for name, parameter in (*layer.named_parameters(), *layer.named_buffers()):
            if parameter.device.type != "meta" and not getattr(parameter, "_is_hf_initialized", False):
                raise UserError(f"the checkpoint lacks {layer.block.name}.{name}; convert the model again")
    for layer in projections(model):
        for name in layer.ADDED:
            parameter = getattr(layer, name)
            if parameter.device.type != "meta" and not getattr(parameter, "_is_hf_initialized", False):
                raise UserError(f"the checkpoint lacks {layer.projection.name}.{name}; convert the model again")


KEEP = {torch.float16: ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")}
KEEP[torch.bfloat16] = KEEP[torch.float16][1:]


def _matches(model: PreTrainedModel, attribute: str, name: str) -> bool:
    return any(re.search(part.replace("*", ".*"), name) for part in getattr(model, attribute, None) or ())


def _keep_packed(model: PreTrainedModel) -> None:
    """What a tensor is packed into stays in fp32 where the architecture keeps the tensor so (T5 its `wo`)."""
    for attribute in KEEP[torch.float16]:
        packed = {
            target
            for layer in layers(model)
            for source, targets, *_ in dense_tensors(layer.block)
            for target in targets
            if _matches(model, attribute, source)
        }
        setattr(model, attribute, {*(getattr(model, attribute, None) or ()), *packed})


def cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Parameters to a dtype as `from_pretrained(dtype=…)` has them: what the architecture keeps in fp32 stays so."""
    for name, parameter in model.named_parameters():
        kept = any(_matches(model, attribute, name) for attribute in KEEP.get(dtype, ()))
        parameter.data = parameter.data.to(torch.float32 if kept else dtype)


def _prefixes(model: PreTrainedModel) -> list[tuple[str, str]]:
    """`(strip, add)` pairs that turn names of the class that was saved into names of this class."""
    base = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    return [("", ""), (base, ""), ("", base)]


PATHS = ("name", "up", "gate", "down", "activation_module")


def localise(model: PreTrainedModel, block: Block, number: int = 0) -> Block | None:
    """The block under the names that this model class uses; `None` if the class does not have it.

    Raises:
        UserError: If the class has some of its modules, or the module above it.
    """
    missing: list[str] = []
    for strip, add in _prefixes(model):

        def rename(name: str | None, strip: str = strip, add: str = add) -> str | None:
            return name and add + name.removeprefix(strip)

        def is_here(name: str | None, strip: str = strip, rename: Callable = rename) -> bool:
            return name is None or (name.startswith(strip) and _has_module(model, rename(name)))

        lost = [path for path in PATHS if not is_here(getattr(block, path))]
        lost += ["passed_through"] * (not all(map(is_here, block.passed_through)))
        if not lost:
            return Block(
                **{
                    **vars(block),
                    **{k: rename(getattr(block, k)) for k in PATHS},
                    "passed_through": [rename(n) for n in block.passed_through],
                }
            )
        above = block.name.rpartition(".")[0]
        if not {"name", "up", "down"} <= {*lost} or (above and is_here(above)):
            missing = min(missing or lost, lost, key=len)
    return refuse_part(number, block, missing[0]) if missing else None


def _has_module(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


class Pack(ConversionOps):
    """Dense tensors of a projection to packed ones (`reverse=False`), or back."""

    supports_many_to_many = False

    def __init__(self, block: Block, layout: str, order: tuple[str, ...] = (), reverse: bool = False):
        self.block, self.layout, self.order, self.reverse = block, layout, order, reverse

    def convert(
        self, input_dict: dict[str, Any], source_patterns, target_patterns, full_layer_name: str = "", **_: Any
    ) -> dict[str, torch.Tensor]:
        """See `ConversionOps`; `order` names the halves of a fused projection.

        A dense tensor goes by its full name: transformers 5.17 has applied the model's own renamings to it by then and
        would not find the pattern in it.
        """
        tensors = {k: v[0] if isinstance(v, list) else v for k, v in input_dict.items()}
        if self.reverse:
            parts = [unpack(_named(tensors, half), self.layout, self.block.width) for half in self.order or ("",)]
            return {full_layer_name: parts[0] if len(parts) == 1 else torch.cat(parts, dim=self._fused_dim)}
        (tensor,) = tensors.values()
        parts = tensor.chunk(len(self.order), dim=self._fused_dim) if self.order else [tensor]
        return {t: pack(p, self.block.experts, self.layout) for t, p in zip(target_patterns, parts, strict=True)}

    @property
    def _fused_dim(self) -> int:
        return 1 if self.layout == "up_conv1d" else 0

    @property
    def reverse_op(self) -> Pack:
        """The same step the other way."""
        return Pack(self.block, self.layout, self.order, not self.reverse)


def _named(tensors: dict[str, torch.Tensor], half: str) -> torch.Tensor:
    return next(v for k, v in tensors.items() if half in k.rpartition(".")[2])


def conversions(blocks: list[Block], base_prefix: str | None) -> list[WeightConverter | WeightRenaming]:
    """Load-time transforms from dense to packed tensors of these blocks; `transformers` reverses them to save."""

    def pattern(name: str) -> str:
        if base_prefix:
            name = name.removeprefix(f"{base_prefix}.")
        return re.escape(name)

    out: list[WeightConverter | WeightRenaming] = []
    for block in blocks:
        for source, targets, layout, halves in dense_tensors(block):
            patterns = [pattern(target) for target in targets]
            if layout:
                out.append(WeightConverter([pattern(source)], patterns, [Pack(block, layout, halves)]))
            else:
                out.append(WeightRenaming([pattern(source)], patterns))
    return out


def pack_state(model: nn.Module, state: dict[str, torch.Tensor], prefix: str, *_: Any) -> None:
    """Before `load_state_dict`: tensors under their dense names, as in a saved checkpoint, are packed.

    `Trainer` goes back to a checkpoint this way, which would otherwise leave the experts as they are.
    """
    for layer in layers(model):
        for source, targets, layout, halves in dense_tensors(layer.block):
            tensor = state.pop(prefix + source, None)
            if tensor is not None and layout:
                packed = Pack(layer.block, layout, halves).convert({source: tensor}, [source], targets)
                state.update({prefix + name: value for name, value in packed.items()})
            elif tensor is not None:
                state[prefix + targets[0]] = tensor


def attach(model: PreTrainedModel, config: D2DMoEConfig, orders: list[torch.Tensor], *, budgets: int = 0) -> None:
    """Convert a dense model in memory: every block becomes experts, one after the other so that memory stays low.

    Args:
        model: Dense model with real weights.
        config: Its `blocks` have their number of experts set, its `projections` their ranks.
        orders: For each block, its neurons in expert order ``(width,)``.
        budgets: How many sets of stand-ins to make room for.
    """
    config.neuron_order = True
    for number, (block, order) in enumerate(zip(config.blocks, orders, strict=True)):
        block.layouts = _layouts(model, block)
        layer = make_layer(model, number, block, config, budgets=budgets)
        fill(layer, model, order)
        mount(model, layer)
    mount_projections(model, list(enumerate(config.projections)))
    model.register_load_state_dict_pre_hook(pack_state)
    _keep_packed(model)
    trainable(model)
    guard_narrow_heads(model)
    remember(model, config)


def remember(model: PreTrainedModel, config: D2DMoEConfig) -> None:
    """Record the conversion in the model's config, and how `save_pretrained` undoes the packing."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    own = getattr(model, "_weight_conversions", None)
    if own is None:
        own = get_model_conversion_mapping(model, add_legacy=False)
    own = [c for c in own if not any(isinstance(op, Pack) for op in getattr(c, "operations", ()))]
    model._weight_conversions = [*own, *conversions(config.blocks, model.base_model_prefix)]
    wrapper = D2DMoEQuantizationConfig()
    wrapper.d2dmoe = config
    model.config.quantization_config = wrapper


def _layouts(model: nn.Module, block: Block) -> list[str]:
    dense = Neurons(model, block).dense()
    return [dense["up_weight"][1], dense["down_weight"][1]]
