"""Turn a trained dense Transformer into a dynamic-k Mixture-of-Experts. Importing this registers the loader."""

from .config import ConvertConfig, D2DMoEConfig, UserError
from .gating import set_gate
from .loader import register
from .merging import merge

__version__ = "0.1.0"
__all__ = ["ConvertConfig", "D2DMoEConfig", "UserError", "__version__", "merge", "set_gate"]

register()
