"""What a model's own README states of it, and the README of what is made from it has to go on stating."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import ModelCard

from .. import hub
from ..errors import first_line

KEPT = ("license", "license_name", "license_link", "language", "datasets", "pipeline_tag", "base_model")


def origin(name: str, revision: str | None = None) -> dict[str, Any]:
    """Licence, language, data, task and base model by the metadata of a model's README.

    Args:
        name: Hub id or local folder. A hub id is itself the base model of what is made from it.
        revision: Of a hub id.

    Returns:
        Metadata fields by the names that the hub has for them; those that the README states.
    """
    folder = Path(name).is_dir()
    readme = Path(name) / "README.md" if folder else _downloaded(name, revision)
    stated: dict[str, Any] = {}
    if readme is not None and readme.is_file():
        try:
            stated = ModelCard(readme.read_text(), ignore_metadata_errors=True).data.to_dict()
        except Exception as error:  # whatever a hand-written file may hold, it is no reason to lose a conversion
            warnings.warn(
                f"--model {name}: the metadata of its README.md cannot be read ({first_line(error)}), so the new card "
                f"states no licence; add it there",
                stacklevel=2,
            )
    found = {key: stated[key] for key in KEPT if stated.get(key)}
    return found if folder else {**found, "base_model": name}


def _downloaded(name: str, revision: str | None) -> Path | None:
    try:
        found = huggingface_hub.hf_hub_download(
            name, "README.md", revision=revision, local_files_only=hub.local_only(name)
        )
    except Exception:  # there may be none, and the hub may have gone since the weights came
        return None
    return Path(found)
