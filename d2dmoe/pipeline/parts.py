"""The two parts of the data: one to fit a model on, one to measure it on."""

from __future__ import annotations

from typing import Any

from .. import hub
from ..config.options import ConvertConfig
from ..data.batches import Batches, make_batches
from ..data.documents import read_documents
from ..discovery.positions import fit_to_positions
from ..errors import UserError
from ..sparsify.options import SparsifyConfig


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
        Everything there is to calibrate on, in its own order, and `eval_tokens` held out (`None` for 0).

    Raises:
        UserError: If the data cannot be read, does not fit the model, or is too little to hold some out.
    """
    data = fit_to_positions(config, kind, model_config)
    facts = hub.token_facts(config.model, model_config, config.revision)
    label2id = model_config.label2id if hub.is_classifier(kind, model_config) else None

    def make(part: str) -> Batches:
        documents = read_documents(config.data, part, config.text_column, config.label_column, config.header)
        return make_batches(documents, processor, data, packed=hub.is_causal(kind), label2id=label2id, **facts)

    calibration = make("calibration")
    if not config.eval_tokens:
        return calibration, None
    try:
        return calibration, make("held_out").first(config.eval_tokens)
    except UserError as error:
        raise UserError(f"{error} (this is the part held out for the figures; --eval-tokens 0 skips them)") from None
