"""Find the feed-forward blocks of any model, and the projections around attention, by running it once."""

from .blocks import Discovery, discover
from .inputs import dummy_inputs
from .projections import find_projections
from .skeleton import skeleton
from .trace import runs_on

__all__ = ["Discovery", "discover", "dummy_inputs", "find_projections", "runs_on", "skeleton"]
