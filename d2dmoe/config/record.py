"""What a converted checkpoint stores in its `config.json`, and what loading one needs to know. No torch here."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ..errors import UserError


@dataclass
class Block:
    """One feed-forward block: where its parts are in the dense model, and where its experts are mounted.

    Attributes:
        name: Module path that holds the experts after conversion.
        kind: `ffn` (`down(act(up(x)))`) or `glu` (`down(act(gate(x)) * up(x))`).
        activation: Name in `transformers.activations.ACT2FN`; variants of one function share a name.
        d_model: Width of input and output.
        width: Hidden neurons.
        up, gate, down: Paths of the linear maps; `gate` is `None` for a plain FFN and equals `up` for a fused one.
        fused: Order of the halves of a fused projection, `gate_up` or `up_gate`; empty when separate.
        activation_module: Path of the module that computes the activation, if one does.
        passed_through: Modules that become identities because the experts at `name` do their work as well.
        calls: How often the block runs in one forward pass (above 1 where layers share weights).
        experts: Number of experts; 0 until decided.
        layouts: How the dense `up` (and `gate`) and `down` weights lie in memory, for packing them on load.
    """

    name: str
    kind: str
    activation: str
    d_model: int
    width: int
    up: str
    gate: str | None
    down: str
    fused: str = ""
    activation_module: str | None = None
    passed_through: list[str] = field(default_factory=list)
    calls: int = 1
    experts: int = 0
    layouts: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Neurons of each expert; the last one may hold fewer and be padded with zero neurons in memory."""
        return -(-self.width // self.experts)

    @property
    def slots(self) -> int:
        """Neurons of all experts, padding included."""
        return self.experts * self.size


@dataclass
class Budget:
    """One stored operating point.

    Attributes:
        active: Active fraction asked for, or found for the objective.
        taus: Threshold of each block.
        measured: Active fraction on the calibration tokens.
        stand_ins: Kind of stand-in chosen for each block, where they are fitted by regression.
        residuals: Share of what skipping loses that is still lost with it, on held-out calibration tokens.
        objective: What was asked for where that is not the active fraction, for instance `max-loss=0.01`.
        achieved: The objective's figure on held-out calibration tokens.
    """

    active: float
    taus: list[float]
    measured: float = 0.0
    stand_ins: list[str] = field(default_factory=list)
    residuals: list[float] = field(default_factory=list)
    objective: str = ""
    achieved: float = 0.0


CHECKPOINT_VERSION = 1
LEAST_ACTIVE = 0.01  # where calibration curves begin


@dataclass
class D2DMoEConfig:
    """What a converted checkpoint stores under `quantization_config` in its `config.json`.

    Attributes:
        blocks: The converted blocks, in the order in which the model runs them.
        gate: Name of the gate.
        stand_in: What replaces skipped experts, a key of `STAND_INS`.
        delta_rank, linear_rank: Ranks of the stored change of the down projection and of the linear term.
        router_width: Hidden width of the routers, see `router_width()`.
        router_target: What their scores stand for.
        budgets: Stored operating points, by rising active fraction.
        default_active: Budget in force after loading.
        curve: Thresholds at further active fractions, `[[active, [tau per block]], …]`, for budgets not stored.
        min_experts, max_experts: Bounds on the experts per token (0: no upper bound).
        shared_experts: The first so many experts of every block always run.
    """

    blocks: list[Block] = field(default_factory=list)
    gate: str = "topk"
    stand_in: str = "zero"
    delta_rank: int = 0
    linear_rank: int = 0
    router_width: int = 0
    router_target: str = "norm"
    budgets: list[Budget] = field(default_factory=list)
    default_active: float = 1.0
    curve: list[list[Any]] = field(default_factory=list)
    min_experts: int = 0
    max_experts: int = 0
    shared_experts: int = 0
    version: int = CHECKPOINT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> D2DMoEConfig:
        """Read the stored form.

        Raises:
            UserError: If a newer version of this project wrote it.
        """
        version = values.get("version", CHECKPOINT_VERSION)
        if version > CHECKPOINT_VERSION:
            raise UserError(
                f"this checkpoint has d2dmoe format version {version}, and this d2dmoe reads up to version "
                f"{CHECKPOINT_VERSION}; install a newer d2dmoe-toolkit"
            )
        values = _known(cls, values)
        values["blocks"] = [b if isinstance(b, Block) else Block(**_known(Block, b)) for b in values.get("blocks", [])]
        values["budgets"] = [
            b if isinstance(b, Budget) else Budget(**_known(Budget, b)) for b in values.get("budgets", [])
        ]
        return cls(**values)


def _known(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    """Without keys that a later release added under the same format version: they are of no consequence here."""
    names = {f.name for f in fields(kind)}
    return {key: value for key, value in values.items() if key in names}


def router_width(wanted: int, block: Block) -> int:
    """Hidden width of a block's router: the paper's 128, but in a narrow model no more than half its width."""
    return wanted or max(1, min(128, block.d_model // 2))


def can_split(width: int, experts: int) -> bool:
    """Whether so many experts of `ceil(width / experts)` neurons are all needed; the last may be partly padding."""
    return 1 <= experts <= width and (experts - 1) * -(-width // experts) < width
