"""Every knob of `d2dmoe sparsify`: defaults, help texts and recipe keys. No torch here.

The training itself is `transformers.Trainer`'s: any field of `TrainingArguments` is a flag and a recipe key as well.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any

from ..config.options import REGULARISER_NAMES, ConvertConfig, DataConfig, knob
from ..config.presets import resolve
from ..errors import UserError

SCHEDULE_NAMES = ("constant", "linear", "linear_warmup", "sine")
TASK_NAMES = ("auto", "causal_lm", "masked_lm", "classification", "image_classification", "distillation")


@dataclass
class SparsityConfig:
    """The regulariser: what is added to the loss of any Trainer."""

    regulariser: str = knob(
        "hoyer",
        "what is added to the task loss; none: the same training without it, for comparison",
        choices=REGULARISER_NAMES,
    )
    alpha: float = knob(1e-3, "weight of the regulariser at its full strength")
    alpha_schedule: str = knob(
        "linear_warmup",
        "how its weight grows with the steps; linear_warmup: full at half of the training; sine: ProSparse's stages",
        choices=SCHEDULE_NAMES,
    )
    sparsify_on: str = knob(
        "activation",
        "in gated blocks: act(gate), or the product with up that goes into the down projection",
        choices=("activation", "intermediate"),
    )
    locality: float = knob(
        0.0, "weight, relative to alpha, of neighbouring tokens using the same neurons; 0 leaves it out"
    )


@dataclass
class SparsifyConfig(DataConfig, SparsityConfig):
    """Everything `d2dmoe sparsify` can be told, besides the fields of `TrainingArguments`; the keys of a recipe."""

    model: str = knob("", "hub id or local folder of the dense model")
    output_dir: str = knob("", "output folder (default: checkpoints/<model>-sparse)")
    revision: str | None = knob(None, "branch, tag or commit of a hub model")
    activation: str = knob(
        "keep",
        "activation to train with: the model's own, ReLU, or ReLU with a positive threshold, whose checkpoint needs "
        "d2dmoe to open",
        choices=("keep", "relu", "fatrelu"),
    )
    threshold: float = knob(0.0, "of fatrelu: activations below it are zero")
    task: str = knob(
        "auto",
        "loss to train with; auto: what the model's head is for; distillation: only stay close to the original model",
        choices=TASK_NAMES,
    )
    distillation: float = knob(0.0, "weight of the distance from the original model, added to the task loss")
    lora_rank: int = knob(0, "train adapters of this rank instead of all weights, and merge them; 0 trains all weights")
    lora_alpha: float = knob(0.0, "scale of the adapters, divided by the rank; 0 for twice the rank")
    lora_targets: str = knob("all-linear", "modules that get adapters, comma separated, or all-linear")
    eval_tokens: int = knob(16_384, "held-out tokens for the figures before and after; 0 skips them")
    max_shard_size: str = knob("5GB", "largest safetensors file")
    device: str = knob("auto", "where to train: auto (a GPU if there is one), cpu, cuda or cuda:N")
    seed: int = knob(0, "seed of everything random")


OWN = {f.name for f in fields(SparsifyConfig)}
# Set from our own options, or meaningless here.
RESERVED = {
    "output_dir": "--output-dir", "seed": "--seed", "use_cpu": "--device cpu", "do_train": None, "do_eval": None,
    "do_predict": None, "resume_from_checkpoint": "--resume", "per_device_train_batch_size": "--batch-size",
    "remove_unused_columns": None, "push_to_hub": None, "local_rank": None,
}  # fmt: skip
# What differs from the defaults of `TrainingArguments`.
TRAINING_DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 1.0, "learning_rate": 1e-4, "lr_scheduler_type": "cosine", "warmup_steps": 0.05,
    "logging_steps": 10, "save_steps": 200, "save_total_limit": 2, "report_to": "none", "disable_tqdm": True,
    "logging_nan_inf_filter": False,
}  # fmt: skip


def resolve_sparsify(*layers: dict[str, Any]) -> tuple[SparsifyConfig, dict[str, Any]]:
    """Our own options, and those that are `TrainingArguments`' (not yet checked); later layers win.

    Raises:
        UserError: If one of our own has a value that is not allowed, or one that we set ourselves is given.
    """
    own = [{k: v for k, v in layer.items() if k in OWN} for layer in layers]
    training: dict[str, Any] = {}
    for layer in layers:
        training.update({k: _value(v) for k, v in layer.items() if k not in OWN and k != "preset"})
    for name in training:
        if name in RESERVED:
            instead = f"; use {RESERVED[name]}" if RESERVED[name] else ""
            raise UserError(f"--{name.replace('_', '-')} is set by d2dmoe itself{instead}")
    config = resolve(SparsifyConfig, *own)
    check_sparsity(config)
    return config, training


def _value(given: Any) -> Any:
    """Numbers, lists and mappings that a flag gives as text, so that a recipe file and a flag say the same."""
    if isinstance(given, str):
        with suppress(ValueError):
            return json.loads(given)
    return given


SHARED = (
    "model", "revision", "data", "text_column", "label_column", "header", "sequences", "max_length", "batch_size",
    "seed", "device", "eval_tokens", "max_shard_size",
)  # fmt: skip


def sparsify_stage(config: ConvertConfig, output_dir: str) -> tuple[SparsifyConfig, dict[str, Any]]:
    """What `convert --sparsify` runs first: its own data and model, and the flags that begin with `--sparsify-`.

    Raises:
        UserError: As `resolve_sparsify`, or if a flag is not free here.
    """
    for name in config.sparsify_options:
        if name in ("model", "output_dir", "revision", "regulariser"):
            raise UserError(f"--sparsify-{name.replace('_', '-')}: follows from convert's own flags; leave it out")
    shared = {name: getattr(config, name) for name in SHARED}
    own = {"regulariser": config.sparsify, "output_dir": output_dir}
    return resolve_sparsify(shared, config.sparsify_options, own)


def further_options(words: list[str]) -> dict[str, Any]:
    """Flags that are not our own, `--gradient-accumulation-steps 4`, by name; one without a value is true.

    Raises:
        UserError: If a word belongs to no flag.
    """
    found: dict[str, Any] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word[2:].partition("=")
            name = flag.replace("-", "_")
            found[name] = value if equals else None
        elif name and found[name] is None:
            found[name] = word
        else:
            raise UserError(f"{word}: belongs to no flag; see d2dmoe sparsify --help")
    return {key: True if value is None else value for key, value in found.items()}


def check_sparsity(config: SparsityConfig) -> None:
    """Ranges that `config.check` does not know.

    Raises:
        UserError: Naming the key, its value and what is allowed.
    """
    for name in ("alpha", "locality", "threshold", "distillation", "lora_alpha"):
        value = getattr(config, name, 0.0)
        if not (math.isfinite(value) and value >= 0):
            raise UserError(f"--{name.replace('_', '-')} {value}: must be a finite number that is 0 or more")
    for name, allowed in (("regulariser", REGULARISER_NAMES), ("alpha_schedule", SCHEDULE_NAMES)):
        if getattr(config, name) not in allowed:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be one of {', '.join(allowed)}")
    if config.regulariser == "none":
        for name in ("alpha", "alpha_schedule", "sparsify_on", "locality"):
            if (value := getattr(config, name)) != getattr(SparsityConfig, name):
                flag = f"--{name.replace('_', '-')} {value}"
                raise UserError(f"{flag} changes nothing with --regulariser none; leave one of them out")
    if getattr(config, "activation", "keep") == "fatrelu" and not config.threshold > 0:
        raise UserError("--activation fatrelu needs a --threshold above 0; a threshold of 0 is --activation relu")
    if getattr(config, "activation", "fatrelu") != "fatrelu" and config.threshold:
        raise UserError(f"--threshold {config.threshold:g} belongs to --activation fatrelu")
    if getattr(config, "lora_rank", 1) == 0:
        for name, unset in (("lora_alpha", 0), ("lora_targets", "all-linear")):
            if getattr(config, name) != unset:
                raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)} needs --lora-rank")


def training_arguments(training: dict[str, Any], config: SparsifyConfig, folder: str) -> Any:
    """`transformers.TrainingArguments` from flags or recipe keys.

    Raises:
        UserError: If a key is none of its fields or has a value that it does not take.
    """
    import torch
    from transformers import HfArgumentParser, TrainingArguments

    from ..training import on_cpu

    class Parser(HfArgumentParser):
        def error(self, message: str) -> Any:
            flag, colon, reason = re.sub(r"^argument (--\w+)(/--[\w-]+)?", r"\1", message).partition(":")
            said = flag.replace("_", "-") + colon + reason.rstrip(".")
            raise UserError(f"{said}; the flags are those of transformers.TrainingArguments")

    names = {f.name: str(f.type) for f in fields(TrainingArguments)}
    for name in training:
        if name not in names:
            close = difflib.get_close_matches(name, [*names, *OWN], n=1)
            hint = f"; did you mean --{close[0].replace('_', '-')}?" if close else ""
            raise UserError(f"unknown option --{name.replace('_', '-')}{hint} (see d2dmoe sparsify --help)")
    given = {**TRAINING_DEFAULTS, "dataloader_pin_memory": torch.cuda.is_available(), **training}
    if "eval_steps" in training:
        given.setdefault("eval_strategy", "steps")
    given |= {
        "output_dir": folder, "seed": config.seed, "per_device_train_batch_size": config.batch_size,
        "remove_unused_columns": False, "use_cpu": on_cpu(config.device),
    }  # fmt: skip
    words: list[str] = []
    for name, value in given.items():
        if value is not None:
            text = json.dumps(value) if isinstance(value, dict | list) else str(value)
            bare = value is True and "bool" not in names[name]  # `--fsdp`, or what lacks its value
            words += [f"--{name}"] if bare else [f"--{name}", text]
    try:
        (arguments,) = Parser(TrainingArguments).parse_args_into_dataclasses(words)
    except (ValueError, ImportError, TypeError) as error:
        raise UserError(f"{' '.join(str(error).split())} (from transformers.TrainingArguments)") from None
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # several GPUs are `accelerate launch`'s business, not DataParallel's
    return arguments
