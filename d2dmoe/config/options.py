"""Every knob of the project, once: defaults, help texts and recipe keys. No torch here.

One dataclass per stage. `ConvertConfig` inherits from all of them: names on the command line and in recipes are flat.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


def knob(default: Any, help: str, **extra: Any) -> Any:
    """A dataclass field with its help text. `extra`: `choices`, `many` (a comma list), `hidden` (no flag)."""
    metadata = {"help": help, **extra}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


METRIC_NAMES = ("perplexity", "masked_lm", "accuracy", "kl_to_dense", "embedding", "cosine_to_dense")


@dataclass
class DataConfig:
    """Where text, token ids or images come from, and how they become batches."""

    data: str = knob(
        "builtin",
        "builtin, a hub data set id, or a path to text/jsonl/csv/parquet files or a folder of them; several, separated "
        "by commas, give the same number of tokens each",
    )
    text_column: str | None = knob(
        None, "column that holds the text (default: text, sentence, content or the only string one)"
    )
    label_column: str | None = knob(
        None,
        "column that holds the class of each text or image (default: label, labels, label_name); none: ignore it",
    )
    header: bool = knob(
        True,
        "csv and tsv files begin with the names of their columns; --no-header: columns are called 1, 2, …, text is in "
        "the first, and --text-column 1 --label-column 2 name them",
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
    """The one training loop (`d2dmoe.training`). Learning rates are per optimiser step."""

    steps: int = knob(1000, "optimiser steps")
    optimizer: str = knob(
        "adamw", "adamw, or muon for a model's inner matrices with adamw for the rest", choices=("adamw", "muon")
    )
    learning_rate: float = knob(1e-3, "peak learning rate")
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


REGULARISER_NAMES = ("hoyer", "l1", "clamped", "density", "none")


@dataclass
class CalibrationConfig:
    """Settings that several stages share."""

    calibration_tokens: int = knob(32_768, "tokens for thresholds and stand-ins")
    seed: int = knob(0, "seed of everything random")


@dataclass
class SourceConfig:
    """Which model is converted, where the result goes, and where to start from."""

    model: str = knob("", "hub id or local folder of the dense model")
    output_dir: str = knob("", "output folder (default: checkpoints/<model>-d2dmoe)")
    revision: str | None = knob(None, "branch, tag or commit of a hub model")
    preset: str = knob(
        "default", "starting point for the other keys", choices=("default", "paper", "moefication", "training-free")
    )
    dtype: str = knob("auto", "dtype of the written checkpoint", choices=("auto", "float32", "bfloat16", "float16"))
    max_shard_size: str = knob("5GB", "largest safetensors file")
    low_memory: bool = knob(
        False,
        "while converting, keep weights in memory as their files hold them (bf16, fp16) and compute in fp32 from them",
    )
    device: str = knob("auto", "where to convert: auto (a GPU if there is one), cpu, cuda or cuda:N")
    eval_tokens: int = knob(16_384, "held-out tokens for the figures in results.json; 0 skips them")
    also_eval: str | None = knob(
        None, "a second text to evaluate every budget on, as --data takes it, to see how far figures drift on it"
    )
    report_samples: int = knob(
        3, "held-out texts or images that the report shows token by token; 0 keeps the data out of the folder"
    )


@dataclass
class SparsifyFirstConfig:
    """Fine-tuning of the dense model before the conversion."""

    sparsify: str = knob(
        "skip",
        "first fine-tune with this sparsity regulariser; every flag of d2dmoe sparsify is one here with --sparsify- "
        "before it, for instance --sparsify-max-steps 300",
        choices=("skip", *REGULARISER_NAMES),
    )
    sparsify_options: dict[str, Any] = knob({}, "those further flags", hidden=True)


@dataclass
class SplitConfig(CalibrationConfig):
    """How neurons become experts."""

    experts: int = knob(0, "experts per block; 0 picks experts of about 32 neurons")
    expert_size: int = knob(0, "neurons per expert, instead of --experts, where widths differ between blocks")
    split: str = knob(
        "coactivation",
        "how neurons are grouped; shared_experts: by coactivation, after an always-on part",
        choices=("weights", "coactivation", "coactivation-signed", "shared_experts", "random"),
    )
    shared_experts: int = knob(0, "always-on experts per block (--split shared_experts); 0 for an eighth of them")


@dataclass
class GateConfig:
    """Which experts run."""

    gate: str = knob("share", "which experts run for a token", choices=("max", "share", "topk", "topp", "absolute"))
    min_experts: int = knob(0, "run at least this many experts per token")
    max_experts: int = knob(0, "run at most this many experts per token; 0 for no bound")


@dataclass
class RouterConfig(CalibrationConfig):
    """What routers are, and how they come about."""

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


@dataclass
class StandInConfig:
    """What replaces skipped experts."""

    stand_in: str = knob(
        "linear", "what replaces skipped experts", choices=("zero", "mean", "constants", "refit", "linear")
    )
    delta_rank: int = knob(0, "rank of the change of the down projection (refit, linear); 0 for a quarter of d_model")
    linear_rank: int = knob(0, "rank of the linear term (linear); 0 for an eighth of d_model")


@dataclass
class AttentionConfig:
    """What becomes of the projections around attention."""

    attention: str = knob(
        "none",
        "what becomes of the projections around attention: dense as they are (none), two thin factors (low-rank), "
        "narrower heads where the architecture allows it, else low-rank (heads), the input channels that matter to "
        "each token (channels), or for each of them what loses least (auto); or networks "
        "of two layers, distilled from them and made into experts (mlp, the paper's way; only d2dmoe then opens the "
        "checkpoint); auto:q,k,v converts these only",
    )
    attention_active: float = knob(
        0.0,
        "share of the projections' work that runs at every budget; by default a budget holds for feed-forward blocks "
        "and projections as a whole, and each gets what saves most",
    )
    compensate: bool = knob(
        True,
        "refit converted output projections for every budget, one after the other, on what each gets from the "
        "converted layers before it: adds up to half of their weights for every budget",
    )
    attention_layers: str = knob("", "attention layers to convert, by number from 0: 2-5 or 0,3 (default: all)")
    attention_factor: float = knob(
        1.0, "multiply-accumulates of the networks of --attention mlp, all experts on, relative to the projections'"
    )
    attention_experts: int = knob(
        0, "experts of each of these networks; 0 takes --expert-size, or else at least 16 of at most 32 neurons"
    )
    attention_tokens: int = knob(700_000, "tokens that these networks are distilled on, repetitions included")
    attention_batch: int = knob(256, "tokens per distillation step of these networks")
    attention_learning_rate: float = knob(3e-3, "peak learning rate of these networks")


@dataclass
class HeadConfig:
    """What becomes of the linear map from the last hidden states to the vocabulary."""

    head: str = knob(
        "none",
        "what becomes of the head of a language model: dense as it is (none), or rough logits of all tokens by two "
        "thin factors and then exact ones of the likeliest (svd-softmax), at every budget but 1",
        choices=("none", "svd-softmax"),
    )
    head_active: float = knob(0.4, "share of the head's work that runs with --head svd-softmax")


@dataclass
class BudgetConfig:
    """Which operating points are stored, and how they are shared out among the layers."""

    active: list[float] = knob(
        [],
        "active fractions to calibrate and store, comma separated (default 0.25,0.5,0.75 where no other goal is given)",
        many=float,
    )
    flops: list[float] = knob([], "shares of the dense model's FLOPs to calibrate and store", many=float)
    max_loss: list[float] = knob(
        [],
        "relative losses to calibrate and store, for instance 1%%, on calibration text kept from thresholds and "
        "stand-ins (not from routers)",
        many=float,
    )
    speedup: list[float] = knob(
        [],
        "speed-ups over the dense model to calibrate and store, as measured on this machine with batches of the "
        "calibration data, for instance 1.5",
        many=float,
    )
    thresholds: str = knob("per-layer", "one threshold for all layers, or one each", choices=("global", "per-layer"))
    allocation: str = knob(
        "sensitivity",
        "active fraction of each layer: the same, or by what skipping in that layer costs the output",
        choices=("uniform", "sensitivity"),
    )


@dataclass
class HealConfig(CalibrationConfig):
    """Distillation after calibration."""

    heal: int = knob(0, "steps of distillation from the dense model with the gate in the loop, after calibration")
    heal_parameters: str = knob(
        "stand-ins",
        "what it trains: stand-ins and bases alone, the routers as well, or every weight (then the dense twin changes)",
        choices=("stand-ins", "routers", "all"),
    )
    heal_tokens: int = knob(4096, "tokens per distillation step")
    heal_learning_rate: float = knob(
        0.0,
        "peak learning rate of the distillation (0: 1e-3, and 5e-5 where every weight is trained; bases of projections "
        "then have one that is tried from 100 steps on, otherwise a tenth of 1e-3, or all of 5e-5)",
    )


def heals_everything(recipe: Mapping[str, Any]) -> bool:
    """Whether a conversion of these options trains the dense weights as well."""
    return bool(recipe.get("heal")) and recipe.get("heal_parameters") == "all"


@dataclass
class ConvertConfig(
    HealConfig, BudgetConfig, HeadConfig, AttentionConfig, StandInConfig, RouterConfig, GateConfig, SplitConfig,
    SparsifyFirstConfig, SourceConfig, DataConfig,
):  # fmt: skip
    """Everything `d2dmoe convert` can be told; the keys of a recipe. Each stage takes the part that it inherits."""
