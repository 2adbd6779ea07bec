"""The pipeline: stages in order. Nothing numeric."""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .. import hub
from ..config.options import ConvertConfig
from ..config.record import D2DMoEConfig
from ..config.sizes import choose_experts, ranks, shared_experts, targets
from ..data.batches import Batches, make_batches
from ..data.documents import read_documents
from ..discovery.blocks import discover
from ..errors import UserError
from ..files import write_text
from ..measure.evaluate import evaluate
from ..measure.observe import release_memory
from ..moe.gating import set_gate, stored_config
from ..moe.layer import layers
from ..moe.loader import attach, cast
from ..moe.packing import Neurons
from ..progress import progress
from ..report.machine import machine, portable
from ..sparsify.options import SparsifyConfig, sparsify_stage, training_arguments
from ..stages.budgets.calibrate import calibrate, settle
from ..stages.coactivation import activation_profiles
from ..stages.heal import heal
from ..stages.routers.fit import fit_routers
from ..stages.routers.training import train_routers
from ..stages.split import split_neurons
from ..training import first_process, has_state, launched, process_device, wait_for_everyone
from ..version import __version__
from .plan import Plan, fit_to_data, make_plan
from .sparsify import Job, prepare, sparsify
from .verify import block_outputs, model_outputs, verify
from .workdir import (
    check_recipe,
    default_output,
    fitted,
    folder_errors,
    local_files,
    prepare_folders,
    stage,
    write_checkpoint,
)

Say = Callable[[str], None]
LEAST_UNSEEN = 4096  # tokens to measure a loss on


@launched
def convert(
    config: ConvertConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Say = lambda _: None,
    command: list[str] | None = None,
) -> dict[str, Any]:
    """Convert a model by name and write the checkpoint folder.

    Args:
        config: What to convert and how.
        resume: Go on from what an interrupted run left beside the output folder.
        overwrite: Replace a non-empty output folder, once the new one is complete.
        say: Receives progress messages.
        command: What the user typed, for the record.

    Returns:
        The contents of `results.json`; in processes other than the first an empty mapping.

    Raises:
        UserError: For anything the user can mend, before any long work starts.
    """
    device = process_device(config.device)
    named = config.output_dir or default_output(config.model)
    output = Path(os.path.abspath(named))
    work = output.with_name(output.name + ".partial")
    source, revision, model_config = config.model, config.revision, hub.read_config(config.model, config.revision)
    sparsified = _sparsify_stage(config, work) if config.sparsify != "skip" else None
    if sparsified:
        model_config = sparsified.job.changed  # the activation may be another one
    plan = make_plan(model_config, config)
    processor = hub.load_processor(config.model, model_config, config.revision)
    calibration, held_out = batches_for(config, model_config, plan, processor)
    asleep = fit_to_data(plan, calibration[0], config.data)
    hub.check_safetensors(config.model)
    first = first_process()
    if first:
        prepare_folders(output, work, plan, keep=(config.model, config.data), resume=resume, overwrite=overwrite)
    wait_for_everyone()
    recipe = {**asdict(config), "output_dir": named}
    started, results = time.time(), {}
    with folder_errors(output, work) if first else nullcontext():
        if first:
            files = {"model": hub.fingerprint(config.model, model_config), "data": local_files(config.data)}
            check_recipe(work, recipe, files, resume)
        wait_for_everyone()
        if sparsified:
            figures = sparsified.run(resume, say)
            source, revision, model_config = sparsified.folder, None, hub.read_config(sparsified.folder)
        model = hub.load_model(source, model_config, revision).to(device)
        if asleep:
            say(f"left dense, because they do not run on this data: {', '.join(block.name for block in asleep)}")
        say(f"{len(plan.blocks)} blocks of {plan.blocks[0].experts} experts in {plan.model_class.__name__}")
        if padded := plan.summary()["padded_neurons"]:
            say(f"padded with {padded} zero neurons in memory, because the experts do not divide the width")
        log = convert_model(
            model, config, calibration, blocks=plan.blocks, work=work, resume=resume, say=say,
            dense=lambda: hub.load_model(source, model_config, revision).to(device),
        )  # fmt: skip
        cast(model, _output_dtype(config, model_config))  # the figures are those of the checkpoint
        if first:
            results = {
                "d2dmoe": __version__, "machine": machine(),
                "command": [portable(word) for word in command or ["d2dmoe", "convert", "--model", config.model]],
                "seed": config.seed, "plan": plan.summary(), "minutes": 0.0,
                "calibration_tokens": calibration.first(config.calibration_tokens).tokens, "router_log": log,
                "rows": _figures(model, held_out, processor),
            }  # fmt: skip
            results["minutes"] = round((time.time() - started) / 60, 2)
            if sparsified:
                results["sparsify"] = figures
            write_checkpoint(output, work, model, processor, recipe, results, config)
            say(f"saved {named}")
        wait_for_everyone()
    return results


def _figures(model: PreTrainedModel, held_out: Batches | None, processor: Any) -> list[dict[str, Any]]:
    """Rows of the stored budgets and of the dense model on held-out data; none without such data."""
    if held_out is None:
        return []
    settings = [{"active": a} for a in sorted({*(b.active for b in stored_config(model).budgets), 1.0})]
    return evaluate(model, held_out, settings, tokenizer=processor)


@dataclass
class _SparsifyStage:
    """The first stage, in a folder of its own in the working folder."""

    config: SparsifyConfig
    training: dict[str, Any]
    job: Job

    @property
    def folder(self) -> str:
        """Where the sparsified dense model is, once it is complete."""
        return self.config.output_dir

    def run(self, resume: bool, say: Say) -> dict[str, Any]:
        """Train, unless an earlier run got past this stage; returns what `sparsify` found."""
        results = Path(self.folder, "results.json")
        if not (resume and results.exists()):
            interrupted = Path(f"{self.folder}.partial").exists()
            wait_for_everyone()
            sparsify(self.config, self.training, resume=resume and interrupted, overwrite=True, say=say)
            release_memory()
        return {k: v for k, v in json.loads(results.read_text()).items() if k in ("task", "minutes", "rows", "log")}


def _sparsify_stage(config: ConvertConfig, work: Path) -> _SparsifyStage:
    """Its options and data, checked before anything long begins."""
    own, training = sparsify_stage(config, str(work / "sparsified"))
    job = prepare(own)
    training_arguments(training, own, str(work / "unused"))
    return _SparsifyStage(own, training, job)


def convert_model(
    model: PreTrainedModel,
    config: ConvertConfig,
    batches: Batches,
    *,
    blocks: list | None = None,
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
        work: Folder for what stages leave behind; `None` keeps nothing.
        resume: Use what is there.
        say: Receives progress messages.
        dense: Gives the dense model again, for `speedup` targets; by default a copy is kept for them.

    Returns:
        The router training log.

    Raises:
        UserError: If the model is in half precision, has no block to convert, or cannot be reproduced as experts.
    """
    if model.dtype not in (torch.float32, torch.float64):
        raise UserError(
            f"the model is in {str(model.dtype).removeprefix('torch.')}, and routers and stand-ins are fitted in "
            f"float32; load it with dtype=torch.float32 (cast it after the conversion)"
        )
    model.eval()
    if blocks is None:
        blocks = discover(model).blocks
        if not blocks:
            raise UserError("no feed-forward block found in this model")
        for block in blocks:
            block.experts = choose_experts(block, config.experts, config.expert_size)
    stored = D2DMoEConfig(
        blocks=blocks, gate=config.gate, stand_in=config.stand_in, router_width=config.router_width,
        router_target=config.router_target,
        min_experts=config.min_experts, max_experts=config.max_experts,
        shared_experts=shared_experts(config, blocks), **ranks(config, blocks),
    )  # fmt: skip
    release_memory()
    orders = stage(work, "split", resume, lambda: _split(model, config, blocks, batches, say))
    twin = copy.deepcopy(model) if config.speedup and dense is None else None
    reference, output = block_outputs(model, blocks), model_outputs(model)
    attach(model, stored, [orders[block.name] for block in blocks], budgets=len(targets(config)))
    _zero_constants(model)
    _let_go_of_files(model)
    verify(model, reference, output)
    log = _routers(model, config, batches, work, resume)
    say("routers done; calibrating")
    fitted(
        work,
        "stand-ins",
        resume,
        model,
        stored,
        lambda: _calibrate(model, config, stored, batches, dense or (lambda: twin)),
    )
    if config.heal and stored.budgets:
        say(f"healing: {config.heal} steps of distillation from the dense model")
        fitted(
            work, "healed", resume, model, stored, lambda: _heal(model, config, stored, batches, work, resume),
            everything=config.heal_parameters == "all",
        )  # fmt: skip
    set_gate(model, active=stored.default_active)
    return log


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
    model: PreTrainedModel, config: ConvertConfig, batches: Batches, work: Path | None, resume: bool
) -> list[dict[str, float]]:
    """Fit and train the routers, or take them from an earlier run; returns the training log."""
    log: list[dict[str, float]] = []
    state_dir = work / "router-state" if work is not None else None

    def train() -> dict[str, torch.Tensor]:
        if config.router_fit != "trained" and not (resume and has_state(state_dir)):
            fit_routers(model, batches.first(config.calibration_tokens), config)
        if config.router_fit != "closed-form":
            log.extend(train_routers(model, batches, config, state_dir=state_dir, resume=resume))
        if work is not None and first_process():
            write_text(work / "router-log.json", json.dumps(log))
        return {f"{i}.{k}": v for i, layer in enumerate(layers(model)) for k, v in layer.router.state_dict().items()}

    routers = stage(work, "routers", resume, train)
    for i, layer in enumerate(layers(model)):
        layer.router.load_state_dict({k: routers[f"{i}.{k}"] for k in ("hidden", "score")})
    return log or (json.loads((work / "router-log.json").read_text()) if work is not None else [])


def _let_go_of_files(model: PreTrainedModel) -> None:
    """Copy what still lies in the mapped weight files: the dense blocks in them are no longer needed in memory."""
    packed = {id(p) for layer in layers(model) for p in layer.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in packed:
            parameter.data = parameter.data.clone()


def _zero_constants(model: PreTrainedModel) -> None:
    for layer in layers(model):
        for value in layer.stand_ins().values():
            value.data.zero_()


def _calibrate(
    model: PreTrainedModel, config: ConvertConfig, stored: D2DMoEConfig, batches: Batches,
    dense: Callable[[], PreTrainedModel] | None,
) -> None:  # fmt: skip
    fitting, unseen = batches.first(config.calibration_tokens), batches.after(config.calibration_tokens)
    if config.max_loss and unseen.tokens < LEAST_UNSEEN:  # too little text for both: a fifth is kept from the fits
        fitting = batches.first(batches.tokens * 4 // 5)
        unseen = batches.after(batches.tokens * 4 // 5)
    calibrate(
        model, fitting, stored, targets(config),
        thresholds=config.thresholds, allocation=config.allocation, unseen=unseen, dense=dense,
    )  # fmt: skip


def _heal(
    model: PreTrainedModel, config: ConvertConfig, stored: D2DMoEConfig, batches: Batches,
    work: Path | None, resume: bool,
) -> None:  # fmt: skip
    state_dir = work / "heal-state" if work is not None else None
    heal(model, batches, config, stored, state_dir=state_dir, resume=resume)
    settle(model, batches.first(config.calibration_tokens), stored)


def batches_for(config: ConvertConfig, model_config: Any, plan: Plan, processor: Any) -> tuple[Batches, Batches | None]:
    """Calibration batches, shuffled, and held-out batches (`None` when `eval_tokens` is 0)."""
    data = hub.fit_length(config, model_config)
    causal = hub.is_causal(plan.model_class)
    label2id = model_config.label2id if hub.is_classifier(plan.model_class, model_config) else None

    def make(part: str) -> Batches:
        documents = read_documents(config.data, part, config.text_column, config.label_column)
        return make_batches(documents, processor, data, packed=causal, label2id=label2id)

    calibration = make("calibration").shuffled(config.seed)
    if not config.eval_tokens:
        return calibration, None
    try:
        return calibration, make("held_out").first(config.eval_tokens)
    except UserError as error:
        raise UserError(f"{error} (this is the part held out for the figures; --eval-tokens 0 skips them)") from None


def _output_dtype(config: ConvertConfig, model_config: Any) -> torch.dtype:
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    stored = getattr(model_config, "dtype", None) or torch.float32
    return stored if isinstance(stored, torch.dtype) else getattr(torch, str(stored).removeprefix("torch."))
