"""The quantiser hook of `from_pretrained`, which serves as a loader only. It registers itself on import.

`late.py` imports this while `transformers` is still being imported, when there is no `PreTrainedModel` yet: what needs
one is imported by the steps themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from ..errors import UserError
from .quantization import METHOD, D2DMoEQuantizationConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class D2DMoELoader(HfQuantizer):
    """Turns the freshly built dense skeleton into the converted model while `from_pretrained` runs."""

    requires_calibration = False
    is_trainable = is_qat_trainable = True

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Saving needs no special care."""
        return True

    def validate_environment(self, *_: Any, **__: Any) -> None:
        """Refuse a config for a model that is not converted yet."""
        if not self.pre_quantized:
            raise UserError("d2dmoe converts with `d2dmoe convert`, not with from_pretrained(quantization_config=…)")

    def update_dtype(self, dtype: Any) -> Any:
        """Nothing to change; remembered for `cast`."""
        self._dtype = dtype
        return dtype

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **more: Any) -> None:
        from .loader import swap_modules

        self._model = model
        swap_modules(model, self.quantization_config.d2dmoe, more.get("checkpoint_files") or ())

    def update_weight_conversions(self, weight_conversions: list, model: PreTrainedModel | None = None) -> list:
        """Add ours to the model's own (transformers 5.17 does not pass the model, which has been seen before)."""
        from .layer import layers
        from .loader import conversions

        model = model if model is not None else self._model
        blocks = [layer.block for layer in layers(model)]
        return [*weight_conversions, *conversions(blocks, model.base_model_prefix)]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        from .loader import finish

        self._model = None
        finish(model, self.quantization_config.d2dmoe, self._dtype if isinstance(self._dtype, torch.dtype) else None)
        return model


if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(METHOD)(D2DMoEQuantizationConfig)
    register_quantizer(METHOD)(D2DMoELoader)
