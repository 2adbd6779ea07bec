"""`d2dmoe push`: upload a folder that `convert` or `sparsify` has completed to the Hugging Face hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import HfApi, errors
from huggingface_hub.utils import filter_repo_objects

from .. import hub
from ..errors import UserError, causes, first_line
from .folder import CHECKS, Folder

NEEDED = ("config.json", "results.json", "recipe.yaml", "README.md")
LEFT_HERE = [".*", "*/.*", "*.partial/*", "*.tmp"]  # hidden files, working folders, files half written
QUICK = ("record", "files", "checksums")  # of the checks of `verify`: those that load no model


def push(
    folder: str, repository: str, *, private: bool = False, token: str | None = None, message: str = "Upload by d2dmoe"
) -> dict[str, Any]:
    """Upload a complete folder.

    Args:
        folder: What `convert` or `sparsify` has written.
        repository: Hub id; the repository is made if it is not there.
        private: Whether a new repository is private.
        token: Hub token; by default the one of the environment or of `hf auth login`.
        message: Of the commit.

    Returns:
        `{"repository", "address", "commit", "files"}`.

    Raises:
        UserError: If the folder is not complete, or the hub refuses it or cannot be reached.
    """
    check_complete(folder)
    if huggingface_hub.is_offline_mode():
        raise UserError("push needs the hub, and HF_HUB_OFFLINE is set; unset it")
    if not repository or repository.count("/") > 1:
        raise UserError(f"{repository}: is no hub id; give user/name")
    api = HfApi(token=token)
    try:
        made = api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=made.repo_id, folder_path=folder, commit_message=message, ignore_patterns=LEFT_HERE
        )
    except UserError:
        raise
    except Exception as error:
        raise _explain(folder, repository, error) from None
    here = (path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())
    files = sum(1 for _ in filter_repo_objects(here, ignore_patterns=LEFT_HERE))
    return {"repository": made.repo_id, "address": str(made), "commit": commit.oid, "files": files}


def check_complete(folder: str) -> None:
    """Whether this is what a conversion or a sparsification leaves when it is done, and undamaged.

    Raises:
        UserError: Naming what is missing or wrong.
    """
    root, again = Path(folder), "give a folder that d2dmoe convert or sparsify has completed"
    if not root.is_dir():
        raise UserError(f"{folder}: no such folder; {again}")
    missing = [name for name in NEEDED if not (root / name).is_file()]
    if missing:
        raise UserError(f"{folder}: has no {missing[0]}; {again}")
    config = hub.read_config(folder)
    if hub.is_converted(config):
        opened = Folder(folder)
        for name in QUICK:
            try:
                CHECKS[name](opened)
            except UserError as error:
                raise UserError(f"{folder}: {str(error).removeprefix(f'--model {folder}: ')}") from None
    elif _sparsified(root):
        hub.check_safetensors(folder)
        if not any(root.glob("*.safetensors")):
            raise UserError(f"{folder}: has no safetensors file; {again}")
    else:
        raise UserError(f"{folder}: was neither converted nor sparsified by d2dmoe; {again}")


def _sparsified(root: Path) -> bool:
    try:
        rows = json.loads((root / "results.json").read_text())["rows"]
        return [row["model"] for row in rows] == ["before", "after"]
    except (ValueError, KeyError, TypeError):
        return False


def _explain(folder: str, repository: str, error: Exception) -> UserError:
    """Which of the usual mishaps this is."""
    for cause in causes(error):
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status in (401, 403):
            return UserError(
                f"{repository}: the hub refuses the upload ({status}); log in with `hf auth login`, or give --token "
                f"one that may write there"
            )
        if isinstance(cause, errors.HFValidationError):
            return UserError(f"{repository}: is no hub id ({first_line(cause)}); give user/name")
        if isinstance(cause, errors.OfflineModeIsEnabled | ConnectionError) or "Connect" in type(cause).__name__:
            return UserError(f"{repository}: the hub cannot be reached; {folder} is complete and can be pushed later")
    return UserError(f"{repository}: the hub did not take the upload ({first_line(error)})")
