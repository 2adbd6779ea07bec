"""The command `d2dmoe`: subcommands, messages, exit codes. The only package that prints."""

from .app import main
from .flags import add_fields

__all__ = ["add_fields", "main"]
