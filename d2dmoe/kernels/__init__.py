"""One operator, several backends. The reference is the definition; others must agree with it."""

from .reference import dynamic_ffn, hidden_activations

__all__ = ["dynamic_ffn", "hidden_activations"]
