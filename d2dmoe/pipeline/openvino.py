"""A way out of a converted folder: an OpenVINO model, its converted layers computed by the native library."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .. import hub
from ..config.checks import check_active
from ..config.options import DataConfig
from ..data.batches import Batches
from ..data.reading import read_batches
from ..discovery.inputs import on_small_inputs
from ..discovery.positions import fit_to_positions
from ..errors import UserError
from ..moe.gating import set_gate
from ..moe.memory import set_expert_dtype
from ..openvino.cache import MASK, Feed, complete, why_not
from ..openvino.compiled import IN_FP32, MODEL
from ..openvino.extension import check_installed, extension_library
from ..openvino.graph import BUDGET, openvino_model
from ..openvino.projections import check_budgets, dense_maps, plain_projections
from .export import check_output, open_record
from .verify import MODEL_TOLERANCE

RESTS = ("int8", "int8-weights")
ROUNDED_TOLERANCE = 0.1  # where one tipped rounding of a token goes through all layers behind it


def export_openvino(
    name: str,
    output: str,
    *,
    actives: Sequence[float] | None = None,
    expert_dtype: str | None = None,
    rest: str | None = None,
    data: DataConfig | None = None,
    batches: int = 64,
    cache: bool | None = None,
    dense_projections: bool = False,
) -> dict[str, Any]:
    """Write a converted model in OpenVINO's form, after a comparison with what PyTorch computes.

    Args:
        name: Converted folder.
        output: New folder: `openvino_model.xml` and `.bin`, `config.json`, and the tokenizer's and other files beside
            the weights.
        actives: Active fractions that it can run at; by default the stored budgets.
        expert_dtype: One of `kernels.EXPERT_DTYPES`.
        rest: What NNCF makes of everything else: `int8` (weights and activations, whose ranges are measured on
            `data`), `int8-weights`, or `None` for fp32.
        data: Text or images for `int8`.
        batches: How many batches of them.
        cache: Keys and values of a decoder are its state, so that it generates token by token. By default they are
            where the model has them.
        dense_projections: Converted projections around attention are exported dense; then budgets at which they differ
            fit into one folder.

    Returns:
        `layers`, `actives`, `cached`, and `error`, the relative error against PyTorch before NNCF.

    Raises:
        UserError: If a package is missing, the folder is not a converted one, a layer is of a kind that the native
            library does not have, there is no cache, or the output is not empty.
    """
    folder, (config, _) = check_output(output), open_record(name)
    check_installed(*(("nncf",) if rest else ()))
    record = hub.conversion_record(config)
    for active in actives or ():
        check_active(active)
    actives = list(dict.fromkeys(actives or sorted(budget.active for budget in record.budgets)))
    if not actives:
        raise UserError(f"{name} stores no budgets; name one with --active")
    if not dense_projections:
        check_budgets(record, actives)
    extension_library()  # says here, before the work, if there is no compiler
    data = data or DataConfig()
    wanted = batches * data.batch_size * data.max_length
    found = calibration(name, config, data, wanted) if rest == "int8" else None
    model = hub.load_model(name, config)
    cached = _cached(model, cache)
    result, error = traced(model, actives, expert_dtype, cached, dense_projections)
    if rest:
        result = compressed(result, rest, list(feeds(result, found, len(actives), batches)) if found else [])
    result.set_rt_info(" ".join(map(repr, actives)), ["d2dmoe", "active"])
    _write(result, folder, name, model)
    return {"layers": len(record.blocks), "actives": actives, "cached": cached, "error": error}


def _cached(model: nn.Module, wanted: bool | None) -> bool:
    """Is the model exported with its cache?

    Raises:
        UserError: If it has none, and one is wanted.
    """
    if wanted is False:
        return False
    why = why_not(model, example_inputs(model))
    if why and wanted:
        raise UserError(f"--cache: {why}; leave it out")
    return not why


def traced(
    model: nn.Module, actives: Sequence[float], expert_dtype: str | None = None, cached: bool = False,
    dense_projections: bool = False,
) -> tuple[Any, float]:  # fmt: skip
    """The `openvino.Model` of a converted model, and its relative error against it.

    Args:
        model: In fp32; its converted layers are taken out of it. A converted head becomes dense.
        actives: Active fractions that it can run at; projections around attention are set as at the first of them.
        expert_dtype: One of `kernels.EXPERT_DTYPES`.
        cached: Keys and values of a decoder are its state.
        dense_projections: Projections around attention become dense as well.

    Raises:
        UserError: If it does not compute what the model does.
    """
    set_expert_dtype(model, expert_dtype)
    dense_maps(model, dense_projections)
    inputs = example_inputs(model)
    wanted = []
    with torch.no_grad():
        for active in actives:
            with set_gate(model, active=active):
                wanted.append(next(iter(model(**inputs).values())))
    with set_gate(model, active=actives[0]):
        plain_projections(model)
    result = openvino_model(model, inputs, actives, expert_dtype, cached)
    allowed = ROUNDED_TOLERANCE if expert_dtype == "int8-dynamic" else MODEL_TOLERANCE
    return result, _compare(result, inputs, wanted, actives, allowed)


def example_inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """Small inputs for a trace, with the mask and the segments of texts where the model takes them."""
    accepted = inspect.signature(model.forward).parameters

    @torch.no_grad()
    def run(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if "input_ids" in inputs and "attention_mask" in accepted:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            inputs["attention_mask"][0, -2:] = 0
        if "input_ids" in inputs and "token_type_ids" in accepted and getattr(model.config, "type_vocab_size", 0) > 1:
            inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        model(**inputs)
        return inputs

    return on_small_inputs(model, run, None)


def _compare(
    result: Any, inputs: dict[str, torch.Tensor], wanted: list[torch.Tensor], actives: Sequence[float], allowed: float
) -> float:
    """The largest error of all budgets and steps: the median of the rows' relative errors.

    Sums in another order can tip a choice of the router that was close, or the rounding of a token, and then the rest
    of that text differs by more than rounding. The median leaves such texts out. In `int8-dynamic` PyTorch alone
    differs from itself by up to 0.2 between one step and two: there a lower quantile and a wider bound hold for what
    goes on from a state.
    """
    import openvino as ov

    options = {"INFERENCE_NUM_THREADS": 1, **IN_FP32}
    request, worst = ov.Core().compile_model(result, "CPU", options).create_infer_request(), 0.0
    later = (0.25, 3 * allowed) if allowed == ROUNDED_TOLERANCE else (0.5, allowed)  # for what goes on from a state
    for number, value in enumerate(wanted):
        feed = {k: v.numpy() for k, v in inputs.items()}
        if len(actives) > 1:
            feed[BUDGET] = np.array(number, dtype=np.int32)
        for step, (place, output) in enumerate(_steps(request, feed)):
            found = torch.from_numpy(output).reshape(-1, value.shape[-1])
            rows = value[place].reshape(found.shape)
            errors = (found - rows).norm(dim=-1) / rows.norm(dim=-1).clamp_min(1e-12)
            quantile, limit = later if step else (0.5, allowed)
            error = float(errors.quantile(quantile))
            if not error <= limit:
                raise UserError(
                    f"active={actives[number]:g}: in OpenVINO the model differs by {error:.2g} relative from PyTorch "
                    f"(allowed {limit:g}), so it is not exported"
                )
            worst = max(worst, error)
    return worst


def _steps(request: Any, feed: Feed) -> Iterator[tuple[Any, np.ndarray]]:
    """The first output and its place in the whole; of a model with a state half of each text after the other."""
    names = [port.any_name for port in request.model_inputs]
    if not request.query_state():
        yield ..., request.infer(feed)[0]
        return
    ids, mask = feed["input_ids"], feed[MASK]
    request.reset_state()
    for start, end in ((0, ids.shape[1] // 2), (ids.shape[1] // 2, ids.shape[1])):
        part = complete({**feed, "input_ids": ids[:, start:end], MASK: mask[:, :end]}, names)
        yield (slice(None), slice(start, end)), request.infer(part)[0]


def calibration(name: str, config: Any, data: DataConfig, tokens: int = 0) -> Batches:
    """Batches of the data for a model, from the beginning; of so many tokens at least, 0 for all.

    Raises:
        UserError: If they do not fit.
    """
    kind = hub.model_class(config, name)
    data = fit_to_positions(data, kind, config)
    processor, facts = hub.load_processor(name, config), hub.token_facts(name, config)
    return read_batches(data, "calibration", processor, tokens=tokens, packed=hub.is_causal(kind), **facts)


def feeds(model: Any, found: Batches, budgets: int, count: int) -> Iterator[Feed]:
    """Inputs of an OpenVINO model for at most `count` batches, its budgets in turn."""
    names = {port.any_name for port in model.inputs}
    for number, batch in zip(range(count), found, strict=False):
        given = {name: value.numpy() for name, value in batch.items() if name in names}
        given = complete(given, list(names))
        for name in names - {*given, BUDGET}:  # a decoder gets the encoder's tokens; of segments there is one
            ids = given["input_ids"]
            given[name] = ids if name == "decoder_input_ids" else np.zeros_like(ids)
        yield given | ({BUDGET: np.array(number % budgets, dtype=np.int32)} if BUDGET in names else {})


def compressed(model: Any, rest: str, feeds: Sequence[Feed]) -> Any:
    """What NNCF makes of an `openvino.Model`; operations that it does not know, ours among them, stay as they are.

    Args:
        model: The `openvino.Model`.
        rest: `int8` or `int8-weights`.
        feeds: Inputs by name, on which `int8` measures the ranges of activations.
    """
    import nncf

    nncf.set_log_level(logging.ERROR)
    with contextlib.redirect_stdout(sys.stderr):  # progress
        if rest == "int8-weights":
            return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
        return nncf.quantize(model, nncf.Dataset(feeds), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(feeds))


def _write(result: Any, folder: Path, name: str, model: nn.Module) -> None:
    """Under a temporary name, which becomes the folder's when all files are there."""
    import openvino as ov

    scratch = folder.with_name(folder.name + ".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        ov.save_model(result, scratch / MODEL, compress_to_fp16=False)
        config = copy.deepcopy(model.config)
        del config.quantization_config  # the weights are not beside it
        config.save_pretrained(scratch)
        if model.can_generate():
            model.generation_config.save_pretrained(scratch)
        for path, source in hub.companions(name).items():
            (scratch / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, scratch / path)
        os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
