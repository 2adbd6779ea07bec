"""The pipeline: the stages in order, nothing numeric."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .. import hub
from ..config.options import ConvertConfig
from ..config.record import Block
from ..data.batches import Batches, make_batches
from ..data.documents import read_documents
from ..errors import UserError
from ..measure.evaluate import evaluate
from ..moe.gating import stored_config
from ..moe.loader import cast
from ..report.machine import machine, portable
from ..training import first_process, launched, process_device, wait_for_everyone
from ..version import __version__
from .first import prepare_sparsify
from .model import convert_model
from .plan import Plan, fit_to_data, make_plan
from .workdir import (
    check_recipe,
    default_output,
    folder_errors,
    local_files,
    prepare_folders,
    write_checkpoint,
)

Say = Callable[[str], None]


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
    sparsified = prepare_sparsify(config, work) if config.sparsify != "skip" else None
    if sparsified:
        model_config = sparsified.job.changed  # the activation may be another one
    plan, processor = make_plan(model_config, config), hub.load_processor(config.model, model_config, config.revision)
    calibration, held_out = batches_for(config, model_config, plan, processor)
    asleep = fit_to_data(plan, calibration[0], config.data)
    hub.check_safetensors(config.model)
    if first := first_process():
        prepare_folders(output, work, plan, keep=(config.model, config.data), resume=resume, overwrite=overwrite)
    wait_for_everyone()
    recipe = {**asdict(config), "output_dir": named}
    started, results, figures = time.time(), {}, {}
    with folder_errors(output, work) if first else nullcontext():
        if first:
            files = {"model": hub.fingerprint(config.model, model_config), "data": local_files(config.data)}
            check_recipe(work, recipe, files, resume)
        wait_for_everyone()
        if sparsified:
            figures["sparsify"] = sparsified.run(resume, say)
            source, revision, model_config = sparsified.folder, None, hub.read_config(sparsified.folder)
        model = hub.load_model(source, model_config, revision).to(device)
        _tell(plan, asleep, say)
        log = convert_model(
            model, config, calibration, blocks=plan.blocks, work=work, resume=resume, say=say,
            dense=lambda: hub.load_model(source, model_config, revision).to(device),
        )  # fmt: skip
        cast(model, _output_dtype(config, model_config))  # so that the figures describe the checkpoint
        if first:
            figures["rows"] = _figures(model, held_out, processor)
            figures["calibration_tokens"] = calibration.first(config.calibration_tokens).tokens
            results = _record(config, plan, command, started) | {"router_log": log, **figures}
            write_checkpoint(output, work, model, processor, recipe, results, config)
            say(f"saved {named}")
        wait_for_everyone()
    return results


def _tell(plan: Plan, asleep: list[Block], say: Say) -> None:
    """Report the blocks to convert, the blocks that stay dense, and how the experts fit."""
    if asleep:
        say(f"left dense, because they do not run on this data: {', '.join(block.name for block in asleep)}")
    say(f"{len(plan.blocks)} blocks of {plan.blocks[0].experts} experts in {plan.model_class.__name__}")
    if padded := plan.summary()["padded_neurons"]:
        say(f"padded with {padded} zero neurons in memory, because the experts do not divide the width")


def _record(config: ConvertConfig, plan: Plan, command: list[str] | None, started: float) -> dict[str, Any]:
    """The part of `results.json` on the request, the machine and the duration."""
    return {
        "d2dmoe": __version__, "machine": machine(),
        "command": [portable(word) for word in command or ["d2dmoe", "convert", "--model", config.model]],
        "seed": config.seed, "plan": plan.summary(), "minutes": round((time.time() - started) / 60, 2),
    }  # fmt: skip


def _figures(model: PreTrainedModel, held_out: Batches | None, processor: Any) -> list[dict[str, Any]]:
    """Rows of the stored budgets and of the dense model on held-out data; none without such data."""
    if held_out is None:
        return []
    settings = [{"active": a} for a in sorted({*(b.active for b in stored_config(model).budgets), 1.0})]
    return evaluate(model, held_out, settings, tokenizer=processor)


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
