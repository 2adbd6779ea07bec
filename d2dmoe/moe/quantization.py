"""The record of a conversion in the form in which `transformers` carries the quantisation of a model."""

from __future__ import annotations

from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from ..config.record import D2DMoEConfig
from ..config.validate import checksums

METHOD = "d2dmoe"
REMEDY = (
    "This checkpoint holds no dense model: networks stand in the places of projections around attention, so that "
    "tensors have other shapes. Install d2dmoe-toolkit and run `import d2dmoe` before from_pretrained."
)


class D2DMoEQuantizationConfig(QuantizationConfigMixin):
    """Carries a `D2DMoEConfig` (as `.d2dmoe`) in the place of `config.json` that `transformers` hands to loaders."""

    def __init__(self, /, quant_method: str = METHOD, **values: Any):
        self.quant_method = METHOD
        self.d2dmoe = D2DMoEConfig.from_dict(values) if values else D2DMoEConfig()

    def to_dict(self) -> dict[str, Any]:
        """What is written to `config.json`. The note is for whoever opens the checkpoint without us, and fails."""
        values = self.d2dmoe.to_dict()
        note = {"note": REMEDY} if self.d2dmoe.networks else {}
        return {"quant_method": METHOD, **note, **values, "checksums": checksums(values)}

    def to_diff_dict(self) -> dict[str, Any]:
        """All of it: nothing here has a default that a reader could know."""
        return self.to_dict()
