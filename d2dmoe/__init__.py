"""Turn a trained dense Transformer into a dynamic-k Mixture-of-Experts. Importing this registers the loader."""

from .config import ConvertConfig, D2DMoEConfig, UserError
from .gating import set_gate
from .kernels import dispatching
from .loader import register
from .memory import keep_dense, merge
from .moe.fatrelu import register_fatrelu

__version__ = "0.1.0"
__all__ = [
    "ConvertConfig", "D2DMoEConfig", "UserError", "__version__", "dispatching", "keep_dense", "merge", "set_gate",
]  # fmt: skip

register()
register_fatrelu()
