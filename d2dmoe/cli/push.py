"""`d2dmoe push`."""

from __future__ import annotations

import argparse

from .output import emit

NAME = "push"
HELP = "upload a converted or sparsified folder to the Hugging Face hub"


def add_flags(sub: argparse.ArgumentParser) -> None:
    """The verb's own flags."""
    sub.add_argument("folder", metavar="DIR", help="folder that convert or sparsify has written")
    sub.add_argument("repository", metavar="REPO", help="hub id to upload to, user/name; made if it is not there")
    sub.add_argument("--private", action="store_true", help="make a new repository private")
    sub.add_argument("--token", help="hub token with write access (default: HF_TOKEN, or that of `hf auth login`)")
    sub.add_argument("--message", default="Upload by d2dmoe", help="of the commit")


def run(arguments: argparse.Namespace, command: list[str]) -> int:
    """Run the verb; returns the exit code."""
    from ..pipeline.publish import push

    pushed = push(
        arguments.folder, arguments.repository, private=arguments.private, token=arguments.token,
        message=arguments.message,
    )  # fmt: skip
    shown = [word.replace(arguments.token, "…") if arguments.token else word for word in command]
    emit(arguments, shown, 0, [pushed], pushed["address"])
    return 0
