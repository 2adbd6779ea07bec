"""One operator, several backends. The reference is the definition; others must agree with it."""

from .backends import backends, chosen, use_backend
from .cpu import native
from .cpu.native import Plan, Tiles, identity
from .dispatch import automatic, bucket, dispatching, fastest
from .operator import TENSORS, activation_name
from .reference import down_product, hidden_activations

__all__ = [
    "TENSORS", "Plan", "Tiles", "activation_name", "automatic", "backends", "bucket", "chosen", "dispatching",
    "down_product", "fastest", "hidden_activations", "identity", "native", "use_backend",
]  # fmt: skip
