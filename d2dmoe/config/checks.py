"""Ranges and choices of every option."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

from ..errors import UserError
from .budgets import LEAST_ACTIVE
from .sizes import attention_way

# Options that say how something is done that another one asks for: that one, its value when it does not, what to give.
AROUND = ("attention", "none", "--attention, for instance auto")
BELONGS = {
    "attention_active": AROUND, "attention_layers": AROUND, "attention_factor": AROUND,
    "head_active": ("head", "none", "--head svd-softmax"),
    "heal_parameters": ("heal", 0, "--heal STEPS"), "heal_tokens": ("heal", 0, "--heal STEPS"),
}  # fmt: skip


def _check_asked_for(config: Any) -> None:
    """Raises `UserError` for an option that changes nothing without another one."""
    for name, (key, off, wanted) in BELONGS.items():
        default = getattr(type(config), name, None)
        if getattr(config, key, None) == off and (value := getattr(config, name)) != default:
            given = f"--{name.replace('_', '-')} {value}"
            raise UserError(f"{given} changes nothing without {wanted}; give that as well, or leave it out")
    shared = getattr(config, "shared_experts", 0)
    if shared and config.split != "shared_experts":
        raise UserError(f"--shared-experts {shared} belongs to --split shared_experts, and --split is {config.split}")
    rate = getattr(config, "router_learning_rate", None)
    if getattr(config, "router_fit", "") == "closed-form" and rate != type(config).router_learning_rate:
        raise UserError(f"--router-learning-rate {rate:g} changes nothing with --router-fit closed-form; leave it out")
    experts = getattr(config, "attention_experts", 0)
    if experts and attention_way(config.attention)[0] != "mlp":
        raise UserError(f"--attention-experts {experts} belongs to --attention mlp; --attention is {config.attention}")


def check(config: Any) -> None:
    """Ranges and choices of every knob.

    Raises:
        UserError: Naming the key, its value and what is allowed.
    """
    for f in fields(config):
        value, choices = getattr(config, f.name), f.metadata.get("choices")
        flag = "--" + f.name.replace("_", "-")
        if choices and value not in choices:
            raise UserError(f"{flag} {value}: must be one of {', '.join(choices)}")
        if isinstance(value, int | float) and not isinstance(value, bool) and not value >= 0:
            raise UserError(f"{flag} {value}: must be 0 or more")
    if not getattr(config, "data", "builtin").strip():
        raise UserError("--data: nothing given; name files, a folder, a hub data set, or builtin")
    _check_asked_for(config)
    least = {"max_length": 2, "batch_size": 1, "router_batch": 1, "calibration_tokens": 1, "attention_tokens": 1,
             "attention_batch": 1}  # fmt: skip
    for name, bound in least.items():
        if getattr(config, name, bound) < bound:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be at least {bound}")
    if 0 < getattr(config, "max_experts", 0) < config.min_experts:
        raise UserError(
            f"--max-experts {config.max_experts}: must not be below --min-experts {config.min_experts}; 0 is no bound"
        )
    size = getattr(config, "max_shard_size", "1GB")
    if not re.fullmatch(r"(?=[^a-z]*[1-9])\s*\d+(\.\d+)?\s*[kmgt]b\s*", size, re.IGNORECASE):
        raise UserError(f"--max-shard-size {size}: must be a number and KB, MB, GB or TB, for instance 5GB")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", getattr(config, "device", "auto")):
        raise UserError(f"--device {config.device}: must be auto, cpu, cuda or cuda:N")
    if hasattr(config, "attention"):
        way, _ = attention_way(config.attention)
        if config.attention_active > 1:
            raise UserError(f"--attention-active {config.attention_active:g}: a share is at most 1")
        if way == "mlp" and config.attention_active:
            raise UserError(
                f"--attention-active {config.attention_active:g}: with --attention mlp a budget holds for the experts "
                f"of blocks and projections alike; leave it out, or take another way"
            )
        if not 0 < config.attention_factor < 100:
            raise UserError(f"--attention-factor {config.attention_factor:g}: must be above 0, for instance 1")
    if hasattr(config, "head") and not 0 < config.head_active < 1:
        raise UserError(f"--head-active {config.head_active:g}: a share of the head's work is above 0 and below 1")
    for active in getattr(config, "active", None) or []:
        check_active(active)
        if active < LEAST_ACTIVE and config.gate != "topk":
            raise UserError(
                f"--active {active:g}: the {config.gate} gate is calibrated from {LEAST_ACTIVE:g} on; give at least "
                f"that, or --gate topk"
            )
    for share in getattr(config, "flops", None) or []:
        if not 0 < share < 1:
            raise UserError(f"--flops {share:g}: a share of the dense model's FLOPs is above 0 and below 1")
    for loss in getattr(config, "max_loss", None) or []:
        if not 0 < loss < 10:
            raise UserError(f"--max-loss {loss:g}: a relative loss is above 0, for instance 1% or 0.01")
    for factor in getattr(config, "speedup", None) or []:
        if not 1 < factor < 1000:
            raise UserError(f"--speedup {factor:g}: a speed-up over the dense model is above 1, for instance 1.5")
    if getattr(config, "sparsify", "") == "skip" and config.sparsify_options:
        first = next(iter(config.sparsify_options)).replace("_", "-")
        raise UserError(f"--sparsify-{first} belongs to --sparsify; give it a regulariser, for instance hoyer")
    if getattr(config, "also_eval", None) and not config.eval_tokens:
        raise UserError(
            f"--also-eval {config.also_eval} is measured beside --data, and --eval-tokens 0 measures nothing"
        )
    if getattr(config, "low_memory", False):
        others = {"attention": config.attention != "none", "head": config.head != "none", "heal": config.heal,
                  "speedup": config.speedup}  # fmt: skip
        for name in (name for name, given in others.items() if given):
            raise UserError(f"--low-memory and --{name} do not go together; leave one of them out")
    if getattr(config, "heal_tokens", 1) < 1:
        raise UserError("--heal-tokens 0: must be at least 1")
    if getattr(config, "heal", 0) and not _heals_something(config):
        raise UserError("--heal trains what stands in for skipped experts, and --stand-in zero has nothing to train")
    if getattr(config, "experts", 0) and getattr(config, "expert_size", 0):
        raise UserError(
            f"give --experts or --expert-size, not both ({config.experts} and {config.expert_size}); "
            f"0 takes one back that a recipe gives"
        )


def _heals_something(config: Any) -> bool:
    """Do the stand-ins or bases of a conversion have something to train, or is it every weight?"""
    bases = config.head != "none" or attention_way(config.attention)[0] not in ("none", "mlp")
    return bases or config.heal_parameters == "all" or config.stand_in != "zero"


def check_active(active: float, given: str = "--active ") -> None:
    """Raises `UserError` unless this is an active fraction; `given` is how it was given, for the message."""
    if not 0 < active <= 1:
        raise UserError(f"{given}{active:g}: an active fraction is above 0 and at most 1, for instance 0.25")


def check_tau(tau: float, gate: str, given: str = "--tau ") -> None:
    """Raises `UserError` unless this is a threshold for the gate; `given` as of `check_active`."""
    if not 0 <= tau <= (float("inf") if gate == "absolute" else 1):
        upper = "" if gate == "absolute" else " and at most 1"
        raise UserError(f"{given}{tau:g}: a threshold of the {gate} gate is at least 0 (everything runs){upper}")
