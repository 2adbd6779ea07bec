"""The operation `DynamicFFN` of operation.cpp in Python, for machines without a C++ compiler."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import openvino as ov
import torch

from ..kernels import native
from .attributes import LISTS, NUMBERS


class DynamicFFN(ov.Op):
    """One converted feed-forward layer; inputs and attributes as in operation.cpp."""

    def __init__(self, inputs: list | None = None, **attributes: Any):
        super().__init__(self)
        self.attributes: dict[str, Any] = {**dict.fromkeys(LISTS, ""), **dict.fromkeys(NUMBERS, 0), **attributes}
        if inputs is not None:
            self.set_arguments(list(inputs))
            self.validate_and_infer_types()

    def validate_and_infer_types(self) -> None:
        """Tokens ``(…, d)`` become ``(…, d_out)``."""
        own = self.attributes
        if own["rounds"] and own["router_width"] and own["tensors"] and "router_scale" not in own["tensors"].split():
            raise ValueError("exported by an earlier d2dmoe, its router not in int8: export it again")
        if own["tensors"]:
            shape = self.get_input_partial_shape(0)
            if shape.rank.is_static:
                shape = ov.PartialShape([*list(shape)[:-1], self.attributes["d_out"]])
            self.set_output_type(0, ov.Type.f32, shape)

    def clone_with_new_inputs(self, new_inputs: list) -> DynamicFFN:
        """The same with other inputs."""
        return DynamicFFN(new_inputs, **self.attributes)

    def visit_attributes(self, visitor: Any) -> bool:
        """Read or write the attributes."""
        visitor.on_attributes(self.attributes)
        return True

    def has_evaluate(self) -> bool:
        """It can be run."""
        return True

    def evaluate(self, outputs: list, inputs: list) -> bool:
        """One call of the native library."""
        own, x, budget = self.attributes, inputs[0], int(inputs[1].data)
        taus, tops = own["taus"].split(), own["tops"].split()
        outputs[0].shape = [*list(x.shape)[:-1], own["d_out"]]
        outputs[0].data[:] = math.nan  # OpenVINO may keep errors to itself
        if not 0 <= budget < len(taus):
            raise ValueError(f"budget {budget}: this model holds {len(taus)} budgets, counted from 0")
        layer = native._Layer(**{name: own[name] for name in NUMBERS})
        layer.kernels, layer.tau = native.kernel_for(torch.float32, True), float(taus[budget])
        layer.top = int(tops[budget])
        data = inputs[2].data
        for name, offset, stride in zip(*(own[key].split() for key in LISTS[:3]), strict=True):
            setattr(layer, name, data.ctypes.data + int(offset) + int(stride) * budget)
        tokens = math.prod(list(x.shape)[:-1])
        address, y = x.data.ctypes.data, outputs[0].data.ctypes.data
        if native.library()[0].d2dmoe_forward(ctypes.byref(layer), address, own["d"], None, tokens, y, 1):
            raise MemoryError(f"no memory for {tokens} tokens")
        return True
