"""Converted models in OpenVINO: each converted layer is one operation of the native library, the rest is OpenVINO's.

`d2dmoe export --openvino` writes them. The package `openvino` is imported when it is needed, and only then.
"""

from .compile import compile_model
from .compiled import CompiledModel
from .extension import extension_library

__all__ = ["CompiledModel", "compile_model", "extension_library"]
