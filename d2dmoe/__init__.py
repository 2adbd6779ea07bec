"""Turn a trained dense Transformer into a dynamic-k Mixture-of-Experts. Importing this registers the loader."""

from .config import ConvertConfig, D2DMoEConfig, UserError
from .kernels import dispatching
from .moe.fatrelu import register_fatrelu
from .moe.gating import set_gate
from .moe.loader import register
from .moe.memory import keep_dense, merge
from .version import __version__

__all__ = [
    "ConvertConfig", "D2DMoEConfig", "UserError", "__version__", "dispatching", "keep_dense", "merge", "set_gate",
]  # fmt: skip

register()
register_fatrelu()
