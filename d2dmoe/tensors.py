"""The tensors in the safetensors files of a folder: their shapes, their checksums, and whether a conversion added some.

A folder that `convert` has written holds `checksums.json`, and its `config.json` vouches for that file. Whoever saves
the model again writes a `config.json` that does not, so that checksums of earlier weights refuse nothing.
"""

from __future__ import annotations

import json
import mmap
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import write_text

CHECKSUMS, RECORD, VOUCHER = "checksums.json", "quantization_config", "weights_checksum"
ADDED = ("router.hidden", "router.score", "constants", "delta_in", "delta_out", "linear_in", "linear_out", "order")
BASES = ("low_rank_in", "low_rank_out", "output_mean", "channel_norms")  # added to every projection around attention
HEADS = ("head_basis", "head_mean")  # to those of attention whose heads can be narrower
REFITS = ("refit_out", "refit_constant")  # to those behind the heads that are refitted for every budget
PROJECTED = (*BASES, *HEADS, *REFITS)
AGAIN = "copy it again from where it came from"
Shapes = Mapping[str, tuple[int, ...]]


def shapes_in(files: Iterable[Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of safetensors files, by their headers; other files are passed over."""
    return {
        key: tuple(entry["shape"])
        for file in files
        if str(file).endswith(".safetensors")
        for key, entry in header(Path(file))[0].items()
    }


def header(file: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Entries of the tensors of a safetensors file, and where its data begins."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        entries = json.loads(opened.read(size))
    entries.pop("__metadata__", None)
    return entries, 8 + size


def is_stripped(shapes: Shapes) -> bool:
    """Whether these are the tensors of a model without any router."""
    return bool(shapes) and not any(name.endswith((".router.hidden", ".router.score")) for name in shapes)


def is_added(name: str) -> bool:
    """Whether a conversion added this tensor to those of the dense model."""
    return name.endswith(tuple(f".{ending}" for ending in (*ADDED, *PROJECTED)))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model's folder."""
    return sorted(folder.glob("*.safetensors"))


def tensor_checksums(file: Path) -> dict[str, str]:
    """CRC-32 of every tensor of a file, in hexadecimal: of type, shape and data."""
    entries, start = header(file)
    found = {}
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        view = memoryview(data)
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            crc = zlib.crc32(json.dumps([entry["dtype"], entry["shape"]]).encode())
            with view[start + begin : start + end] as part:
                found[name] = f"{zlib.crc32(part, crc):08x}"
        view.release()
    return found


def _config_checksum(config: Mapping[str, Any]) -> str:
    """Of everything but the record, which has checksums of its own."""
    plain = {key: value for key, value in config.items() if key != RECORD}
    return f"{zlib.crc32(json.dumps(plain, sort_keys=True).encode()):08x}"


def write_checksums(folder: Path) -> None:
    """Write `checksums.json` into a converted folder that was just saved, and have its `config.json` vouch for it."""
    config = json.loads((folder / "config.json").read_text())
    if RECORD not in config:
        return
    sums = {
        "algorithm": "crc32", "config.json": _config_checksum(config),
        "files": {file.name: tensor_checksums(file) for file in weight_files(folder)},
    }  # fmt: skip
    text = json.dumps(sums, indent=1) + "\n"
    config[RECORD][VOUCHER] = f"{zlib.crc32(text.encode()):08x}"
    write_text(folder / CHECKSUMS, text)
    write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")


def compare_checksums(folder: Path) -> int:
    """Compare the weights and `config.json` with the checksums that were stored with them.

    Returns:
        The number of tensors compared; 0 if `config.json` vouches for no checksums.

    Raises:
        UserError: Naming the file, and the tensor that differs, is missing or is new.
    """
    config = json.loads((folder / "config.json").read_text())
    voucher = config[RECORD].get(VOUCHER)
    if voucher is None:
        return 0
    path = folder / CHECKSUMS
    if not path.is_file():
        raise UserError(f"{CHECKSUMS} is missing, and config.json vouches for it; {AGAIN}")
    text = path.read_bytes()
    if f"{zlib.crc32(text):08x}" != voucher:
        raise UserError(f"{CHECKSUMS} and {RECORD}.{VOUCHER}, {voucher!r}, do not belong together; {AGAIN}")
    sums = json.loads(text)
    if sums["config.json"] != _config_checksum(config):
        raise UserError(f"config.json is not the one that d2dmoe wrote (outside {RECORD}); {AGAIN}")
    here = {file.name: file for file in weight_files(folder)}
    for name in sorted({*here, *sums["files"]}):
        if name not in here or name not in sums["files"]:
            raise UserError(f"{name} {'is missing' if name not in here else 'was not written by d2dmoe'}; {AGAIN}")
        _compare_tensors(name, tensor_checksums(here[name]), sums["files"][name])
    return sum(map(len, sums["files"].values()))


def _compare_tensors(file: str, found: dict[str, str], wanted: dict[str, str]) -> None:
    for tensor in sorted({*found, *wanted}):
        if tensor not in found or tensor not in wanted:
            raise UserError(f"{file}: the tensor {tensor} {'is missing' if tensor in wanted else 'is new'}; {AGAIN}")
        if found[tensor] != wanted[tensor]:
            raise UserError(f"{file}: the tensor {tensor} is not the one that d2dmoe wrote; {AGAIN}")
