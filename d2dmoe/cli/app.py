"""From arguments to an exit code: the parser, the verb, and errors as sentences."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import os
import sys
import warnings
from pathlib import Path

from ..errors import UserError, first_line
from ..version import __version__
from . import bench, convert, env, evaluate, export, listing, push, report, sparsify, verify

VERBS = (convert, sparsify, evaluate, bench, report, verify, push, export, listing, env)


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit code: 0 done, 1 failed, 2 usage."""
    parser = _parser()
    arguments, further = parser.parse_known_args(argv)
    prefix = getattr(arguments, "takes_more", None)  # prefix of the flags that this verb passes on to a library
    if further and (prefix is None or not all(w.startswith(prefix) for w in further if w.startswith("--"))):
        parser.error(f"unrecognized arguments: {' '.join(further)}")
    arguments.further = further
    if not getattr(arguments, "run", None):
        parser.print_help()
        return 2
    _quiet()
    try:
        for name in ("json", "plot"):
            _check_writable("--" + name, getattr(arguments, name, None))
        code = arguments.run(arguments, sys.argv[1:] if argv is None else argv)
        if argv is None:  # this process does nothing more
            _end_launched(code)
        return code
    except UserError as error:
        if arguments.debug:
            raise
        print(f"d2dmoe: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "d2dmoe: interrupted" + "; --resume goes on" * (arguments.run in (convert.run, sparsify.run)),
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:
        return 1
    except Exception as error:
        if arguments.debug:
            raise
        kind, first = type(error).__name__, first_line(error)
        print(f"d2dmoe: {kind if first == kind else f'{kind}: {first}'} (--debug shows where)", file=sys.stderr)
        return 1


def _end_launched(code: int) -> None:
    """End one of several launched processes here, with what is registered for its end.

    Threads of Gloo may still hold tensors. One that lets go of them while Python shuts down aborts the process, and
    then its launcher stops the others.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "torch" in sys.modules:
        from torch import distributed

        if distributed.is_available() and distributed.is_initialized():
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def _check_writable(flag: str, path: str | None) -> None:
    """Check, before any long work, that the figures can be written there.

    Raises:
        UserError: If they cannot.
    """
    if path:
        above = next(p for p in Path(path).absolute().parents if p.exists())
        if Path(path).is_dir() or not above.is_dir() or not os.access(above, os.W_OK):
            raise UserError(f"{flag} {path}: cannot be written; name a file in a folder that can be")


def _quiet() -> None:
    """Silence the notes of libraries, and print our own as plain sentences."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with contextlib.suppress(ImportError):
        import datasets

        datasets.disable_progress_bars()
    warnings.showwarning = lambda message, *_, **__: print(f"d2dmoe: note: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="d2dmoe", description="Turn a trained dense Transformer into a dynamic-k Mixture-of-Experts."
    )
    parser.add_argument("--version", action="version", version=f"d2dmoe {__version__}")
    verbs = parser.add_subparsers(metavar="VERB")
    for module in VERBS:
        sub = verbs.add_parser(
            module.NAME,
            help=module.HELP,
            description=module.HELP,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        sub.set_defaults(run=module.run)
        sub.add_argument("--debug", action="store_true", help="show tracebacks")
        sub.add_argument("--json", metavar="FILE", help="write the figures to this file as well")
        module.add_flags(sub)
    return parser
