"""Text, token ids and images from the Hub, local files or CPython itself, as documents."""

from __future__ import annotations

import pydoc_data.topics
import zlib
from pathlib import Path
from typing import Any

from ..errors import UserError, first_line
from .columns import Columns
from .files import COMPRESSED, SUFFIXES, from_dataset, kind_of, read_file
from .table import Document

HELD_OUT_NAMES = ("valid", "val", "dev", "test")
HELD_OUT_SHARE = 0.1
CONTENTS = {"text": "text", "input_ids": "token ids", "image": "images"}


def read_documents(
    source: str,
    part: str = "all",
    text_column: str | None = None,
    label_column: str | None = None,
    header: bool = True,
) -> list[Document]:
    """Read the documents of one part of a data source.

    `builtin` and files in one piece are divided here (one topic in five, or the last tenth, is held out). A folder or
    hub data set that has its own training and validation files or splits keeps them.

    Args:
        source: `builtin`, a path, or a hub data set id (`id:configuration` to name a configuration).
        part: `calibration`, `held_out` or `all`.
        text_column: Name of the text column of tabular data; guessed when `None`.
        label_column: The same for the class numbers or names; `none` leaves them out.
        header: Whether the first line of csv and tsv files names the columns; if not, they are called 1, 2, ….

    Raises:
        UserError: If the source does not exist, is empty, is not UTF-8, or has no usable column.
    """
    columns, path = Columns(text_column, label_column), Path(source)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f"--data {source}: not a file; a pipe can be read only once, so write it to a file first")
    if not header and (not path.exists() or (path.is_file() and kind_of(path) != "csv")):
        raise UserError(f"--data {source}: --no-header is for csv and tsv files; leave it out")
    if source == "builtin":
        documents = _builtin(part)
    elif path.exists():
        documents = _local(path, part, columns, header)
    elif source.startswith((".", "/", "~")) or path.suffix in (*SUFFIXES, *COMPRESSED):
        raise UserError(
            f"--data {source}: no such file or folder; give text/jsonl/csv/parquet files, a hub data set id or builtin"
        )
    else:
        documents = _hub(source, part, columns)
    if not documents:
        name = "" if part == "all" else f"{part.replace('_', '-')} "
        raise UserError(f"--data {source}: no usable {name}text, token ids or images in it; give more data")
    return documents


def _builtin(part: str) -> list[Document]:
    """The English documentation that every CPython carries; membership follows the topic's name, not its order."""
    topics = sorted(pydoc_data.topics.topics.items())
    held_out = {name: zlib.crc32(name.encode()) % 5 == 0 for name, _ in topics}
    return [{"text": text} for name, text in topics if part == "all" or held_out[name] == (part == "held_out")]


def _local(path: Path, part: str, columns: Columns, header: bool) -> list[Document]:
    splits = _saved(path) if path.is_dir() else {}
    if splits:
        return _of_splits(splits, str(path), part, columns)
    files = sorted(p for p in path.rglob("*") if kind_of(p)) if path.is_dir() else [path]
    if not files:
        raise UserError(f"--data {path}: the folder holds none of {', '.join(SUFFIXES)}")
    train = [f for f in files if f.stem.lower().startswith("train")]
    held_out = next(([f for f in files if f.stem.lower().startswith(n)] for n in HELD_OUT_NAMES if _has(files, n)), [])
    own = part != "all" and bool(train and held_out)
    chosen = files if not own else train if part == "calibration" else held_out
    documents = [d for f in chosen for d in read_file(f, columns, header)]
    _check_one_kind(documents, path)
    return documents if own else _divide(documents, part)


def _check_one_kind(documents: list[Document], path: Path) -> None:
    """Whether all files of a folder hold text, or all token ids, or all images."""
    files: dict[str, str] = {}
    for document in documents:
        for kind in document.keys() & CONTENTS.keys():
            files.setdefault(kind, document.source)
    if len(files) > 1:
        held = ", ".join(f"{CONTENTS[kind]} in {files[kind]}" for kind in CONTENTS if kind in files)
        raise UserError(f"--data {path}: its files differ ({held}); give files of one kind")


def _saved(path: Path) -> dict[str, Any]:
    """The splits that `save_to_disk` of `datasets` has written below a folder, by name; empty if it has not."""
    folders = sorted(p.parent for p in path.rglob("state.json") if (p.parent / "dataset_info.json").is_file())
    if not folders:
        return {}
    from datasets import load_from_disk

    splits = {}
    for folder in folders:
        try:
            splits["all" if folder == path else folder.name] = load_from_disk(str(folder))
        except Exception as error:
            raise UserError(
                f"--data {folder}: not a data set that save_to_disk has written ({first_line(error)}); write it again"
            ) from None
    return splits


def _has(files: list[Path], name: str) -> bool:
    return any(f.stem.lower().startswith(name) for f in files)


def _divide(documents: list[Document], part: str) -> list[Document]:
    """First nine tenths for calibration, the rest held out; a single text is cut at a line end where it has one."""
    if part == "all":
        return documents
    if len(documents) == 1 and "text" in documents[0]:
        text = documents[0]["text"]
        most = int(len(text) * (1 - HELD_OUT_SHARE))
        cut = text.rfind("\n", len(text) // 2, most) + 1 or most
        begin, source = (0 if part == "calibration" else cut), getattr(documents[0], "source", "")
        piece = text[begin : cut if part == "calibration" else None]
        return [Document({"text": piece}, source)]
    cut = max(1, min(len(documents) - 1, round(len(documents) * (1 - HELD_OUT_SHARE))))
    return documents[:cut] if part == "calibration" else documents[cut:]


def _hub(source: str, part: str, columns: Columns) -> list[Document]:
    name, _, configuration = source.partition(":")
    try:
        splits = _splits(name, configuration or None)
    except Exception as error:
        raise UserError(
            f"--data {source}: neither a local path nor a data set that can be had from the hub ({first_line(error)}); "
            f"without a network give a text/jsonl/csv/parquet file, a folder of them, or builtin"
        ) from None
    return _of_splits(splits, source, part, columns)


def _of_splits(splits: Any, source: str, part: str, columns: Columns) -> list[Document]:
    """One part of a data set with named splits; without a split to hold out, the training split is divided."""
    held_out = next((n for n in ("validation", "valid", "dev", "test") if n in splits), None)
    chosen = "train" if "train" in splits else next(iter(splits))
    if part == "held_out" and held_out:
        return from_dataset(splits[held_out], source, columns)
    documents = from_dataset(splits[chosen], source, columns)
    return documents if held_out and part == "calibration" else _divide(documents, part)


def _splits(name: str, configuration: str | None) -> Any:
    """The splits of a hub data set; without the hub, those of an earlier download.

    `load_dataset` with `DownloadConfig(local_files_only=True)` asks an absent hub for 23 seconds all the same.
    """
    from datasets import load_dataset
    from datasets.packaged_modules.cache.cache import Cache

    from ..hub import reachable

    if reachable():
        return load_dataset(name, configuration)
    folder = name.rpartition("/")[2]
    return Cache(dataset_name=folder, repo_id=name, config_name=configuration, version="auto", hash="auto").as_dataset()
