"""Options, presets and checks, and the record that a converted checkpoint carries. No torch here."""

from ..errors import UserError
from .budgets import LEAST_ACTIVE, Budget, Budgets, Curve
from .checks import check, check_active, check_tau
from .options import METRIC_NAMES, ConvertConfig, DataConfig, TrainingConfig, knob
from .presets import PRESETS, resolve
from .record import CHECKPOINT_VERSION, Block, D2DMoEConfig, can_split, router_width
from .sizes import DEFAULT_ACTIVE, Target, choose_experts, divisors, ranks, shared_experts, targets

__all__ = [
    "CHECKPOINT_VERSION", "DEFAULT_ACTIVE", "LEAST_ACTIVE", "METRIC_NAMES", "PRESETS", "Block", "Budget", "Budgets",
    "ConvertConfig", "Curve", "D2DMoEConfig", "DataConfig", "Target", "TrainingConfig", "UserError", "can_split",
    "check", "check_active", "check_tau", "choose_experts", "divisors", "knob", "ranks", "resolve", "router_width",
    "shared_experts", "targets",
]  # fmt: skip
