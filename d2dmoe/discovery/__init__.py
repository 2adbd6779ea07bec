"""Find the feed-forward blocks of any model by running it once."""

from .blocks import Discovery, discover
from .inputs import NoInputsError, dummy_inputs, model_inputs, on_small_inputs
from .skeleton import skeleton
from .trace import runs_on

__all__ = [
    "Discovery", "NoInputsError", "discover", "dummy_inputs", "model_inputs", "on_small_inputs", "runs_on", "skeleton",
]  # fmt: skip
