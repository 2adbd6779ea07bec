"""The verb `sparsify`: from names to a folder that holds a dense model with sparser activations."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, parse_flag_from_env
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, set_seed

from .. import hub
from ..config.record import Block
from ..data.batches import Batches
from ..data.reading import sources_of
from ..discovery.blocks import discover
from ..discovery.skeleton import skeleton
from ..errors import UserError, first_line
from ..files import write_text
from ..measure.evaluate import evaluate
from ..progress import progress
from ..report.machine import machine, portable
from ..sparsify.activation import activation_name, swapped_config
from ..sparsify.card import sparsified_card
from ..sparsify.options import SparsifyConfig, training_arguments
from ..sparsify.states import Epochs, Marks, any_state, last_complete
from ..sparsify.statistics import activation_shares
from ..sparsify.tasks import choose_task, collator
from ..sparsify.trainer import SparsifyTrainer
from ..training import accelerate_state_kept, attention_for, broadcast, on_cpu, pick_device
from ..twin import read_dense_config
from ..version import __version__
from .parts import both_parts
from .plan import survey
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


@dataclass
class Job:
    """All facts that need no weights."""

    kind: type[PreTrainedModel]
    original: Any  # the model's config
    changed: Any  # the same with another activation
    blocks: list[Block]
    processor: Any
    train: Batches
    held_out: Batches | None
    task: str
    disk_bytes: int


def prepare(config: SparsifyConfig) -> Job:
    """Check model, data, activation and task against each other.

    Raises:
        UserError: For anything the user can mend.
    """
    original = read_dense_config(config.model, config.revision)
    if getattr(original, "quantization_config", None) is not None:
        done = "already converted" if hub.is_converted(original) else "quantised"
        raise UserError(f"--model {config.model}: {done}; sparsify comes before that, on the dense model")
    bones, found = survey(original, config.model)
    kind = type(bones)
    if not found.blocks:
        raise UserError(f"--model {config.model}: no feed-forward block found, so there is nothing to sparsify")
    changed = original
    if config.activation != "keep":
        changed = swapped_config(kind, original, activation_name(config.activation, config.threshold))
    blocks = discover(skeleton(kind, changed)).blocks
    processor = hub.load_processor(config.model, original, config.revision)
    train, held_out = both_parts(config, kind, original, processor)
    task = choose_task(config.task, kind, original, train, processor, config.data)
    _with_adapters(skeleton(kind, changed), config)
    hub.check_safetensors(config.model)
    size = sum(p.numel() for p in bones.parameters())
    states = 2 + 1  # two training states and the result
    return Job(kind, original, changed, blocks, processor, train, held_out, task, 4 * size * (3 * states))


@accelerate_state_kept()
def sparsify(
    config: SparsifyConfig,
    training: dict[str, Any] | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Say = lambda _: None,
    command: list[str] | None = None,
    compute_loss_func: Callable | None = None,
) -> dict[str, Any]:
    """Fine-tune a model by name with a sparsity regulariser and write the dense result.

    Args:
        config: What to train and how.
        training: Fields of `transformers.TrainingArguments`.
        resume: Go on from what an interrupted run left beside the output folder.
        overwrite: Replace a non-empty output folder, once the new one is complete.
        say: Receives progress messages.
        command: What the user typed, for the record.
        compute_loss_func: Another task loss, as `transformers.Trainer` takes it.

    Returns:
        The contents of `results.json`; in processes other than the first an empty mapping.

    Raises:
        UserError: For anything the user can mend, before any long work starts.
    """
    state = PartialState(cpu=on_cpu(config.device))
    first = state.is_main_process
    say = say if first else lambda _: None
    device = state.device if state.num_processes > 1 else pick_device(config.device)
    job = prepare(config)
    named, output, work = named_folders(config.output_dir, config.model, "sparse")
    arguments = training_arguments(_fitting(training or {}, job), config, str(work / "training"))
    _check_sharding(arguments, state)
    if first:
        keep = (config.model, *sources_of(config.data))
        prepare_folders(output, work, job, keep=keep, resume=resume, overwrite=overwrite)
    state.wait_for_everyone()
    recipe, results = {**asdict(config), "output_dir": named, **(training or {})}, {}
    started = time.time()
    with folder_errors(output, work, any_state) if first else nullcontext():
        if first:
            files = {"model": hub.fingerprint(config.model, job.original), "data": local_files(config.data)}
            check_recipe(work, recipe | {"processes": state.num_processes}, files, resume)
        state.wait_for_everyone()
        if (done := broadcast(finish_publishing(output, work) if first else None)) is not None:
            return done if first else {}
        before = _before(job, config, work, resume, device, say) if first else {}
        state.wait_for_everyone()
        trainer, model = _train(job, config, arguments, compute_loss_func, work if resume else None, say)
        if first:
            original = _original(job, config).to(device) if job.held_out else None
            after = figures(model.to(device), job, config, original)
            rows = [{"model": "before", **before}, {"model": "after", **after}]
            results = _record(config, job, trainer, command, started) | {"rows": rows}
            further = hub.companions(config.model, config.revision)
            model, card = model.cpu(), sparsified_card
            say(write_checkpoint(output, work, model, job.processor, recipe, results, card, further))
        state.wait_for_everyone()
    return results


def _train(
    job: Job, config: SparsifyConfig, arguments: Any, loss: Callable | None, interrupted: Path | None, say: Say
) -> tuple[SparsifyTrainer, PreTrainedModel | None]:
    """Train, from the last state in the working folder of an interrupted run on; see `_trained` for the model."""
    model = hub.load_model(config.model, job.changed, config.revision, changed=True)
    hub.check_finite(config.model, model)
    trainer = _trainer(model, job, config, arguments, loss)
    last = last_complete(interrupted / "training") if interrupted else None
    say(f"{job.task} on {len(job.train.items)} samples, {config.regulariser} α {config.alpha:g}")
    with attention_for(model, job.train.longest, bf16=arguments.bf16, device=arguments.device):
        trainer.train(resume_from_checkpoint=last)
    return trainer, _trained(trainer, job, config)


def _record(
    config: SparsifyConfig, job: Job, trainer: SparsifyTrainer, command: list[str] | None, started: float
) -> dict[str, Any]:
    """The part of `results.json` that says what was asked for, of which machines, and how long it took."""
    return {
        "d2dmoe": __version__, "machine": machine(), "seed": config.seed, "task": job.task,
        "command": [portable(word) for word in command or ["d2dmoe", "sparsify", "--model", config.model]],
        "minutes": round((time.time() - started) / 60, 2), "processes": PartialState().num_processes,
        "distributed": trainer.accelerator.distributed_type.value,
        "log": [row for row in trainer.state.log_history if "loss" in row],
    }  # fmt: skip


def _check_sharding(arguments: Any, state: PartialState) -> None:
    """Refuse `--fsdp` where accelerate cannot shard: it would silently train copies of the model, or a single one."""
    wanted = arguments.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP")
    if wanted and state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
        where = "on the CPU" if state.device.type == "cpu" else "in one process"
        raise UserError(f"--fsdp: a model is sharded over several GPUs, and this training is {where}; leave it out")


def _fitting(training: dict[str, Any], job: Job) -> dict[str, Any]:
    """Batch sequences of similar length, if lengths differ and the user asks for nothing else."""
    lengths = {len(item.get("input_ids", ())) for item in job.train.items}
    return {"train_sampling_strategy": "group_by_length"} | training if len(lengths) > 1 else training


def _original(job: Job, config: SparsifyConfig) -> PreTrainedModel:
    """The model as it was, before its activation is swapped and it is trained."""
    return hub.load_model(config.model, job.original, config.revision)


def _before(
    job: Job, config: SparsifyConfig, work: Path, resume: bool, device: torch.device, say: Say
) -> dict[str, Any]:
    """Figures of the original model, kept for a resumed run."""
    file = work / "before.json"
    if resume and file.exists():
        kept = json.loads(file.read_text())
        if kept["eval_tokens"] == config.eval_tokens:
            return kept["figures"]
    model = _original(job, config).to(device)
    found = figures(model, job, config)
    write_text(file, json.dumps({"eval_tokens": config.eval_tokens, "figures": found}))
    return found


def figures(
    model: PreTrainedModel, job: Job, config: SparsifyConfig, original: PreTrainedModel | None = None
) -> dict[str, Any]:
    """Quality on held-out data, beside that of `original`, and how sparse the hidden activations are there.

    Empty without such data.
    """
    if job.held_out is None:
        return {}
    row = evaluate(model, job.held_out, [], tokenizer=job.processor, original=original)[0]
    blocks = discover(skeleton(type(model), model.config)).blocks
    by_block = activation_shares(model, blocks, job.held_out, on=config.sparsify_on)
    mean = {name: sum(row[name] for row in by_block) / len(by_block) for name in ("nonzero", "near_zero")}
    return {"metric": row["metric"], "metrics": row["metrics"], "tokens": row["tokens"], **mean, "blocks": by_block}


def _trainer(
    model: PreTrainedModel, job: Job, config: SparsifyConfig, arguments: Any, loss: Callable | None
) -> SparsifyTrainer:
    distils = bool(config.distillation) or job.task == "distillation"
    teacher = _original(job, config) if distils else None
    if teacher is not None:
        teacher.requires_grad_(False)
    collate = collator(job.task, job.train, job.processor, job.original, config.seed)
    set_seed(config.seed)  # adapters start at random
    trainer = SparsifyTrainer(
        model=_with_adapters(model, config), args=arguments, train_dataset=job.train.items,
        eval_dataset=job.held_out.items if job.held_out else None,
        data_collator=collate, compute_loss_func=loss,
        callbacks=[Marks(), Epochs(collate), _Bar()], sparsity=config, teacher=teacher,
        distillation=config.distillation or 1.0, task=job.task != "distillation",
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)  # our own bar shows the figures
    return trainer


def _with_adapters(model: PreTrainedModel, config: SparsifyConfig) -> torch.nn.Module:
    if not config.lora_rank:
        return model
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UserError("--lora-rank needs peft: pip install peft") from None
    targets = [name.strip() for name in config.lora_targets.split(",")]
    settings = LoraConfig(
        r=config.lora_rank, lora_alpha=config.lora_alpha or 2 * config.lora_rank, lora_dropout=0.0,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
    )  # fmt: skip
    try:
        return get_peft_model(model, settings)
    except ValueError as error:
        raise UserError(f"--lora-targets {config.lora_targets}: {first_line(error)}") from None


def _trained(trainer: SparsifyTrainer, job: Job, config: SparsifyConfig) -> PreTrainedModel | None:
    """The trained model, whole and without adapters; `None` in processes that hold only a part of it."""
    trainer.sparsity.term.remove()
    accelerator = trainer.accelerator
    model = accelerator.unwrap_model(trainer.model_wrapped)
    if trainer.is_fsdp_enabled:
        tensors = accelerator.get_state_dict(trainer.model_wrapped)
        if not accelerator.is_main_process:
            return None
        model = _with_adapters(hub.load_model(config.model, job.changed, config.revision, changed=True), config)
        model.load_state_dict(tensors)
    if config.lora_rank:
        model = model.merge_and_unload()
    model.config.use_cache = job.original.to_dict().get("use_cache", True)
    return model.eval()


class _Bar(TrainerCallback):
    """One progress bar with the figures of the last log row."""

    SHOWN = ("task_loss", "sparsity_loss", "distillation_loss", "alpha", "nonzero", "near_zero", "eval_loss")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        hidden = not state.is_world_process_zero
        self.bar = progress(total=state.max_steps, initial=state.global_step, desc="sparsify", disable=hidden)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        shown = {k: f"{logs[k]:.4g}" for k in self.SHOWN if k in (logs or {})}
        self.bar.set_postfix(shown, refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()
