"""Open an exported folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError, first_line
from .cache import BEAMS
from .compiled import IN_FP32, MODEL, CompiledModel
from .extension import add_operation, check_installed
from .generation import Decoder


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
        compiled: CompiledModel = Decoder(*given, Path(folder))
    else:
        compiled = CompiledModel(*given)
    if active is not None:
        compiled.place(active)
        compiled.active = active
    return compiled
