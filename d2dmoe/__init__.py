"""Turn a trained dense Transformer into a dynamic-k Mixture-of-Experts. Importing this registers the loader.

The public names are imported when they are used, and the loader together with `transformers`: `import d2dmoe` is light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .late import register_late
from .version import __version__

if TYPE_CHECKING:
    from .config import ConvertConfig, D2DMoEConfig, UserError
    from .kernels import dispatching
    from .moe.gating import set_gate, use_gate
    from .moe.int8_linear import set_linear_dtype
    from .moe.memory import keep_dense, merge, set_expert_dtype
    from .moe.trainable import trainable

__all__ = [
    "ConvertConfig", "D2DMoEConfig", "UserError", "__version__", "dispatching", "keep_dense", "merge",
    "set_expert_dtype", "set_gate", "set_linear_dtype", "trainable", "use_gate",
]  # fmt: skip

_PLACES = {
    "ConvertConfig": ".config", "D2DMoEConfig": ".config", "UserError": ".config", "dispatching": ".kernels",
    "set_gate": ".moe.gating", "use_gate": ".moe.gating", "keep_dense": ".moe.memory", "merge": ".moe.memory",
    "set_expert_dtype": ".moe.memory", "set_linear_dtype": ".moe.int8_linear", "trainable": ".moe.trainable",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """A public name on its first use (PEP 562)."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_PLACES[name], __name__), name)
    return value


def __dir__() -> list[str]:
    """With the names that have not been used yet."""
    return sorted({*globals(), *__all__})


register_late()
