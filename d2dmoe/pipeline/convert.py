"""The pipeline: the stages in order, nothing numeric."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .. import hub
from ..config.options import ConvertConfig, heals_everything
from ..config.record import Block
from ..data.batches import Batches
from ..data.reading import sources_of
from ..measure.drift import SecondText, second_text
from ..measure.evaluate import evaluate_both
from ..measure.metrics import choose_metric
from ..measure.upcast import Upcasting, upcast_vectors
from ..moe.gating import stored_config
from ..moe.loader import cast
from ..report.card import model_card
from ..report.card_sections import extended_card
from ..report.machine import machine, portable
from ..training import broadcast, first_process, launched, process_device, wait_for_everyone
from ..twin import read_dense_config
from ..version import __version__
from .first import SparsifyStage, prepare_sparsify
from .model import convert_model, healing_of
from .parts import both_parts
from .plan import ConversionPlan, fit_to_data, make_plan, stored_dtype
from .reporting import add_report, usage_of
from .workdir import (
    check_recipe,
    finish_publishing,
    folder_errors,
    local_files,
    named_folders,
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
    named, output, work = named_folders(config.output_dir, config.model, "d2dmoe")
    job = _prepare(config, work)
    if first := first_process():
        keep = (config.model, *sources_of(config.data), *sources_of(config.also_eval or config.data))
        prepare_folders(output, work, job.plan, keep=keep, resume=resume, overwrite=overwrite)
    wait_for_everyone()
    recipe, results, started = {**asdict(config), "output_dir": named}, {}, time.time()
    with folder_errors(output, work) if first else nullcontext():
        if first:
            files = {"model": hub.fingerprint(config.model, job.model_config), "data": local_files(config.data)}
            check_recipe(work, recipe, files, resume)
        wait_for_everyone()
        if (done := broadcast(finish_publishing(output, work) if first else None)) is not None:
            return done if first else {}
        sparsified = {"sparsify": job.sparsified.run(resume, say)} if job.sparsified else {}
        model, log, dense = _converted(job, config, work, resume, say)
        if first:
            rows = _figures(model, job, dense, healed=heals_everything(recipe))
            results = _record(config, job.plan, command, started) | {"router_log": log, **sparsified}
            results |= {**healing_of(config, work), "rows": rows}
            results["calibration_tokens"] = job.calibration.first(config.calibration_tokens).tokens
            further = hub.companions(config.model, config.revision)
            usage = usage_of(model, job.held_out, job.processor, config.report_samples, say)
            say(write_checkpoint(
                output, work, model, job.processor, recipe, results, _card, further,
                report=lambda folder: add_report(folder, output.name, usage, say),
            ))  # fmt: skip
        wait_for_everyone()
    return results


@dataclass
class _Job:
    """Everything that is known before any weights are read."""

    device: torch.device
    model_config: Any
    sparsified: SparsifyStage | None
    plan: ConversionPlan
    processor: Any
    calibration: Batches
    held_out: Batches | None
    second: SecondText | None
    asleep: list[Block]  # blocks that do not run on this data


def _prepare(config: ConvertConfig, work: Path) -> _Job:
    """Check device, model and data against each other.

    Raises:
        UserError: For anything the user can mend.
    """
    device, model_config = process_device(config.device), read_dense_config(config.model, config.revision)
    hub.refuse_quantised(config.model, model_config)
    sparsified = prepare_sparsify(config, work) if config.sparsify != "skip" else None
    if sparsified:
        model_config = sparsified.job.changed  # the activation may be another one
    processor = functools.cache(lambda: hub.load_processor(config.model, model_config, config.revision))
    kind = hub.model_class(model_config, config.model)
    parts = functools.cache(lambda: both_parts(config, kind, model_config, processor()))
    plan = make_plan(model_config, config, lambda: parts()[0][0])
    calibration, held_out = parts()
    calibration, processor = calibration.shuffled(config.seed), processor()
    asleep = fit_to_data(plan, calibration[0], config.data)
    hub.check_safetensors(config.model)
    second = _second_text(config, model_config, plan, processor, held_out)
    return _Job(device, model_config, sparsified, plan, processor, calibration, held_out, second, asleep)


def _second_text(
    config: ConvertConfig, model_config: Any, plan: ConversionPlan, processor: Any, held_out: Batches | None
) -> SecondText | None:
    """The text of `--also-eval`, measured by what the held-out data is measured by."""
    if not config.also_eval or held_out is None:
        return None
    kind = plan.model_class
    metric = choose_metric(None, kind, model_config, held_out.collate(held_out.items[:1]), processor)
    return second_text(
        config.also_eval, config, name=config.model, config=model_config, kind=kind, processor=processor,
        metric=metric, tokens=config.eval_tokens, revision=config.revision,
    )  # fmt: skip


def _converted(
    job: _Job, config: ConvertConfig, work: Path, resume: bool, say: Say
) -> tuple[PreTrainedModel, list[dict[str, float]], Callable[[], PreTrainedModel]]:
    """The converted model in the dtype of the checkpoint, whose figures it gives, the router training log, and what
    gives the dense model in that dtype."""
    source, revision, model_config = config.model, config.revision, job.model_config
    if job.sparsified:
        source, revision, model_config = job.sparsified.folder, None, hub.read_config(job.sparsified.folder)

    dtype = stored_dtype(model_config) if config.low_memory else torch.float32

    def dense() -> PreTrainedModel:
        return hub.load_model(source, model_config, revision, dtype).to(job.device)

    model = dense()
    hub.check_finite(config.model, model)
    _tell(job.plan, job.asleep, say)
    with Upcasting() if config.low_memory else nullcontext():
        upcast_vectors(model)
        log = convert_model(
            model,
            config,
            job.calibration,
            blocks=job.plan.blocks,
            projections=job.plan.projections,
            work=work,
            resume=resume,
            say=say,
            dense=dense,
        )
    dtype = _output_dtype(config, model_config)
    cast(model, dtype)

    def original() -> PreTrainedModel:
        cast(found := dense(), dtype)
        return found

    return model, log, original


def _tell(plan: ConversionPlan, asleep: list[Block], say: Say) -> None:
    """Report the blocks to convert, the blocks that stay dense, and how the experts fit."""
    if asleep:
        say(f"left dense, because they do not run on this data: {', '.join(block.name for block in asleep)}")
    say(f"{len(plan.blocks)} blocks of {plan.blocks[0].experts} experts in {plan.model_class.__name__}")
    if plan.networks:
        experts = "/".join(map(str, sorted({block.experts for block in plan.networks})))
        say(f"{len(plan.networks)} projections become networks of {experts} experts; only d2dmoe opens the checkpoint")
    if padded := plan.summary()["padded_neurons"]:
        say(f"padded with {padded} zero neurons in memory, because the experts do not divide the width")


def _record(config: ConvertConfig, plan: ConversionPlan, command: list[str] | None, started: float) -> dict[str, Any]:
    """The part of `results.json` on the request, the machine and the duration."""
    return {
        "d2dmoe": __version__, "machine": machine(),
        "command": [portable(word) for word in command or ["d2dmoe", "convert", "--model", config.model]],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": config.seed, "plan": plan.summary(), "minutes": round((time.time() - started) / 60, 2),
    }  # fmt: skip


def _figures(
    model: PreTrainedModel, job: _Job, dense: Callable[[], PreTrainedModel], *, healed: bool
) -> list[dict[str, Any]]:
    """Rows of the stored budgets and of everything on, on held-out data; none without such data.

    `dense` gives the dense model, which is needed where the converted one does not hold it: all of it was `healed`, or
    networks stand in the places of some maps.
    """
    if job.held_out is None:
        return []
    stored = stored_config(model)
    settings = [{"active": a} for a in sorted({*(b.active for b in stored.budgets), 1.0})]
    original = dense() if healed or stored.networks else None
    return evaluate_both(model, job.held_out, job.second, settings, tokenizer=job.processor, original=original)


def _card(model: PreTrainedModel, recipe: dict[str, Any], results: dict[str, Any], origin: dict[str, Any]) -> str:
    return extended_card(model_card(model, recipe, results, origin), results)


def _output_dtype(config: ConvertConfig, model_config: Any) -> torch.dtype:
    return getattr(torch, config.dtype) if config.dtype != "auto" else stored_dtype(model_config)
