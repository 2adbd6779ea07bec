"""Find the feed-forward blocks of any model, and the projections around attention, by running it once."""

from .blocks import Discovery, discover
from .inputs import NoInputsError, dummy_inputs, model_inputs, on_small_inputs
from .projections import find_projections
from .skeleton import skeleton
from .trace import runs_on

__all__ = [
    "Discovery", "NoInputsError", "discover", "dummy_inputs", "find_projections", "model_inputs", "on_small_inputs",
    "runs_on", "skeleton",
]  # fmt: skip
