"""Find the linear map from the last hidden states to the vocabulary."""

from __future__ import annotations

from torch import nn

from ..errors import UserError
from ..moe.packing import is_plain


def find_head(model: nn.Module) -> tuple[str, int, int]:
    """Name, inputs and outputs of the head of a language model that generates text.

    Args:
        model: A Hugging Face model, or its skeleton without weights.

    Raises:
        UserError: If it does not generate text, or its head is more than one linear map.
    """
    head = model.get_output_embeddings() if model.can_generate() else None
    if head is None:
        raise UserError(f"--head svd-softmax: {type(model).__name__} does not choose from a vocabulary; leave it out")
    name = next((name for name, module in model.named_modules() if module is head), "")
    if not isinstance(head, nn.Linear) or not is_plain(head) or not name:
        raise UserError(
            f"--head svd-softmax: the head of a {type(model).__name__} is a {type(head).__name__}, which does more "
            f"than a linear map; leave it out"
        )
    return name, head.in_features, head.out_features
