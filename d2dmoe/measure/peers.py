"""What else runs a dense model fast on a processor, of the packages that are installed: the peers of a converted one.

All of them and the converted model, in each of its forms, are timed in one run, and their outputs are compared with
those of the dense model in its own dtype.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import first_line
from ..kernels import dispatching
from ..moe.gating import set_gate
from ..moe.memory import twin_in
from .bench import active_fraction
from .prompts import Prompts, random_prompts
from .timing import Function, measure

FORMS = ("fp32", "bf16", "int8", "int8-dynamic")  # of a converted model; int8 means experts and other linear maps alike
Inputs = dict[str, torch.Tensor]


class Last(nn.Module):
    """A model as a function of its inputs, in the order of their names, to its main output; of a language model the
    logits of the last position alone, as `generate` asks for them."""

    def __init__(self, model: nn.Module, names: Sequence[str]):
        super().__init__()
        self.model, self.names = model, list(names)
        accepted = inspect.signature(model.forward).parameters
        self.more = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self.more |= {"use_cache": False} if "use_cache" in accepted else {}

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        """Logits, or the last hidden state."""
        output = self.model(**dict(zip(self.names, values, strict=True)), **self.more)
        return output["logits"] if "logits" in output else output[0]


def bf16(dense: Last, inputs: Sequence[Inputs]) -> Function:
    """Weights and arithmetic in bf16, by torch."""
    return _cast(copy.deepcopy(dense).to(torch.bfloat16))


def compiled(dense: Last, inputs: Sequence[Inputs]) -> Function:
    """By `torch.compile`."""
    module = torch.compile(copy.deepcopy(dense))
    return lambda x: module(*x.values())


def torchao(dense: Last, inputs: Sequence[Inputs]) -> Function:
    """Weights and tokens in int8 by torchao, compiled."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    module = copy.deepcopy(dense)
    quantize_(module, Int8DynamicActivationInt8WeightConfig())
    module = torch.compile(module)
    return lambda x: module(*x.values())


def ours(dense: Last, inputs: Sequence[Inputs]) -> Function:
    """Every linear map in int8 by this library's kernels."""
    module = twin_in(dense, None, "int8-dynamic")
    return lambda x: module(*x.values())


def onnxruntime(dense: Last, inputs: Sequence[Inputs]) -> Function:
    """Weights in int8 and tokens rounded at run time by ONNX Runtime, for inputs of these sizes."""
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        plain, rounded = str(Path(folder, "plain.onnx")), str(Path(folder, "int8.onnx"))
        torch.onnx.export(dense, tuple(inputs[0].values()), plain, dynamo=True, verbose=False)
        quantize_dynamic(plain, rounded, weight_type=QuantType.QInt8)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(rounded, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(x: Inputs) -> torch.Tensor:
        given = dict(zip(names, (value.numpy() for value in x.values()), strict=True))
        return torch.from_numpy(session.run(None, given)[0])

    return run


def openvino(dense: Last, inputs: Sequence[Inputs]) -> Function:
    """By OpenVINO in fp32."""
    return _in_openvino(_openvino_model(dense, inputs), dense.names)


def openvino_int8(dense: Last, inputs: Sequence[Inputs]) -> Function:
    """By OpenVINO, quantised by NNCF with ranges measured on these inputs."""
    import nncf

    nncf.set_log_level(logging.ERROR)
    seen = [{str(n): v.numpy() for n, v in enumerate(x.values())} for x in inputs]
    model = _openvino_model(dense, inputs)
    for number, port in enumerate(model.inputs):
        port.get_tensor().set_names({str(number)})
    kind = nncf.ModelType.TRANSFORMER
    model = nncf.quantize(model, nncf.Dataset(seen), model_type=kind, subset_size=len(seen))
    return _in_openvino(model, dense.names)


def _openvino_model(dense: Last, inputs: Sequence[Inputs]) -> Any:
    import openvino as ov

    return ov.convert_model(dense, example_input=tuple(inputs[0].values()))


def _in_openvino(model: Any, names: Sequence[str]) -> Function:
    import openvino as ov

    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    request = ov.Core().compile_model(model, "CPU", options).create_infer_request()

    def run(x: Inputs) -> torch.Tensor:
        given = [value.numpy() for value in x.values()]
        return torch.from_numpy(request.infer(given, share_inputs=True, share_outputs=True)[0])

    return run


PEERS: dict[str, tuple[Callable[[Last, Sequence[Inputs]], Function], tuple[str, ...]]] = {  # and the packages of each
    "compiled": (compiled, ()), "bf16": (bf16, ()), "int8-dynamic, our kernels": (ours, ()),
    "torchao int8, compiled": (torchao, ("torchao",)),
    "ONNX Runtime int8": (onnxruntime, ("onnxruntime", "onnx", "onnxscript")),
    "OpenVINO": (openvino, ("openvino",)), "OpenVINO int8": (openvino_int8, ("openvino", "nncf")),
}  # fmt: skip


@dispatching("sparse")
@torch.no_grad()
def bench_peers(
    model: nn.Module, dense: nn.Module, *, batches: Sequence[int], length: int, actives: Sequence[float],
    seconds: float = 2.0, clock: str = "wall", prompts: Prompts | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of all tokens (or patches) at once: the dense model, its peers, and the converted model at each budget.

    Args:
        model: Converted.
        dense: What it was made from, in fp32.
        batches: Numbers of samples.
        length: Tokens of each text.
        actives: Budgets.
        seconds: For each figure.
        clock: `wall`, or `cpu` for the processor's time of the whole process, on a busy machine.
        prompts: What to time them on, by default random tokens.
        say: Receives what is left out, and why.

    Returns:
        `{"batch", "column", "active_fraction", "ms", "quartiles_ms", "speedup", "close"}`; `speedup` is over the dense
        model as it is, and `close` how much of its outputs is kept: the share of rows with the same largest logit, or
        the mean cosine where there are no logits.
    """
    rows = []
    for batch in batches:
        given = (prompts or random_prompts(length))(model, batch)
        plain = Last(dense, list(given[0])).eval()
        columns: dict[str, Function] = {"dense": lambda x, m=plain: m(*x.values())}
        for name, (make, packages) in PEERS.items():
            missing = [package for package in packages if find_spec(package) is None]
            try:
                if missing:
                    raise ImportError(f"not installed: {', '.join(missing)}")
                with quiet():
                    function = make(plain, given)
                    function(given[0])
                columns[name] = function
            except Exception as error:  # whatever a package cannot do with this model, the others still count
                say(f"{name} is left out: {first_line(error)}")
        fractions = {}
        for active in actives:
            with set_gate(model, active=active):
                fractions[active] = active_fraction(model, given)
            for form in FORMS:
                twin = _in_form(model, form)
                set_gate(twin, active=active)
                columns[f"{active:g} active, {form}"] = _cast(Last(twin, list(given[0])).eval())
        expected = [columns["dense"](x) for x in given]  # others may use their memory for outputs again
        close = {name: _close([function(x).clone() for x in given], expected) for name, function in columns.items()}
        times = measure(columns, given, seconds=seconds, clock="process" if clock == "cpu" else clock)
        median = {name: statistics.median(values) for name, values in times.items()}
        for name, value in median.items():
            active = next((a for a in actives if name.startswith(f"{a:g} active")), None)
            rows.append({
                "batch": batch, "column": name, "active_fraction": fractions.get(active, 1.0), "ms": value,
                "quartiles_ms": [round(q, 4) for q in statistics.quantiles(times[name], n=4)[::2]],
                "speedup": median["dense"] / value, "close": close[name], "threads": torch.get_num_threads(),
            })  # fmt: skip
    return rows


def _in_form(model: nn.Module, form: str) -> nn.Module:
    """A copy in one of `FORMS`, which shares the parameters where it can."""
    if form == "bf16":
        return copy.deepcopy(model).to(torch.bfloat16)
    dtype = None if form == "fp32" else form
    return twin_in(model, dtype, dtype)


def _cast(module: Last) -> Function:
    """The module as a function of inputs, which it gets in the dtype of its weights."""
    dtype = next(module.parameters()).dtype
    return lambda x: module(*(v.to(dtype) if v.is_floating_point() else v for v in x.values()))


def _close(outputs: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Share of rows with the same largest entry, or the mean cosine of hidden states."""
    ours, theirs = (torch.cat([t.float().reshape(-1, t.shape[-1]) for t in ts]) for ts in (outputs, expected))
    if expected[0].dim() == 2 or expected[0].shape[1] == 1:  # logits of sequences, or of last positions
        return float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())
    return float(torch.cosine_similarity(ours, theirs, dim=-1).mean())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters talk a lot: to standard error, without warnings."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        yield
