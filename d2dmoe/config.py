"""Every knob of the project, once: defaults, help texts, recipe keys and what `config.json` stores. No torch here.

One dataclass per stage. `ConvertConfig` is their union as the command line and recipes see it; `D2DMoEConfig` is what a
converted checkpoint carries in `config.json`.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from dataclasses import asdict, dataclass, field, fields
from typing import Any


class UserError(Exception):
    """A mistake the user can mend. The message is one sentence that says what was wrong and what to do next."""


def knob(default: Any, help: str, **extra: Any) -> Any:
    """A dataclass field with its help text. `extra`: `choices`, `short` (flag name override), `many` (a comma list)."""
    metadata = {"help": help, **extra}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


METRIC_NAMES = ("perplexity", "masked_lm", "accuracy", "kl_to_dense", "embedding", "cosine_to_dense")


@dataclass
class DataConfig:
    """Where text, token ids or images come from, and how they become batches."""

    data: str = knob(
        "builtin", "builtin, a hub data set id, or a path to text/jsonl/csv/parquet files or a folder of them"
    )
    text_column: str | None = knob(
        None, "column that holds the text (default: text, sentence, content or the only string one)"
    )
    label_column: str | None = knob(
        None,
        "column that holds the class of each text or image (default: label, labels, label_name); none: ignore it",
    )
    sequences: str = knob(
        "auto",
        "packed: joined and cut to full sequences; documents: one padded sequence each; auto: packed for causal LMs",
        choices=("auto", "packed", "documents"),
    )
    max_length: int = knob(256, "tokens per sequence, at most the model's own limit")
    batch_size: int = knob(16, "sequences per batch")


@dataclass
class TrainingConfig:
    """The one training loop (`training.py`). Learning rates are per optimiser step."""

    steps: int = knob(1000, "optimiser steps")
    learning_rate: float = knob(1e-3, "peak learning rate (AdamW)")
    weight_decay: float = knob(0.0, "decoupled weight decay on matrices; vectors are never decayed")
    adam_betas: tuple[float, float] = knob((0.9, 0.95), "AdamW betas")
    schedule: str = knob("cosine", "learning-rate schedule after warm-up", choices=("cosine", "linear", "constant"))
    warmup_fraction: float = knob(0.05, "share of the steps spent warming up linearly")
    accumulation: int = knob(1, "batches per optimiser step")
    clip: float = knob(1.0, "gradient-norm clip; 0 turns it off")
    bf16: bool = knob(False, "bf16 autocast")
    seed: int = knob(0, "seed of everything random")
    log_every: int = knob(50, "steps between log rows")
    save_every: int = knob(200, "steps between training states that --resume can continue from; 0 turns it off")


@dataclass
class Block:
    """One feed-forward block: where its parts are in the dense model, and where its experts are mounted.

    Attributes:
        name: Module path that holds the experts after conversion.
        kind: `ffn` (`down(act(up(x)))`) or `glu` (`down(act(gate(x)) * up(x))`).
        activation: Name in `transformers.activations.ACT2FN`; variants of one function share a name.
        d_model: Width of input and output.
        width: Hidden neurons.
        up, gate, down: Paths of the linear maps; `gate` is `None` for a plain FFN and equals `up` for a fused one.
        fused: Order of the halves of a fused projection, `gate_up` or `up_gate`; empty when separate.
        activation_module: Path of the module that computes the activation, if one does.
        passed_through: Modules that become identities because the experts at `name` do their work as well.
        calls: How often the block runs in one forward pass (above 1 where layers share weights).
        experts: Number of experts; 0 until decided.
        layouts: How the dense `up` (and `gate`) and `down` weights lie in memory, for packing them on load.
    """

    name: str
    kind: str
    activation: str
    d_model: int
    width: int
    up: str
    gate: str | None
    down: str
    fused: str = ""
    activation_module: str | None = None
    passed_through: list[str] = field(default_factory=list)
    calls: int = 1
    experts: int = 0
    layouts: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Neurons of each expert; the last one may hold fewer and be padded with zero neurons in memory."""
        return -(-self.width // self.experts)

    @property
    def slots(self) -> int:
        """Neurons of all experts, padding included."""
        return self.experts * self.size


@dataclass
class Budget:
    """One stored operating point.

    Attributes:
        active: Active fraction asked for, or found for the objective.
        taus: Threshold of each block.
        measured: Active fraction on the calibration tokens.
        stand_ins: Kind of stand-in chosen for each block, where they are fitted by regression.
        residuals: Share of what skipping loses that is still lost with it, on held-out calibration tokens.
        objective: What was asked for where that is not the active fraction, for instance `max-loss=0.01`.
        achieved: The objective's figure on held-out calibration tokens.
    """

    active: float
    taus: list[float]
    measured: float = 0.0
    stand_ins: list[str] = field(default_factory=list)
    residuals: list[float] = field(default_factory=list)
    objective: str = ""
    achieved: float = 0.0


CHECKPOINT_VERSION = 1
LEAST_ACTIVE = 0.01  # where calibration curves begin


@dataclass
class D2DMoEConfig:
    """What a converted checkpoint stores under `quantization_config` in its `config.json`.

    Attributes:
        blocks: The converted blocks, in the order in which the model runs them.
        gate: Name of the gate.
        stand_in: What replaces skipped experts, a key of `STAND_INS`.
        delta_rank, linear_rank: Ranks of the stored change of the down projection and of the linear term.
        router_width: Hidden width of the routers, see `router_width()`.
        router_target: What their scores stand for.
        budgets: Stored operating points, by rising active fraction.
        default_active: Budget in force after loading.
        curve: Thresholds at further active fractions, `[[active, [tau per block]], …]`, for budgets not stored.
        min_experts, max_experts: Bounds on the experts per token (0: no upper bound).
        shared_experts: The first so many experts of every block always run.
    """

    blocks: list[Block] = field(default_factory=list)
    gate: str = "topk"
    stand_in: str = "zero"
    delta_rank: int = 0
    linear_rank: int = 0
    router_width: int = 0
    router_target: str = "norm"
    budgets: list[Budget] = field(default_factory=list)
    default_active: float = 1.0
    curve: list[list[Any]] = field(default_factory=list)
    min_experts: int = 0
    max_experts: int = 0
    shared_experts: int = 0
    version: int = CHECKPOINT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> D2DMoEConfig:
        """Read the stored form.

        Raises:
            UserError: If a newer version of this project wrote it.
        """
        version = values.get("version", CHECKPOINT_VERSION)
        if version > CHECKPOINT_VERSION:
            raise UserError(
                f"this checkpoint has d2dmoe format version {version}, and this d2dmoe reads up to version "
                f"{CHECKPOINT_VERSION}; install a newer d2dmoe-toolkit"
            )
        values = _known(cls, values)
        values["blocks"] = [b if isinstance(b, Block) else Block(**_known(Block, b)) for b in values.get("blocks", [])]
        values["budgets"] = [
            b if isinstance(b, Budget) else Budget(**_known(Budget, b)) for b in values.get("budgets", [])
        ]
        return cls(**values)


def _known(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    """Without keys that a later release added under the same format version: they are of no consequence here."""
    names = {f.name for f in fields(kind)}
    return {key: value for key, value in values.items() if key in names}


@dataclass
class ConvertConfig(DataConfig):
    """Everything `d2dmoe convert` can be told; the keys of a recipe."""

    model: str = knob("", "hub id or local folder of the dense model")
    output_dir: str = knob("", "output folder (default: checkpoints/<model>-d2dmoe)")
    revision: str | None = knob(None, "branch, tag or commit of a hub model")
    preset: str = knob(
        "default", "starting point for the keys below", choices=("default", "paper", "moefication", "training-free")
    )
    experts: int = knob(0, "experts per block; 0 picks experts of about 32 neurons")
    expert_size: int = knob(0, "neurons per expert, instead of --experts, where widths differ between blocks")
    split: str = knob(
        "coactivation",
        "how neurons are grouped; shared_experts: by coactivation, after an always-on part",
        choices=("weights", "coactivation", "coactivation-signed", "shared_experts", "random"),
    )
    shared_experts: int = knob(0, "always-on experts per block (--split shared_experts); 0 for an eighth of them")
    gate: str = knob("share", "which experts run for a token", choices=("max", "share", "topk", "topp", "absolute"))
    stand_in: str = knob(
        "linear", "what replaces skipped experts", choices=("zero", "mean", "constants", "refit", "linear")
    )
    delta_rank: int = knob(0, "rank of the change of the down projection (refit, linear); 0 for a quarter of d_model")
    linear_rank: int = knob(0, "rank of the linear term (linear); 0 for an eighth of d_model")
    thresholds: str = knob("per-layer", "one threshold for all layers, or one each", choices=("global", "per-layer"))
    allocation: str = knob(
        "sensitivity",
        "active fraction of each layer: the same, or by what skipping in that layer costs the output",
        choices=("uniform", "sensitivity"),
    )
    active: list[float] = knob(
        [],
        "active fractions to calibrate and store, comma separated (default 0.25,0.5,0.75 where no other goal is given)",
        many=float,
    )
    flops: list[float] = knob([], "shares of the dense model's FLOPs to calibrate and store", many=float)
    max_loss: list[float] = knob(
        [], "relative losses on held-out calibration text to calibrate and store, for instance 1%%", many=float
    )
    speedup: list[float] = knob(
        [],
        "speed-ups over the dense model to calibrate and store, as measured on this machine with batches of the "
        "calibration data, for instance 1.5",
        many=float,
    )
    router_width: int = knob(0, "hidden width of the routers; 0 for 128, or half of d_model where that is less")
    router_fit: str = knob(
        "refined",
        "how routers come about: by gradient descent from a random start, in closed form, or one after the other",
        choices=("trained", "closed-form", "refined"),
    )
    router_target: str = knob(
        "root",
        "what routers predict of an expert: the norm of its output, its square root, the norm less the mean's part, "
        "or less what is linear in the input, or the sum of its positive activations as a share of the largest",
        choices=("norm", "root", "centred", "nonlinear", "activation"),
    )
    router_loss: str = knob(
        "mse", "squared error, or binary cross-entropy against targets up to 1", choices=("mse", "bce")
    )
    router_tokens: int = knob(200_000, "tokens that the routers are trained on, repetitions included")
    router_batch: int = knob(256, "tokens per router step")
    router_learning_rate: float = knob(1e-3, "peak learning rate of the routers")
    calibration_tokens: int = knob(32_768, "tokens for thresholds and stand-ins")
    eval_tokens: int = knob(16_384, "held-out tokens for the figures in results.json; 0 skips them")
    heal: int = knob(0, "steps of distillation from the dense model with the gate in the loop, after calibration")
    heal_parameters: str = knob(
        "stand-ins",
        "what it trains: stand-ins alone, the routers as well, or every weight (then the dense twin changes)",
        choices=("stand-ins", "routers", "all"),
    )
    heal_tokens: int = knob(4096, "tokens per distillation step")
    heal_learning_rate: float = knob(1e-3, "peak learning rate of the distillation")
    min_experts: int = knob(0, "run at least this many experts per token")
    max_experts: int = knob(0, "run at most this many experts per token; 0 for no bound")
    dtype: str = knob("auto", "dtype of the written checkpoint", choices=("auto", "float32", "bfloat16", "float16"))
    max_shard_size: str = knob("5GB", "largest safetensors file")
    device: str = knob("auto", "where to convert: auto (a GPU if there is one), cpu, cuda or cuda:N")
    seed: int = knob(0, "seed of everything random")


# The paper's method to the letter (Szatkowski et al. 2024, sec. 3), whatever the defaults above become.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "split": "weights",
        "gate": "max",
        "stand_in": "zero",
        "thresholds": "global",
        "router_width": 128,
        "router_fit": "trained",
        "router_learning_rate": 3e-3,
        "router_target": "norm",
        "router_loss": "mse",
        "allocation": "uniform",
    },
    # MoEfication (Zhang et al. 2022, arXiv 2110.01786): parameter clustering, an MLP router told which experts are
    # active, a fixed number of experts. Made for ReLU models; on others it is what that recipe gives without a swap.
    "moefication": {
        "split": "weights",
        "gate": "topk",
        "stand_in": "zero",
        "thresholds": "per-layer",
        "router_width": 128,
        "router_fit": "trained",
        "router_learning_rate": 3e-3,
        "router_target": "activation",
        "router_loss": "bce",
        "allocation": "uniform",
    },
    # The default without gradient descent.
    "training-free": {"router_fit": "closed-form"},
}
DEFAULT_ACTIVE = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Target:
    """One operating point asked for: `kind` is `active`, `flops`, `max-loss` or `speedup`."""

    kind: str
    value: float

    def __str__(self) -> str:
        return f"{self.kind}={self.value:g}"


def targets(config: ConvertConfig) -> list[Target]:
    """The operating points that a conversion stores, without repetitions; running everything needs no storing."""
    asked = {"active": config.active, "flops": config.flops, "max-loss": config.max_loss, "speedup": config.speedup}
    if not any(asked.values()):
        asked["active"] = list(DEFAULT_ACTIVE)
    return [
        Target(kind, v) for kind, values in asked.items() for v in sorted(set(values)) if (kind, v) != ("active", 1)
    ]


def shared_experts(config: ConvertConfig, blocks: list[Block]) -> int:
    """How many experts of every block always run.

    Raises:
        UserError: If that leaves none to choose from.
    """
    if config.split != "shared_experts":
        return 0
    fewest = min(block.experts for block in blocks)
    shared = config.shared_experts or max(1, fewest // 8)
    if shared >= fewest or 0 < config.max_experts <= shared:
        raise UserError(f"--shared-experts {shared}: must be below the number of experts that may run")
    return shared


def ranks(config: ConvertConfig, blocks: list[Block]) -> dict[str, int]:
    """Ranks of the stand-ins, resolved for a model: `delta_rank` and `linear_rank` of `D2DMoEConfig`."""
    width = max(block.d_model for block in blocks)
    delta = (config.delta_rank or max(1, width // 4)) if config.stand_in in ("refit", "linear") else 0
    linear = (config.linear_rank or max(1, width // 8)) if config.stand_in == "linear" else 0
    return {"delta_rank": delta, "linear_rank": linear}


def router_width(wanted: int, block: Block) -> int:
    """Hidden width of a block's router: the paper's 128, but in a narrow model no more than half its width."""
    return wanted or max(1, min(128, block.d_model // 2))


def divisors(width: int) -> list[int]:
    """All divisors of a width, ascending."""
    return [n for n in range(1, width + 1) if width % n == 0]


def can_split(width: int, experts: int) -> bool:
    """Whether so many experts of `ceil(width / experts)` neurons are all needed; the last may be partly padding."""
    return 1 <= experts <= width and (experts - 1) * -(-width // experts) < width


def choose_experts(block: Block, experts: int, expert_size: int) -> int:
    """Number of experts for a block.

    A number that does not divide the width makes the last expert smaller. By default experts have about 32 neurons, of
    a size that divides the width unless it has no divisor near that.

    Raises:
        UserError: If the width cannot be had in so many experts, or in experts of this size; names the nearest.
    """
    width = block.width
    if expert_size:
        if -(-width // -(-width // expert_size)) != expert_size:
            near = _nearest([s for s in range(1, width + 1) if -(-width // -(-width // s)) == s], expert_size)
            raise UserError(
                f"--expert-size {expert_size} does not fit the FFN width {width} of {block.name}: "
                f"{-(-width // expert_size)} experts would be smaller; nearest that do: {near}"
            )
        return -(-width // expert_size)
    if not experts:
        wanted = max(1, min(32, width // 16))
        size = min((s for s in divisors(width) if width // s >= 16), key=lambda s: abs(s - 32), default=1)
        return width // size if 4 * size > wanted else -(-width // wanted)
    if not can_split(width, experts):
        near = _nearest([n for n in range(1, width + 1) if can_split(width, n)], experts)
        raise UserError(
            f"--experts {experts} does not fit the FFN width {width} of {block.name}: with {-(-width // experts)} "
            f"neurons each, fewer would do; nearest that fit: {near}"
        )
    return experts


def _nearest(allowed: list[int], wanted: int) -> str:
    below = [n for n in allowed if n < wanted][-1:]
    above = [n for n in allowed if n > wanted][:1]
    return ", ".join(map(str, below + above))


def resolve(config_class: type, *layers: dict[str, Any]) -> Any:
    """Defaults < preset < recipe < flags. Later layers win; the preset named by the last layer that names one applies.

    Raises:
        UserError: If a key is unknown or a value is not allowed.
    """
    allowed = {f.name: f for f in fields(config_class)}
    for layer in layers:
        for key in layer:
            if key not in allowed:
                close = difflib.get_close_matches(key, allowed, n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise UserError(f"unknown recipe key {key!r}{hint}; the keys are the flags of d2dmoe convert --help")
    merged: dict[str, Any] = {}
    preset = next((layer["preset"] for layer in reversed(layers) if layer.get("preset")), "default")
    if "preset" in allowed and preset in PRESETS:
        merged.update(PRESETS[preset])
    hints = typing.get_type_hints(config_class)
    for layer in layers:
        merged.update({key: _typed(key, value, hints[key]) for key, value in layer.items()})
    config = config_class(**merged)
    check(config)
    return config


def _typed(key: str, value: Any, hint: Any) -> Any:
    """The value as its key's type. YAML reads 3e-3 as text, and one number where a list may stand.

    Raises:
        UserError: If it cannot be.
    """
    if hint == list[float]:
        many = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
        return [_typed(key, item, float) for item in many]
    union = isinstance(hint, types.UnionType)
    if union and value is None:
        return None
    kind = next(a for a in typing.get_args(hint) if a is not types.NoneType) if union else hint
    if kind is float and isinstance(value, str) and value.strip().endswith("%"):
        return _typed(key, value.strip()[:-1], kind) / 100
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    fits = value is not None and isinstance(value, bool) == (kind is bool) and not isinstance(value, list | dict)
    try:
        if kind is int and fits and not isinstance(value, int):
            fits = float(value) == int(float(value))
            value = int(float(value)) if fits else value
        elif kind in (float, str) and fits:
            value = kind(value)
    except (ValueError, OverflowError):
        fits = False
    if kind in names and not fits:
        raise UserError(f"--{key.replace('_', '-')} {value}: must be {names[kind]}")
    return value


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
    least = {"max_length": 2, "batch_size": 1, "router_batch": 1, "calibration_tokens": 1}
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
    if getattr(config, "heal_tokens", 1) < 1:
        raise UserError("--heal-tokens 0: must be at least 1")
    if getattr(config, "heal", 0) and config.heal_parameters != "all" and config.stand_in == "zero":
        raise UserError("--heal trains what stands in for skipped experts, and --stand-in zero has nothing to train")
    if getattr(config, "experts", 0) and getattr(config, "expert_size", 0):
        raise UserError(
            f"give --experts or --expert-size, not both ({config.experts} and {config.expert_size}); "
            f"0 takes one back that a recipe gives"
        )


def check_active(active: float) -> None:
    """Raises `UserError` unless this is an active fraction."""
    if not 0 < active <= 1:
        raise UserError(f"--active {active:g}: an active fraction is above 0 and at most 1, for instance 0.25")


def check_tau(tau: float, gate: str) -> None:
    """Raises `UserError` unless this is a threshold for the gate."""
    if not 0 <= tau <= (float("inf") if gate == "absolute" else 1):
        upper = "" if gate == "absolute" else " and at most 1"
        raise UserError(f"--tau {tau:g}: a threshold of the {gate} gate is at least 0 (everything runs){upper}")
