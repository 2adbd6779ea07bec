"""An exported model that is called with arrays, and whose budget is chosen at each call."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import UserError
from .cache import BEAMS, MASK, POSITIONS, Feed, complete
from .graph import BUDGET

MODEL = "openvino_model.xml"
IN_FP32 = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


class CompiledModel:
    """A compiled model at a budget.

    Attributes:
        compiled: The `openvino.CompiledModel`.
        actives: The budgets that it holds, as active fractions; their places are what its input `budget` takes,
            which a model of one budget does not have.
        active: The one that calls run at unless they name another.
        operation: `c++`, or `python` where no compiler was found.
    """

    def __init__(self, compiled: Any, actives: tuple[float, ...], active: float, operation: str):
        self.compiled, self.actives, self.active, self.operation = compiled, actives, active, operation
        self.ports = [port.any_name for port in compiled.inputs]
        self.names = [name for name in self.ports if name not in (BUDGET, BEAMS, POSITIONS)]
        self.request = compiled.create_infer_request()

    def place(self, active: float | None) -> int:
        """The number of a budget.

        Raises:
            UserError: If the model does not hold it.
        """
        wanted = self.active if active is None else active
        for number, stored in enumerate(self.actives):
            if abs(stored - wanted) < 1e-6:
                return number
        held = ", ".join(f"{a:g}" for a in self.actives)
        raise UserError(f"active={wanted!r}: this export holds {held}; export again with --active to add another")

    def budget(self, active: float | None = None) -> Feed:
        """The input that says which budget runs; nothing where there is one only.

        Raises:
            UserError: If the model does not hold it.
        """
        number = np.array(self.place(active), dtype=np.int32)
        return {BUDGET: number} if BUDGET in self.ports else {}

    def __call__(self, active: float | None = None, **inputs: Any) -> dict[str, np.ndarray]:
        """Run the model once.

        Args:
            active: A budget of `actives` for this call.
            inputs: Arrays or tensors by name, as the tokenizer gives them. Without `attention_mask` all tokens
                count; without `token_type_ids` they are zeros.

        Returns:
            The outputs by name.

        Raises:
            UserError: If an input is missing or unknown, or the budget is none of `actives`.
        """
        given = {name: np.asarray(value) for name, value in inputs.items() if value is not None}
        first = given.get("input_ids")
        if first is not None:
            given = {MASK: np.ones_like(first), "token_type_ids": np.zeros_like(first), **given}
            given = {n: v for n, v in given.items() if n in self.names or n in inputs}
        if sorted(given.keys() - {POSITIONS} if POSITIONS in self.ports else given) != sorted(self.names):
            raise UserError(f"inputs {', '.join(sorted(given))}: this model takes {', '.join(sorted(self.names))}")
        given |= self.budget(active)
        if BEAMS in self.ports:
            self.request.reset_state()
        found = self.request.infer(complete(given, self.ports))
        return {port.any_name: found[port] for port in self.compiled.outputs}
