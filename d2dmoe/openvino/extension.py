"""The library that teaches OpenVINO the operation `DynamicFFN`: compiled once for an installed OpenVINO, then kept."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import UserError, first_line
from ..kernels import decisions, native

SOURCES = (Path(__file__).with_name("operation.cpp"), Path(native.__file__).with_name("layer.h"))
FLAGS = ("-O2", "-shared", "-fPIC", "-std=c++17")
INSTALL = 'pip install "d2dmoe-toolkit[openvino]"'


def check_installed(*names: str) -> None:
    """Check that packages are there, before any long work.

    Args:
        names: Modules beside `openvino`.

    Raises:
        UserError: If one is missing, or our native library is.
    """
    missing = [name for name in ("openvino", *names) if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{' and '.join(missing)} not found; {INSTALL} brings what an export to OpenVINO needs")
    live, why = native.live()
    if not live:
        raise UserError(f"the native library computes the experts in OpenVINO, and it is {why}")


def add_operation(target: Any) -> str:
    """Make `DynamicFFN` known to an `openvino.Core` or a `NodeFactory`: ours in C++, or else the one in Python.

    Returns:
        `c++` or `python`.
    """
    library = extension_library()
    if library is not None:
        target.add_extension(str(library))
        return "c++"
    from .python_operation import DynamicFFN

    target.add_extension(DynamicFFN)
    return "python"


@cache
def extension_library() -> Path | None:
    """The extension for the installed OpenVINO, for `openvino.Core().add_extension`; compiled when first asked for.

    Returns:
        Its path; `None`, with a warning, where it cannot be compiled.

    Raises:
        UserError: If `openvino` or the native library is missing.
    """
    check_installed()
    folder = _folder()
    target = folder / f"openvino-{_key()}.so"
    if target.is_file():
        return target
    try:
        _compile(target)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip() or first_line(error)
        warnings.warn(
            f"no C++ compiler could build the OpenVINO operation ({reason.splitlines()[0]}): layers go through Python, "
            f"which takes longer for each call",
            stacklevel=2,
        )
        return None
    return target


def _folder() -> Path:
    """Where libraries are kept: beside the decisions, or for this process only where none are kept."""
    file = decisions.file()
    try:
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            if os.access(file.parent, os.W_OK):
                return file.parent
    except OSError:  # no home, no right to write
        pass
    return Path(_own_folder().name)


@cache
def _own_folder() -> tempfile.TemporaryDirectory:
    """Goes away with the process."""
    return tempfile.TemporaryDirectory(prefix="d2dmoe-openvino-")


def _key() -> str:
    """Of everything that the library is made from."""
    import openvino

    parts = [openvino.__version__, openvino.__file__, str(native.LIBRARY.resolve()), str(native.ABI), *FLAGS]
    digest = hashlib.sha256("\n".join(parts).encode())
    for source in SOURCES:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _compile(target: Path) -> None:
    """Compile under a temporary name, so that two processes at once both end well."""
    import openvino

    root = Path(openvino.__file__).parent
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        raise FileNotFoundError(f"{compiler[0]} was not found")
    libraries = sorted((root / "libs").glob("libopenvino.*"))
    if not libraries:
        raise FileNotFoundError(f"{root} has no libopenvino")
    handle, scratch = tempfile.mkstemp(dir=target.parent, suffix=".partial")
    os.close(handle)
    try:
        ours = native.LIBRARY.resolve()
        command = [*compiler, *FLAGS, f"-I{root / 'include'}", f"-I{SOURCES[1].parent}", str(SOURCES[0]), str(ours)]
        command += [str(libraries[-1]), *map(str, sorted((root / "libs").glob("libtbb.*"))[-1:])]
        command += [f"-Wl,-rpath,{root / 'libs'}", "-o", scratch]
        subprocess.run(command, check=True, capture_output=True, text=True)
        os.chmod(scratch, 0o644)
        os.replace(scratch, target)
    finally:
        Path(scratch).unlink(missing_ok=True)
