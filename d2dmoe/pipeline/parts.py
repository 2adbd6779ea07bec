"""The two parts of the data: one to fit a model on, one to measure it on."""

from __future__ import annotations

from typing import Any

from .. import hub
from ..config.options import ConvertConfig
from ..config.sizes import attention_way
from ..data.batches import Batches
from ..data.reading import read_batches
from ..discovery.positions import fit_to_positions
from ..errors import UserError
from ..sparsify.options import SparsifyConfig
from ..stages.budgets.goals import LOSS_TOKENS


def both_parts(
    config: ConvertConfig | SparsifyConfig, kind: type, model_config: Any, processor: Any
) -> tuple[Batches, Batches | None]:
    """Batches of the calibration part and of the held-out part.

    Args:
        config: The data, and how many held-out tokens there shall be.
        kind: The model's class, which tells whether text is packed and labels are classes.
        model_config: The model's config.
        processor: Its tokenizer or image processor.

    Returns:
        What there is to calibrate on, and `eval_tokens` held out (`None` for 0). A conversion gets no more than
        `wanted_tokens` of text that is much longer than that, from all over it.

    Raises:
        UserError: If the data cannot be read, does not fit the model, or is too little to hold some out.
    """
    data = fit_to_positions(config, kind, model_config)
    facts = hub.token_facts(config.model, model_config, config.revision)
    label2id = model_config.label2id if hub.is_classifier(kind, model_config) else None

    def make(part: str, tokens: int, seed: int | None) -> Batches:
        options = {"packed": hub.is_causal(kind), "label2id": label2id, **facts}
        return read_batches(data, part, processor, tokens=tokens, seed=seed, **options)

    wanted = wanted_tokens(config) if isinstance(config, ConvertConfig) else 0
    calibration = make("calibration", wanted, config.seed)
    if not config.eval_tokens:
        return calibration, None
    try:
        return calibration, make("held_out", config.eval_tokens, None).first(config.eval_tokens)
    except UserError as error:
        raise UserError(f"{error} (this is the part held out for the figures; --eval-tokens 0 skips them)") from None


def wanted_tokens(config: ConvertConfig) -> int:
    """Calibration tokens that some stage of a conversion uses: those of the fits, and those of no fit besides."""
    training = [
        config.router_tokens * (config.router_fit != "closed-form"),
        config.heal * config.heal_tokens,
        config.attention_tokens * (attention_way(config.attention)[0] == "mlp"),
        config.calibration_tokens * (config.attention != "none"),
        LOSS_TOKENS * bool(config.max_loss),
    ]
    return config.calibration_tokens + max(training)
