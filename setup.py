"""Builds the CPU kernels beside the package where a C++ compiler is at hand; without one the package installs as well.

Everything else is in pyproject.toml. `D2DMOE_NATIVE=0` skips the kernels, `=1` makes a failed build fail the
installation; `CXX` and `D2DMOE_CXXFLAGS` are obeyed.
"""

import os
import platform
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("d2dmoe", "kernels", "cpu")
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mprefer-vector-width=512"]
FLAGS = {
    "isa_avx2": ["-mavx2", "-mfma"],
    "isa_avx512": AVX512,
    "isa_vnni": [*AVX512, "-mavx512vnni"],
    "isa_avx512bf16": [*AVX512, "-mavx512bf16"],
    "isa_amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
    "isa_amxint8": [*AVX512, "-mavx512vnni", "-mamx-tile", "-mamx-int8"],
}
# GCC has them from 8, 10 and 11 on; done without where it does not
LATE = ("isa_vnni", "isa_avx512bf16", "isa_amx", "isa_amxint8")
COMMON = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-pthread"]


class BuildNative(build_ext):
    """One shared library with a C interface, each instruction set compiled with its own flags."""

    def get_ext_filename(self, fullname: str) -> str:
        """The same name whatever the Python: the library knows nothing of it."""
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Compile and link; say why not and go on if that fails."""
        wanted = os.environ.get("D2DMOE_NATIVE", "")
        if wanted == "0":
            return
        target = Path(self.get_ext_fullpath(ext.name))
        try:
            compile_native(target)
        except (OSError, subprocess.CalledProcessError) as error:
            if wanted == "1":
                raise
            reason = getattr(error, "stderr", None) or error
            print(f"d2dmoe: the CPU kernels were not built, installing without them: {reason}", file=sys.stderr)

    def get_outputs(self) -> list[str]:
        """Only what was really built."""
        return [name for name in super().get_outputs() if Path(name).exists()]


def compile_native(target: Path) -> None:
    """Compile every source that suits this processor family, and link them to `target`."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    extra = shlex.split(os.environ.get("D2DMOE_CXXFLAGS", ""))
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    with tempfile.TemporaryDirectory() as scratch:
        known = [isa for isa in FLAGS if x86 and _understands(compiler, FLAGS[isa], Path(scratch))]
        sources = [s for s in sorted(SOURCES.glob("*.cpp")) if s.stem in known or s.stem not in FLAGS]
        extra += [f"-DD2DMOE_NO_{isa.removeprefix('isa_').upper()}" for isa in LATE if isa not in known]

        def compile_one(source: Path) -> str:
            out = str(Path(scratch, source.stem + ".o"))
            _run([*compiler, *COMMON, *FLAGS.get(source.stem, []), *extra, "-c", str(source), "-o", out])
            return out

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, sources))
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".partial")
        _run([*compiler, "-shared", "-pthread", *extra, *objects, "-o", str(partial)])
        os.replace(partial, target)


def _understands(compiler: list[str], flags: list[str], scratch: Path) -> bool:
    """Whether this compiler is new enough for an instruction set."""
    probe = scratch / "probe.cpp"
    probe.write_text("")
    command = [*compiler, *flags, "-c", str(probe), "-o", os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


setup(
    ext_modules=[Extension("d2dmoe.kernels.cpu.libd2dmoe", sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative},
)
