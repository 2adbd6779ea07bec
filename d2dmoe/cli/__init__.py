"""The command `d2dmoe`: subcommands, messages, exit codes. Only here is anything printed."""

from .app import main
from .flags import add_fields

__all__ = ["add_fields", "main"]
