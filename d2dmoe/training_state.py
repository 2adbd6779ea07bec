"""The state of a training on disk: safetensors and JSON in a folder that is replaced as a whole."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .errors import UserError


def save_state(state_dir, model, optimizer, scheduler, config, step, log, running) -> None:
    """Write tensors as safetensors and the rest as JSON, under a temporary name that is then renamed."""
    tensors = {f"model.{k}": v.detach().cpu().contiguous() for k, v in model.named_parameters() if v.requires_grad}
    tensors.update(
        {f"buffer.{k}": v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in model.named_buffers()}
    )
    optimizer_state = optimizer.state_dict()["state"]
    for index, slots in optimizer_state.items():
        tensors.update({f"optimizer.{index}.{k}": v.cpu().contiguous() for k, v in slots.items()})
    tensors["rng"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng_cuda"] = torch.cuda.get_rng_state()
    scratch, old = _beside(state_dir)
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    save_file(tensors, scratch / "state.safetensors")
    meta = {"step": step, "log": log, "running": running, "config": asdict(config), "scheduler": scheduler.state_dict()}
    (scratch / "state.json").write_text(json.dumps(meta, default=list))
    shutil.rmtree(old, ignore_errors=True)
    if state_dir.exists():
        os.replace(state_dir, old)
    os.replace(scratch, state_dir)
    shutil.rmtree(old, ignore_errors=True)


def has_state(state_dir: Path | None) -> bool:
    """Is there something that a resumed run would go on from?"""
    return state_dir is not None and any(
        (folder / "state.json").exists() for folder in (state_dir, _beside(state_dir)[1])
    )


def _beside(state_dir: Path) -> tuple[Path, Path]:
    """Where a state is written first, and where the one before it waits until the new one is in its place."""
    return state_dir.with_name(state_dir.name + ".tmp"), state_dir.with_name(state_dir.name + ".old")


def recover(state_dir: Path) -> None:
    """Put the older state back if the process died while a new one took its place."""
    _, old = _beside(state_dir)
    if not state_dir.exists() and old.exists():
        os.replace(old, state_dir)


def remove(state_dir: Path) -> None:
    """Delete the state and whatever an interrupted `save_state` left beside it."""
    for folder in (state_dir, *_beside(state_dir)):
        shutil.rmtree(folder, ignore_errors=True)


def load_state(state_dir, model, optimizer, scheduler, config) -> tuple[int, list[dict[str, float]], dict[str, float]]:
    """Restore what `save_state` wrote; returns the next step, the log so far and the sums of the open log row."""
    meta = json.loads((state_dir / "state.json").read_text())
    wanted = json.loads(json.dumps(asdict(config), default=list))
    for key, value in wanted.items():
        if meta["config"].get(key) != value:
            raise UserError(
                f"cannot resume from {state_dir}: {key} was {meta['config'].get(key)} and is now {value}; "
                f"use the same recipe, or start again with --overwrite"
            )
    tensors = load_file(state_dir / "state.safetensors")
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    slots: dict[int, dict[str, torch.Tensor]] = {}
    with torch.no_grad():
        for key, value in tensors.items():
            kind, _, rest = key.partition(".")
            if kind == "model":
                parameters[rest].copy_(value)
            elif kind == "buffer" and not torch.equal(buffers[rest].cpu(), value):
                buffers[rest].copy_(value)
            elif kind == "optimizer":
                index, _, slot = rest.partition(".")
                slots.setdefault(int(index), {})[slot] = value
    state = optimizer.state_dict()
    state["state"] = slots
    optimizer.load_state_dict(state)
    scheduler.load_state_dict(meta["scheduler"])
    for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = rate  # a scheduler sets it only when it steps
    torch.set_rng_state(tensors["rng"])
    if "rng_cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng_cuda"])
    return meta["step"], meta["log"], meta["running"]
