"""Open an exported folder: an OpenVINO model that is called with arrays, and whose budget is chosen at each call."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError, first_line
from .cache import BEAMS, MASK, POSITIONS, complete
from .extension import add_operation, check_installed
from .graph import BUDGET

MODEL = "openvino_model.xml"
IN_FP32 = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


class CompiledModel:
    """A compiled model at a budget.

    Attributes:
        compiled: The `openvino.CompiledModel`.
        actives: The budgets that it holds, as active fractions; their places are what its input `budget` takes.
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
        budget = np.array(self.place(active), dtype=np.int32)
        if BEAMS in self.ports:
            self.request.reset_state()
        found = self.request.infer(complete({**given, BUDGET: budget}, self.ports))
        return {port.any_name: found[port] for port in self.compiled.outputs}


def compile_model(
    folder: str | Path,
    *,
    active: float | None = None,
    threads: int | None = None,
    core: Any = None,
    config: Mapping[str, Any] | None = None,
) -> CompiledModel:
    """Open what `d2dmoe export --openvino` has written, on the CPU.

    Args:
        folder: The exported folder.
        active: Active fraction of calls that name none; by default the least of those stored.
        threads: Of an inference; by default OpenVINO's choice.
        core: An `openvino.Core` to use instead of a new one.
        config: Further properties of OpenVINO. Unless it says otherwise, everything that is not int8 is computed in
            fp32, also where OpenVINO would take bf16 by itself (`INFERENCE_PRECISION_HINT`).

    Returns:
        A callable. A decoder that was exported with its cache has `generate` as well, see `Decoder`.

    Raises:
        UserError: If `openvino` is missing, the folder is no export, or it does not hold the budget.
    """
    file = Path(folder) / MODEL
    if not file.is_file():
        raise UserError(f"{folder} has no {MODEL}; give a folder that `d2dmoe export --openvino` has written")
    check_installed()
    import openvino as ov

    if threads is not None and threads < 1:
        raise UserError(f"threads={threads}: give 1 or more")
    core = ov.Core() if core is None else core
    operation = add_operation(core)
    try:
        model = core.read_model(file)
        actives = tuple(float(a) for a in str(model.get_rt_info(["d2dmoe", "active"]).value).split())
    except RuntimeError as error:
        raise UserError(
            f"{file} is no model that d2dmoe has exported, or it is damaged ({first_line(error)})"
        ) from None
    options = {**IN_FP32, **(config or {})}
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    given = (core.compile_model(model, "CPU", options), actives, actives[0], operation)
    if any(port.any_name == BEAMS for port in model.inputs):
        from .generation import Decoder

        compiled: CompiledModel = Decoder(*given, Path(folder))
    else:
        compiled = CompiledModel(*given)
    if active is not None:
        compiled.place(active)
        compiled.active = active
    return compiled
