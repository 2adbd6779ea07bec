"""Whether a model has a tokenizer of its own, and what the model itself knows of tokens: ids, and patches of images."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub

from .errors import first_line
from .files import is_lfs_pointer

USUAL_FILES = ("tokenizer.json", "vocab.txt", "vocab.json with merges.txt", "tokenizer.model", "spiece.model")
WHOLE_FILES = {"tokenizer.json", "tokenizer.model", "tekken.json"}  # each is a tokenizer by itself
SMALLEST = 3  # tokens; transformers makes up smaller ones
POINTER_BYTES = 1024  # no Git LFS pointer is larger
PACKAGES = ("sentencepiece", "tiktoken", "protobuf")
SPECIAL = ("mask", "pad", "bos", "eos", "cls", "sep", "unk")


def size_of(config: Any) -> int | None:
    """Number of token ids that a model takes; `None` if its config does not tell."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    return size if isinstance(size, int) and size > 0 else None


def token_of(config: Any, name: str) -> int | None:
    """A special token id such as `pad` by the model's config; `None` where it has none that is in its vocabulary."""
    size = size_of(config)
    for part in (config, config.get_text_config()):
        value = getattr(part, f"{name}_token_id", None)
        value = value[0] if isinstance(value, list) and value else value  # several ends of a text
        if isinstance(value, int) and value >= 0 and (size is None or value < size):
            return value
    return None


def special_tokens(config: Any, tokenizer: Any) -> Any:
    """An object with `mask_token_id` and `all_special_ids`: the tokenizer, or else what the config tells."""
    mask, size = getattr(tokenizer, "mask_token_id", None), size_of(config)
    if mask is not None and (size is None or mask < size):
        return tokenizer
    ids = {name: token_of(config, name) for name in SPECIAL}
    others = {i for name, i in ids.items() if name != "mask" and i is not None}
    mask = None if ids["mask"] in others else ids["mask"]  # a default of the config's class, and not this model's
    return SimpleNamespace(mask_token_id=mask, all_special_ids=sorted({*others, mask} - {None}))


def is_invented(name: str, tokenizer: Any, revision: str | None = None) -> bool:
    """Whether transformers has made up this tokenizer, because its files are not there."""
    return len(tokenizer) < SMALLEST or bool(_missing(name, tokenizer, revision))


def why_absent(name: str, tokenizer: Any, error: Exception | None, revision: str | None = None) -> str:
    """A clause on why a model has no tokenizer.

    Args:
        name: Hub id or local folder.
        tokenizer: The one that transformers has made up; `None` if it has made none.
        error: The reason why it has made none.
        revision: Of a hub model.
    """
    if pointer := lfs_pointer(name):
        return f"the model's tokenizer cannot be read ({pointer} is a Git LFS pointer; fetch it with git lfs pull)"
    if tokenizer is not None:
        files = " and ".join(_missing(name, tokenizer, revision)) or " or ".join(USUAL_FILES)
        return f"the model comes with no tokenizer (no {files})"
    if isinstance(error, ImportError) or (error and _has_some(name, revision) and _package(error)):
        return f"the model's tokenizer needs a package that is not installed ({_package(error) or first_line(error)})"
    if _has_some(name, revision):
        return f"the model's tokenizer cannot be read ({first_line(error) if error else 'no reason given'})"
    return f"the model comes with no tokenizer (no {' or '.join(USUAL_FILES)})"


def lfs_pointer(name: str) -> str | None:
    """The name of a file of the tokenizer in a local folder that Git LFS has not fetched."""
    for file in sorted(Path(name).iterdir()) if Path(name).is_dir() else []:
        if _of_tokenizer(file.name) and file.is_file() and file.stat().st_size <= POINTER_BYTES:
            with file.open("rb") as handle:
                if is_lfs_pointer(handle.read(POINTER_BYTES)):
                    return file.name
    return None


def _of_tokenizer(file: str) -> bool:
    """Whether a file of this name is a part of a tokenizer."""
    known = re.search(r"token|vocab|merges|spm|tekken|spiece|sentencepiece|bpe", file)
    return bool(known) and not file.endswith((".safetensors", ".bin", ".py", ".md"))


def _missing(name: str, tokenizer: Any, revision: str | None) -> list[str]:
    """Files without which this kind of tokenizer is made up; none for kinds that need no file, such as bytes."""
    kind = dict(getattr(tokenizer, "vocab_files_names", None) or {})
    if not kind or any(_is_there(name, file, revision) for file in WHOLE_FILES) or _versioned(name):
        return []
    needed = [kind[part] for part in ("vocab_file", "merges_file") if part in kind]
    missing = [file for file in needed if not _is_there(name, file, revision)]
    return ["tokenizer.json or " + missing[0], *missing[1:]] if missing else []


def _versioned(name: str) -> bool:
    """Whether a local folder has a tokenizer for certain versions of transformers: `tokenizer.4.0.0.json`."""
    return Path(name).is_dir() and any(Path(name).glob("tokenizer.*.json"))


def _has_some(name: str, revision: str | None) -> bool:
    """Whether there is any file that holds a vocabulary."""
    files = {*WHOLE_FILES, "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model", "spm.model"}
    return any(_is_there(name, file, revision) for file in files)


def _is_there(name: str, file: str, revision: str | None) -> bool:
    """Whether a model has a file: in its local folder, or among those fetched from the hub."""
    if Path(name).is_dir():
        return (Path(name) / file).is_file()
    return isinstance(huggingface_hub.try_to_load_from_cache(name, file, revision=revision), str)


def _package(error: Exception) -> str | None:
    """The packages that an error asks for."""
    text = str(error)
    if any(package in text for package in PACKAGES):  # transformers names one, and the file may be for another
        return "pip install sentencepiece protobuf, or tiktoken"
    wanted = re.search(r"install `?([a-z][\w-]+)`? to use", text)
    return f"pip install {wanted[1]}" if wanted else None


def patches_of(config: Any) -> int:
    """Patches that a vision model makes of an image, by its config; 1 where that does not say."""
    vision = getattr(config, "vision_config", config)
    sides = []
    for name in ("image_size", "patch_size"):
        size = getattr(vision, name, None)
        sides.append(tuple(size) if isinstance(size, list | tuple) else (size, size))
    if not all(isinstance(side, int) and side > 0 for pair in sides for side in pair):
        return 1
    (height, width), (rows, columns) = sides
    return max(1, (height // rows) * (width // columns))
