"""The stages of a conversion on a loaded model, in order."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..attention.fit import BasisSpectra, fit_all
from ..attention.head import fit_head
from ..attention.networks import distil_networks, in_running_order, install_networks
from ..config.options import ConvertConfig
from ..config.projections import HEAD, Projection
from ..config.record import Block, D2DMoEConfig
from ..config.sizes import (
    attention_way,
    choose_experts,
    choose_projections,
    network_block,
    ranks,
    shared_experts,
    targets,
)
from ..data.batches import Batches
from ..discovery.blocks import discover
from ..discovery.projections import find_projections
from ..errors import UserError, first_line
from ..files import write_text
from ..measure.layer_inputs import LayerInputs
from ..measure.observe import model_inputs, pieces, release_memory
from ..measure.upcast import Upcasting
from ..moe.gating import set_gate
from ..moe.layer import layers
from ..moe.loader import attach, remember
from ..moe.packing import Neurons
from ..moe.projected import trim_projections
from ..moe.projection import around_attention
from ..progress import progress
from ..stages.budgets.calibrate import calibrate, calibrate_again
from ..stages.budgets.receivers import measure_ways
from ..stages.budgets.shares import Plan
from ..stages.coactivation import activation_profiles
from ..stages.heal import heal
from ..stages.routers.fit import fit_routers
from ..stages.routers.training import train_routers
from ..stages.split import split_neurons
from ..training import first_process
from ..training_state import has_state
from .plan import choose_head
from .verify import block_outputs, model_outputs, verify
from .workdir import (
    fitted,
    stage,
)

Say = Callable[[str], None]
LEAST_UNSEEN = 4096  # tokens to measure a loss on
HEALING = "healing.json"  # what healing found, in the working folder


def convert_model(
    model: PreTrainedModel,
    config: ConvertConfig,
    batches: Batches,
    *,
    blocks: list | None = None,
    projections: list[Projection] | None = None,
    work: Path | None = None,
    resume: bool = False,
    say: Say = lambda _: None,
    dense: Callable[[], PreTrainedModel] | None = None,
) -> list[dict[str, float]]:
    """Convert a loaded model in place: split, verify, train routers, calibrate.

    Args:
        model: Dense model in fp32 (fits are made from what it computes); it may be cast afterwards. Everything
            runs where its weights are.
        config: Method and sizes; data and output keys are not used.
        batches: Calibration batches.
        blocks: From a plan; discovered on the model itself when `None`.
        projections: Likewise.
        work: Folder for what stages leave behind; `None` keeps nothing.
        resume: Use what is there.
        say: Receives progress messages.
        dense: Gives the dense model again, for `speedup` targets; by default a copy is kept for them.

    Returns:
        The router training log.

    Raises:
        UserError: If the model is in half precision, has no block to convert, or cannot be reproduced as experts; or
            if it is wrapped or converted already, or the batches are none or do not fit it.
    """
    _check_given(model, batches)
    model.eval()
    blocks = _blocks_of(model, config, batches) if blocks is None else blocks
    projections = _projections_of(model, config, batches) if projections is None else projections
    dense = dense or _twin(model, config)
    attention, head = [p for p in projections if p.role != HEAD], [p for p in projections if p.role == HEAD]
    if attention and _by_networks(config):
        blocks, projections = _networks(model, config, blocks, attention, batches, work, resume, say), head
        attention = []
    stored = _record(config, blocks, projections)
    release_memory()
    orders = stage(work, "split", resume, lambda: _split(model, config, blocks, batches, say))
    reference, output = block_outputs(model, blocks, batches[0]), model_outputs(model, batches[0])
    attach(model, stored, [orders[block.name] for block in blocks], budgets=len(targets(config)))
    _zero_constants(model)
    for layer in layers(model):
        layer.router.to(torch.promote_types(layer.router.hidden.dtype, torch.float32))
    _let_go_of_files(model)
    verify(model, reference, output, batches[0])
    inputs = LayerInputs(model, _calibration_text(config, batches)[0], work, 0 if config.low_memory else None)
    log = _routers(model, config, batches, inputs, work, resume)
    say("routers done; calibrating")
    spectra = _bases(model, config, batches, work, resume) if attention else None
    fitted(
        work, "stand-ins", resume, model, stored,
        lambda: _calibrate(model, config, stored, batches, inputs, dense, spectra),
    )  # fmt: skip
    inputs.forget()
    if config.heal and stored.budgets:
        say(f"healing: {config.heal} steps of distillation from the dense model")
        fitted(
            work, "healed", resume, model, stored,
            lambda: _heal(model, config, stored, batches, dense, work, resume, say),
            everything=config.heal_parameters == "all",
        )  # fmt: skip
    trim_projections(model, stored)
    remember(model, stored)
    set_gate(model, active=stored.default_active)
    return log


def _check_precision(model: PreTrainedModel) -> None:
    if model.dtype not in (torch.float32, torch.float64) and not Upcasting.active:
        raise UserError(
            f"the model is in {str(model.dtype).removeprefix('torch.')}, and routers and stand-ins are fitted in "
            f"float32; load it with dtype=torch.float32 (cast it after the conversion)"
        )


def _by_networks(config: ConvertConfig) -> bool:
    """Do networks take the places of projections? Then the converted model does not hold the dense one."""
    return attention_way(config.attention)[0] == "mlp"


def _check_given(model: PreTrainedModel, batches: Batches) -> None:
    """Raises `UserError` if these are no dense model and its batches."""
    if not isinstance(model, PreTrainedModel):
        remedy = "merge its adapter first (merge_and_unload)" if hasattr(model, "merge_and_unload") else "unwrap it"
        raise UserError(f"{type(model).__name__} is no model of transformers; {remedy}")
    _check_precision(model)
    if layers(model):
        raise UserError("this model is converted already; give the dense model it came from")
    if not isinstance(batches, Batches) or not len(batches):
        raise UserError("batches must be a d2dmoe.data.Batches with something in it, for instance Batches(rows, 8)")
    try:
        with torch.no_grad():
            model(**model_inputs(model, next(pieces(batches, 1))))
    except Exception as error:
        raise UserError(f"{type(model).__name__} does not run on these batches: {first_line(error)}") from None


def _twin(model: PreTrainedModel, config: ConvertConfig) -> Callable[[], PreTrainedModel | None]:
    """Gives a copy of the dense model, kept where something is compared with it later."""
    twin = copy.deepcopy(model) if config.speedup or _by_networks(config) else None
    return lambda: twin


def _record(config: ConvertConfig, blocks: list[Block], projections: list[Projection]) -> D2DMoEConfig:
    """The record of the checkpoint, before it has budgets."""
    return D2DMoEConfig(
        blocks=blocks, gate=config.gate, stand_in=config.stand_in, router_width=config.router_width,
        router_target=config.router_target, min_experts=config.min_experts, max_experts=config.max_experts,
        shared_experts=shared_experts(config, blocks), projections=projections, **ranks(config, blocks),
    )  # fmt: skip


def _blocks_of(model: PreTrainedModel, config: ConvertConfig, batches: Batches) -> list[Block]:
    """Every block of the model, each with its number of experts."""
    blocks = discover(model, sample=lambda: batches[0]).blocks
    if not blocks:
        raise UserError("no feed-forward block found in this model")
    for block in blocks:
        block.experts = choose_experts(block, config.experts, config.expert_size)
    return blocks


def _projections_of(model: PreTrainedModel, config: ConvertConfig, batches: Batches) -> list[Projection]:
    """The projections to convert, and the head."""
    found = []
    if config.attention != "none":
        around = find_projections(model, sample=lambda: batches[0])
        found = choose_projections(config, around.found, around.refused)
    return [*found, *choose_head(config, model, found)]


def _networks(
    model: PreTrainedModel, config: ConvertConfig, blocks: list[Block], projections: list[Projection], batches: Batches,
    work: Path | None, resume: bool, say: Say,
) -> list[Block]:  # fmt: skip
    """Put distilled networks in the places of projections; returns all blocks, in the order in which they run."""
    added = [network_block(config, projection) for projection in projections]
    ordered = in_running_order(model, [*blocks, *added], batches[0])
    state_dir = work / "attention-state" if work is not None else None

    def distil() -> dict[str, torch.Tensor]:
        say(f"distilling {len(added)} networks in the places of projections on {config.attention_tokens} tokens")
        tensors, log = distil_networks(
            model, projections, added, batches, config, seed=config.seed, state_dir=state_dir, resume=resume
        )
        say(f"networks miss {log[-1]['error']:.2%} of the variance of what the projections give")
        return tensors

    install_networks(model, added, stage(work, "networks", resume, distil))
    return ordered


def _split(
    model: PreTrainedModel, config: ConvertConfig, blocks: list, batches: Batches, say: Say
) -> dict[str, torch.Tensor]:
    orders, profiles, shared = {}, None, shared_experts(config, blocks)
    if config.split.startswith("coactivation") or shared:
        tokens = batches.first(config.calibration_tokens)
        profiles = activation_profiles(model, blocks, tokens, signed=config.split.endswith("signed"), seed=config.seed)
    for number, block in enumerate(progress(blocks, desc="split")):
        started = time.time()
        rows = profiles[block.name].rows if profiles else Neurons(model, block).rows()
        always = profiles[block.name].largest(shared * block.size) if profiles and shared else None
        orders[block.name] = split_neurons(
            config.split, rows, block.experts, config.seed * 1000 + number, shared=always
        )
        say(f"split {block.name}: {block.experts} experts in {time.time() - started:.2f} s")
    return orders


def _routers(
    model: PreTrainedModel, config: ConvertConfig, batches: Batches, inputs: LayerInputs, work: Path | None,
    resume: bool,
) -> list[dict[str, float]]:  # fmt: skip
    """Fit and train the routers, or take them from an earlier run; returns the training log."""
    log: list[dict[str, float]] = []
    state_dir = work / "router-state" if work is not None else None

    def train() -> dict[str, torch.Tensor]:
        if config.router_fit != "trained" and not (resume and has_state(state_dir)):
            fit_routers(model, inputs.batches, config, inputs=inputs)
        if config.router_fit != "closed-form":
            log.extend(train_routers(model, batches, config, state_dir=state_dir, resume=resume))
        if work is not None and first_process():
            write_text(work / "router-log.json", json.dumps(log))
        return {f"{i}.{k}": v for i, layer in enumerate(layers(model)) for k, v in layer.router.state_dict().items()}

    routers = stage(work, "routers", resume, train)
    for i, layer in enumerate(layers(model)):
        layer.router.load_state_dict({k: routers[f"{i}.{k}"] for k in ("hidden", "score")})
    return log or (json.loads((work / "router-log.json").read_text()) if work is not None else [])


def _bases(
    model: PreTrainedModel, config: ConvertConfig, batches: Batches, work: Path | None, resume: bool
) -> BasisSpectra:
    """Fit the bases of the projections, or take them from an earlier run; returns their spectra."""

    def fit() -> dict[str, torch.Tensor]:
        each, heads = fit_all(model, batches.first(config.calibration_tokens), config.seed)
        found = {f"{i}.spectrum.{n}": s for i, own in enumerate(each) for n, s in enumerate(own)}
        found |= {f"heads.{name}": spectra for name, spectra in heads.items()}
        return found | {
            f"{i}.{name}": getattr(x, name) for i, x in enumerate(around_attention(model)) for name in x.ADDED
        }

    tensors = stage(work, "projections", resume, fit)
    for i, layer in enumerate(around_attention(model)):
        for name in layer.ADDED:
            getattr(layer, name).data.copy_(tensors[f"{i}.{name}"])
    each = [
        [tensors[f"{i}.spectrum.{n}"] for n in range(len(layer.projection.sections))]
        for i, layer in enumerate(around_attention(model))
    ]
    return BasisSpectra(each, {k.removeprefix("heads."): v for k, v in tensors.items() if k.startswith("heads.")})


def _let_go_of_files(model: PreTrainedModel) -> None:
    """Copy tensors out of the mapped weight files, so that the dense blocks in them leave memory."""
    packed = {id(p) for layer in layers(model) for p in layer.parameters()}  # projections still have theirs in files
    for parameter in model.parameters():
        if id(parameter) not in packed:
            parameter.data = parameter.data.clone()


def _zero_constants(model: PreTrainedModel) -> None:
    for layer in layers(model):
        for value in layer.stand_ins().values():
            value.data.zero_()


def _calibration_text(config: ConvertConfig, batches: Batches) -> tuple[Batches, Batches]:
    """Batches for thresholds and stand-ins, and batches that these do not see, for losses."""
    fitting, unseen = batches.first(config.calibration_tokens), batches.after(config.calibration_tokens)
    if config.max_loss and unseen.tokens < LEAST_UNSEEN:  # too little text for both: a fifth is kept from the fits
        fitting = batches.first(batches.tokens * 4 // 5)
        unseen = batches.after(batches.tokens * 4 // 5)
    return fitting, unseen


def _calibrate(
    model: PreTrainedModel, config: ConvertConfig, stored: D2DMoEConfig, batches: Batches, inputs: LayerInputs,
    dense: Callable[[], PreTrainedModel] | None, spectra: BasisSpectra | None,
) -> None:  # fmt: skip
    fitting, unseen = _calibration_text(config, batches)
    plan = Plan()
    if spectra:
        way, _ = attention_way(config.attention)
        text = unseen.first(config.calibration_tokens) if unseen.tokens >= LEAST_UNSEEN else fitting
        measured = measure_ways(model, text, *spectra, way)
        plan = Plan(measured.receivers(way), config.attention_active, text=text)
    if config.head != "none":
        plan.head = fit_head(model, fitting, config.head_active)
    calibrate(
        model, fitting, stored, targets(config),
        thresholds=config.thresholds, allocation=config.allocation, unseen=unseen, dense=dense,
        plan=plan, inputs=inputs, compensate=config.compensate,
    )  # fmt: skip


def _heal(
    model: PreTrainedModel, config: ConvertConfig, stored: D2DMoEConfig, batches: Batches,
    dense: Callable[[], PreTrainedModel] | None, work: Path | None, resume: bool, say: Say,
) -> None:  # fmt: skip
    state_dir = work / "heal-state" if work is not None else None
    teacher = dense() if stored.networks else None
    last = heal(model, batches, config, stored, state_dir=state_dir, resume=resume, teacher=teacher)[-1]
    if work is not None and first_process():
        keys = ("before", "after", "relative", "bases_learning_rate")
        found = {"steps": config.heal, **{key: last[key] for key in keys if key in last}}
        write_text(work / HEALING, json.dumps(found | {"kept": "step" in last and last["relative"] < 1}))
    say(_healed(last))
    fitting, unseen = _calibration_text(config, batches)
    calibrate_again(model, fitting, stored, targets(config), unseen=unseen, dense=dense)


def _healed(last: dict[str, float]) -> str:
    """What healing did, by the last row of its log."""
    if "step" not in last:
        return "healing left out: nothing stands in for anything at the stored budgets, so nothing learns"
    lost = f"{last['before']:.4g} to {last['after']:.4g} from the dense model, {last['relative']:.2f} of it in the mean"
    lost += " over the budgets, on text kept from healing"
    if "bases_learning_rate" in last:
        lost += f"; learning rate of bases {last['bases_learning_rate']:.2g}"
    return f"healed: {lost}" if last["relative"] < 1 else f"healing undone: {lost}; try a lower --heal-learning-rate"


def healing_of(config: ConvertConfig, work: Path) -> dict[str, dict[str, Any]]:
    """For `results.json`: steps, distance from the dense model before and after, and whether healing was kept."""
    return {"healing": json.loads((work / HEALING).read_text())} if config.heal and (work / HEALING).exists() else {}
