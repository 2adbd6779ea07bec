"""The one training loop, on `accelerate`: a loss goes in, a trained module and a log come out. No method knowledge.

Batches are addressed by number (`batch_at(i)`), so that a resumed run sees exactly the batches an uninterrupted one
would have seen, and several processes take disjoint ones, without replaying a data stream.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedDataParallelKwargs, send_to_device
from torch import nn
from transformers import PreTrainedModel, get_scheduler

from .config.options import TrainingConfig
from .errors import UserError
from .muon import MuonWithAdamW, inner_matrices
from .progress import progress
from .training_state import load_state, recover, remove, save_state

Batch = Any
LossFunction = Callable[[nn.Module, Batch], torch.Tensor | Mapping[str, torch.Tensor]]
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


@contextmanager
def accelerate_state_kept() -> Iterator[None]:
    """Put back what accelerate keeps for the whole process: the caller may want another `Accelerator` afterwards."""
    shared = [state._shared_state for state in (PartialState, AcceleratorState, GradientState)]
    before = [dict(state) for state in shared]
    try:
        yield
    finally:
        for state, values in zip(shared, before, strict=True):
            state.clear()
            state.update(values)


def first_process() -> bool:
    """Whether this process writes, prints and evaluates: the only one, or the first of those that were launched."""
    return int(os.environ.get("RANK", "0")) == 0


def wait_for_everyone() -> None:
    """Until all launched processes have come here; nothing where there is one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def broadcast(value: Any) -> Any:
    """What the first process has, in all launched processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        held = [value]
        torch.distributed.broadcast_object_list(held, src=0)
        return held[0]
    return value


def launched(function: Callable[..., Any]) -> Callable[..., Any]:
    """Connect the processes that `accelerate launch` or `torchrun` started, while the function runs."""

    @wraps(function)
    def connected(config: Any, *args: Any, **options: Any) -> Any:
        with accelerate_state_kept():
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                PartialState(cpu=on_cpu(config.device))
            return function(config, *args, **options)

    return connected


def on_cpu(name: str) -> bool:
    """Whether `--device name` is the CPU. accelerate has to be told so, or several processes there do not connect."""
    return name == "cpu" or not torch.cuda.is_available()


def process_device(name: str) -> torch.device:
    """The device of this process: its own among several, else that called `name`; see `pick_device`."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return PartialState().device
    return pick_device(name)


def pick_device(name: str) -> torch.device:
    """The device called `cpu`, `cuda` or `cuda:N`; `auto` is the GPU that accelerate gives this process, if any.

    Raises:
        UserError: If there is no such GPU.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        with accelerate_state_kept():
            return PartialState().device if count else torch.device("cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(f"--device {name}: PyTorch sees {count} CUDA devices here; use auto or cpu")
    return device


# Up to so many tokens a sequence, on processors and in bf16, plain attention with its gradients takes a fifth to two
# fifths of the time of torch's fused one; at 256 the same, at 512 over twice as long (recipes/attention_gradients.py).
SHORT = 128


@contextmanager
def attention_for(
    model: PreTrainedModel, longest: int, *, bf16: bool, device: torch.device | None = None
) -> Iterator[None]:
    """Inside, the model has the attention that trains it fastest: plain for short sequences in bf16 on a processor.

    Args:
        model: Trained inside.
        longest: Tokens of the longest sequence.
        bf16: Whether autocast is on.
        device: Where it is trained; by default that of `pick_device`.
    """
    own, device = model.config._attn_implementation, device or pick_device("auto")
    plain = bf16 and device.type == "cpu" and own == "sdpa" and longest <= SHORT
    if plain:
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        if plain:
            model.set_attn_implementation(own)


@accelerate_state_kept()
@torch.enable_grad()  # callers may have switched gradients off for everything
def train(
    model: nn.Module,
    batch_at: Callable[[int], Batch],
    loss_function: LossFunction,
    config: TrainingConfig,
    *,
    name: str = "training",
    state_dir: Path | None = None,
    resume: bool = False,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    placed: bool = False,
    in_turn: bool = False,
    rates: Callable[[str], float] | None = None,
) -> list[dict[str, float]]:
    """Train the parameters of `model` that require gradients.

    Args:
        model: Trained in place; left in evaluation mode.
        batch_at: Micro-batch number to batch. Optimiser step `t` uses numbers
            `t * accumulation * processes` onwards; batch `i` must not depend on what was asked before.
        loss_function: `(model, batch)` to a scalar, or to a mapping whose `"loss"` is trained and whose other
            entries are logged.
        config: Steps, learning rate and so on.
        name: Shown on the progress bar.
        state_dir: Folder for resumable states; `None` keeps none. It is removed when training completes, and a state
            that is there already is removed unless `resume`.
        resume: Continue from `state_dir` if it holds a state of this very config.
        evaluate: Called after the last step and at every saved state; its figures join the log row.
        placed: Model and batches are where they should be; accelerate decides otherwise.
        in_turn: A step may leave some parameters out, which several processes have to be told.
        rates: What the learning rate of a parameter is multiplied by, by its name; not of those that Muon has.

    Returns:
        Log rows, `{"step", "loss", "learning_rate", …}`.

    Raises:
        UserError: If the saved state was made with another config (the differing key is named), or the loss
            became NaN or infinite.
    """
    accelerator = _accelerator(placed, in_turn)
    optimizer, scheduler = _optimiser(model, config, rates)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    prepared.train()
    first_step, log, running = _begin(accelerator, model, optimizer, scheduler, config, state_dir, resume)
    first = accelerator.is_main_process
    bar = progress(range(first_step, config.steps), total=config.steps, initial=first_step, desc=name)
    for step in bar:
        _add_gradients(accelerator, prepared, batch_at, loss_function, config, step, placed, running)
        learning_rate = _step(accelerator, model, optimizer, scheduler, config)
        last = step + 1 == config.steps
        if (step + 1) % config.log_every == 0 or last:
            log.append(_row(name, step, running, config, learning_rate))
            bar.set_postfix({k: f"{v:.4g}" for k, v in log[-1].items() if k != "step"}, refresh=False)
        saving = state_dir is not None and config.save_every and (step + 1) % config.save_every == 0 and not last
        if evaluate is not None and (saving or last):
            _evaluate(prepared, model, evaluate, log, step)
        if saving and first:
            save_state(state_dir, model, optimizer, scheduler, config, step + 1, log, running)
    prepared.eval()
    if state_dir is not None and first:
        remove(state_dir)
    return log


def _accelerator(placed: bool, in_turn: bool) -> Accelerator:
    """Autocast is ours, in `_add_gradients`: accelerate's holds for the whole process and patches the model."""
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)] if in_turn else []
    return Accelerator(device_placement=not placed, kwargs_handlers=handlers)


def _begin(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any,
    config: TrainingConfig, state_dir: Path | None, resume: bool,
) -> tuple[int, list[dict[str, float]], dict[str, float]]:  # fmt: skip
    """First step, log rows and sums of the open row: those of a saved state, or of a start with the config's seed."""
    if state_dir is not None and accelerator.is_main_process:
        recover(state_dir) if resume else remove(state_dir)
    accelerator.wait_for_everyone()
    if state_dir is not None and resume and (state_dir / "state.json").exists():
        return load_state(state_dir, model, optimizer, scheduler, config)
    torch.manual_seed(config.seed)
    return 0, [], {}


def _step(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, config: TrainingConfig
) -> float:
    """Clip the gradients and move the parameters; returns the learning rate of this step."""
    if config.clip:
        accelerator.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], config.clip)
    learning_rate = scheduler.get_last_lr()[0]
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad(set_to_none=True)
    return learning_rate


def _optimiser(
    model: nn.Module, config: TrainingConfig, rates: Callable[[str], float] | None = None
) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW, or Muon with AdamW, and the schedule of the learning rate."""
    matrices = inner_matrices(model) if config.optimizer == "muon" else []
    settings = {"lr": config.learning_rate, "betas": tuple(config.adam_betas)}
    groups = _parameter_groups(model, config, rates or (lambda _: 1.0), apart=matrices)
    if matrices:
        optimizer = MuonWithAdamW(matrices, groups, **settings, weight_decay=config.weight_decay)
    else:
        optimizer = torch.optim.AdamW(groups, **settings)
    scheduler = get_scheduler(
        SCHEDULES[config.schedule],
        optimizer,
        num_warmup_steps=round(config.warmup_fraction * config.steps),
        num_training_steps=max(config.steps, 1),
    )
    return optimizer, scheduler


def _add_gradients(
    accelerator: Accelerator, prepared: nn.Module, batch_at: Callable[[int], Batch], loss_function: LossFunction,
    config: TrainingConfig, step: int, placed: bool, running: dict[str, float],
) -> None:  # fmt: skip
    """Backward through the micro-batches of one optimiser step; their figures are added to `running`."""
    device = next(prepared.parameters()).device if placed else accelerator.device
    for micro in range(config.accumulation):
        number = (step * config.accumulation + micro) * accelerator.num_processes + accelerator.process_index
        batch = batch_at(number) if placed else send_to_device(batch_at(number), device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
            figures = loss_function(prepared, batch)
        figures = figures if isinstance(figures, Mapping) else {"loss": figures}
        accelerator.backward(figures["loss"] / config.accumulation)
        for key, value in figures.items():
            running[key] = running.get(key, 0.0) + float(value.detach()) / config.accumulation


def _evaluate(
    prepared: nn.Module, model: nn.Module, evaluate: Callable[[nn.Module], Mapping[str, float]],
    log: list[dict[str, float]], step: int,
) -> None:  # fmt: skip
    """Figures of the model in evaluation mode, added to this step's log row."""
    prepared.eval()
    if not log or log[-1]["step"] != step + 1:
        log.append({"step": step + 1})
    log[-1].update(evaluate(model))
    prepared.train()


def _row(
    name: str, step: int, running: dict[str, float], config: TrainingConfig, learning_rate: float
) -> dict[str, float]:
    """Means since the last row, which `running` held the sums for and holds no longer.

    Raises:
        UserError: If the loss is not finite.
    """
    count = (step % config.log_every) + 1
    row = {"step": step + 1, **{k: v / count for k, v in running.items()}, "learning_rate": learning_rate}
    running.clear()
    if not torch.isfinite(torch.tensor(row["loss"])):
        flag = {"routers": "--router-learning-rate", "heal": "--heal-learning-rate"}.get(name, "its learning rate")
        raise UserError(f"{name}: the loss became {row['loss']} by step {step + 1}; lower {flag}")
    return row


def _parameter_groups(
    model: nn.Module, config: TrainingConfig, rates: Callable[[str], float], apart: list[nn.Parameter]
) -> list[dict[str, Any]]:
    """Matrices are decayed, vectors (biases, norms) are not; a bias stays one when it is laid out by expert."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    done = {id(parameter) for parameter in apart}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in done:
            decay = config.weight_decay if parameter.ndim > 1 and not name.endswith("bias") else 0.0
            groups.setdefault((decay, rates(name)), []).append(parameter)
    if not groups and not done:
        raise ValueError("the model has no parameter that requires a gradient")
    return [  # the full rate comes first: it is the one that is logged
        {"params": groups[decay, rate], "weight_decay": decay, "lr": rate * config.learning_rate}
        for decay, rate in sorted(groups, key=lambda key: (key[1] == 1, key), reverse=True)
    ]
