"""The checks of `d2dmoe verify`: whether a converted folder is whole, and still the dense model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import PreTrainedModel

from .. import hub
from ..config.record import D2DMoEConfig
from ..discovery.inputs import NoInputsError
from ..errors import UserError, first_line
from ..moe.check import STRIPPED, STRIPPED_NETWORKS, check_permutation
from ..moe.gating import set_gate, stored_config
from ..moe.layer import layers
from ..moe.packing import dense_tensors, unpack
from ..tensors import AGAIN, compare_checksums, is_added, is_stripped, shapes_in, weight_files
from ..twin import open_dense
from .verify import MODEL_TOLERANCE, model_outputs, relative_error


class Folder:
    """A converted folder, opened step by step; every check is a method that says what it found."""

    def __init__(self, path: str):
        self.path, self.folder = path, Path(path)
        self.config: Any = None
        self.dense: PreTrainedModel | None = None
        self.model: PreTrainedModel | None = None

    def record(self) -> str:
        """`config.json` is readable, and its record consistent."""
        if not self.folder.is_dir():
            raise UserError("there is no such folder; verify takes one that is on this machine")
        self.config = hub.read_config(self.path)
        if not hub.is_converted(self.config):
            raise UserError(
                "config.json has no quantization_config of quant_method d2dmoe: this is no folder that d2dmoe "
                "convert has written"
            )
        stored = hub.conversion_record(self.config)
        values = json.loads((self.folder / "config.json").read_text())["quantization_config"]
        D2DMoEConfig.from_dict({k: v for k, v in values.items() if k != "quant_method"})
        return f"{len(stored.blocks)} blocks, {len(stored.budgets)} budgets"

    def files(self) -> str:
        """Every file opens, and the index of shards agrees with them."""
        files = weight_files(self.folder)
        if not files:
            raise UserError("there is no safetensors file")
        hub.check_safetensors(self.path)
        if is_stripped(shapes_in(files)):
            raise UserError(STRIPPED_NETWORKS if hub.conversion_record(self.config).networks else STRIPPED)
        index = self.folder / "model.safetensors.index.json"
        if index.exists():
            _check_index(json.loads(index.read_text())["weight_map"], files)
        elif len(files) > 1:
            raise UserError(f"{len(files)} safetensors files, and no {index.name}; {AGAIN}")
        return f"{len(files)} files"

    def checksums(self) -> str:
        """Weights and config are those that were written."""
        count = compare_checksums(self.folder)
        return f"{count} tensors" if count else "none stored: somebody has saved the folder again since"

    def finite(self) -> str:
        """No tensor holds NaN or infinite values."""
        count = 0
        for file in weight_files(self.folder):
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    tensor, count = opened.get_tensor(name), count + 1
                    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                        raise UserError(f"{file.name}: {name} holds NaN or infinite values; {AGAIN}")
        return f"{count} tensors"

    def twin(self) -> str:
        """A program without d2dmoe opens the dense model: all its tensors are there under their names."""
        if networks := hub.conversion_record(self.config).networks:
            return f"none: {len(networks)} projections around attention are networks (--attention mlp)"
        self.dense, info = open_dense(self.path, self.config)
        for kind in ("missing_keys", "mismatched_keys"):
            if info[kind]:
                raise UserError(
                    f"the dense model opens with {kind.replace('_', ' ')}, first {min(map(str, info[kind]))}"
                )
        foreign = sorted(name for name in info["unexpected_keys"] if not is_added(name))
        if foreign:
            raise UserError(
                f"the tensor {foreign[0]} belongs neither to the dense model nor to its conversion; {AGAIN}"
            )
        return f"{sum(1 for _ in self.dense.parameters())} parameters"

    def experts(self) -> str:
        """The converted model opens, and its experts are the neurons of the dense one, bit for bit.

        Where there is no dense one, those of the tensors in the files.
        """
        self.model = hub.load_model(self.path, self.config)
        count, dense = 0, dict(self.dense.named_parameters()) if self.dense is not None else self._tensors()
        for layer in layers(self.model):
            if layer.order is not None:
                check_permutation(layer.block.name, layer.order, layer.block.width)
            for source, targets, layout, _ in dense_tensors(layer.block):
                if source in dense and layout and len(targets) == 1:
                    packed = layer.get_parameter(targets[0].removeprefix(f"{layer.block.name}."))
                    if not torch.equal(unpack(packed, layout, layer.block.width), dense[source]):
                        raise UserError(f"{source} differs between the experts and the dense model; {AGAIN}")
                    count += 1
        return f"{len(layers(self.model))} layers, {count} tensors bit-equal"

    def _tensors(self) -> dict[str, torch.Tensor]:
        """All tensors in the files, by name."""
        return {name: tensor for file in weight_files(self.folder) for name, tensor in load_file(file).items()}

    def all_on(self) -> str:
        """With everything on, the outputs are those of the dense model."""
        if self.dense is None:
            return "not compared: there is no dense model in this folder"
        try:
            dense = model_outputs(self.dense)
        except NoInputsError as error:
            return f"not compared: {error}"
        with set_gate(self.model, active=1):
            converted = model_outputs(self.model)
        errors = {name: relative_error(value, converted[name]) for name, value in dense.items()}
        for name, error in errors.items():
            if not error <= MODEL_TOLERANCE:
                raise UserError(f"with all experts on, {name} differs from the dense model's by {error:.2g} relative")
        return f"largest relative difference {max(errors.values(), default=0):.1g}"

    def budgets(self) -> str:
        """Every stored budget runs, and gives finite values."""
        stored = stored_config(self.model).budgets
        for number, budget in enumerate(stored):
            with set_gate(self.model, budget=number):
                try:
                    outputs = model_outputs(self.model)
                except NoInputsError as error:
                    return f"not run: {error}"
                for name, value in outputs.items():
                    if not bool(value.isfinite().all()):
                        raise UserError(f"budget {number}, active {budget.active:g}: {name} is not finite; {AGAIN}")
        return ", ".join(f"{active:g}" for active in stored.actives) or "none stored"


CHECKS: dict[str, Callable[[Folder], str]] = {
    "record": Folder.record, "files": Folder.files, "checksums": Folder.checksums, "finite": Folder.finite,
    "dense twin": Folder.twin, "experts": Folder.experts, "all on equals dense": Folder.all_on,
    "budgets": Folder.budgets,
}  # fmt: skip


def check_folder(path: str) -> Iterator[dict[str, Any]]:
    """Check a converted folder, and stop at the first check that fails.

    Yields:
        `{"check", "ok", "found"}` of each check.
    """
    folder = Folder(path)
    for name, check in CHECKS.items():
        try:
            found, ok = check(folder), True
        except UserError as error:
            found, ok = str(error).removeprefix(f"--model {path}: "), False
        except Exception as error:  # of a library, on what is damaged
            found, ok = f"{type(error).__name__}: {first_line(error)}", False
        yield {"check": name, "ok": ok, "found": found}
        if not ok:
            return


def _check_index(weight_map: dict[str, str], files: list[Path]) -> None:
    """Whether every shard holds the tensors that the index names, and no others."""
    for file in files:
        wanted, found = {k for k, v in weight_map.items() if v == file.name}, shapes_in([file]).keys()
        if wanted != found:
            first = min(wanted ^ found)
            raise UserError(f"{file.name} and the index of shards disagree on the tensor {first}; {AGAIN}")
    lost = sorted({*weight_map.values()} - {file.name for file in files})
    if lost:
        raise UserError(f"{lost[0]} is missing, and the index of shards names it; {AGAIN}")
