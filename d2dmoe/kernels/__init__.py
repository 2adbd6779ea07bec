"""One operator, several backends. The reference is the definition; others must agree with it."""

from .backends import Backend, backends, chosen, fused_backend, projects, use_backend
from .cpu import native
from .cpu.linear import LinearPlan
from .cpu.native import Plan, StaleWeights, Tiles, Watch, identity
from .cpu.projection import ProjectionPlan
from .dispatch import automatic, bucket, choose_way, dispatching, fastest, forget_ways, way_taken
from .operator import TENSORS, activation_name
from .quads import EXPERT_DTYPES, INPUTS, rounded, rounded_hidden, rounded_rows
from .reference import down_product, hidden_activations

__all__ = [
    "EXPERT_DTYPES", "INPUTS", "TENSORS", "Backend", "LinearPlan", "Plan", "ProjectionPlan", "StaleWeights", "Tiles",
    "Watch", "activation_name", "automatic", "backends", "bucket", "choose_way", "chosen",
    "dispatching", "down_product", "fastest", "forget_ways", "fused_backend", "hidden_activations", "identity",
    "native", "projects", "rounded", "rounded_hidden", "rounded_rows", "use_backend", "way_taken",
]  # fmt: skip
