"""One operator, several backends. The reference is the definition; others must agree with it."""

from .reference import dynamic_ffn, hidden_activations


def backends() -> list[tuple[str, bool, str]]:
    """`(name, live, why)` of every backend on this machine."""
    return [("reference", True, "plain PyTorch, every device; computes all experts and masks, so it saves no time")]


__all__ = ["backends", "dynamic_ffn", "hidden_activations"]
