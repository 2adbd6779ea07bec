"""Find the feed-forward blocks of any model by running it once."""

from .blocks import Discovery, discover
from .inputs import dummy_inputs
from .skeleton import skeleton
from .trace import runs_on

__all__ = ["Discovery", "discover", "dummy_inputs", "runs_on", "skeleton"]
