"""What a converted checkpoint stores in its `config.json`, and what loading one needs to know. No torch here."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from itertools import compress
from typing import Any

from ..errors import UserError
from .budgets import Budget, Budgets, Curve
from .projections import HEAD, Projection, ProjectionState, check_networks, check_projections
from .validate import compare_checksums, points, refuse, typed, validate


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
        role: Of a network that was distilled in the place of a projection around attention what that does, see
            `Projection`; empty for a feed-forward block.
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
    role: str = ""

    @property
    def size(self) -> int:
        """Neurons of each expert; the last one may hold fewer and be padded with zero neurons in memory."""
        return -(-self.width // self.experts)

    @property
    def slots(self) -> int:
        """Neurons of all experts, padding included."""
        return self.experts * self.size


# The newest that is read: networks for projections came with 2, the head with 3, heads with 4, refits with 5.
CHECKPOINT_VERSION = 5
PROJECTED = ("ffn_active", "methods", "ranks", "channel_thresholds", "candidates")  # fields of a budget
NARROW = ("attention", "heads", "head_rank", "refits", "refit_rank")  # fields of a projection that most have not
CALIBRATED = ("budgets", "default_active", "curve")


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
        budgets: Stored operating points, by rising active fraction. A plain list is taken as well.
        default_active: Budget in force after loading.
        curve: Thresholds at further active fractions, for budgets not stored. A plain list is taken as well.
        min_experts, max_experts: Bounds on the experts per token (0: no upper bound).
        shared_experts: The first so many experts of every block always run.
        neuron_order: Does every block store its neurons' places in the original model, as a tensor `order`?
        projections: The converted linear maps around attention, and the head where it is one of them, last.
    """

    blocks: list[Block] = field(default_factory=list)
    gate: str = "topk"
    stand_in: str = "zero"
    delta_rank: int = 0
    linear_rank: int = 0
    router_width: int = 0
    router_target: str = "norm"
    budgets: Budgets = field(default_factory=Budgets)
    default_active: float = 1.0
    curve: Curve = field(default_factory=Curve)
    min_experts: int = 0
    max_experts: int = 0
    shared_experts: int = 0
    neuron_order: bool = False
    projections: list[Projection] = field(default_factory=list)
    version: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.budgets, Budgets):
            self.budgets = Budgets([b if isinstance(b, Budget) else Budget(**_known(Budget, b)) for b in self.budgets])
        if not isinstance(self.curve, Curve):
            self.curve = Curve(list(self.curve))

    @property
    def networks(self) -> list[Block]:
        """The blocks that stand in the places of projections: with any, the checkpoint holds no dense model."""
        return [block for block in self.blocks if block.role]

    @property
    def block_curve(self) -> Curve:
        """Thresholds against the active fraction of each block: known for the gate `topk`, else calibrated."""
        if self.gate == "topk":
            return Curve.of_ranks([block.experts for block in self.blocks], self.shared_experts)
        return self.curve

    def equal_thresholds(self, active: float) -> list[float]:
        """Thresholds that give every block the same active fraction.

        Raises:
            UserError: If the checkpoint holds no calibration curve, or none that goes so low.
        """
        curve = self.block_curve
        if not curve:
            raise UserError(f"active={active:g}: this checkpoint holds no calibration; give tau=… instead")
        least = curve[0][0]
        if active < least:
            raise UserError(f"active={active:g}: the {self.gate} gate is calibrated from {least:g} on; give tau=…")
        return curve.thresholds(active)

    def thresholds(self, active: float) -> list[float]:
        """Threshold of each block for an active fraction of the model, see `Budgets.thresholds`.

        Raises:
            UserError: If the fraction is below the budgets and the calibration curve.
        """
        if not self.budgets or active < min(self.budgets.actives):
            equal = self.equal_thresholds(active)
            return self.budgets.thresholds(active, self.block_curve) if self.budgets else equal
        return self.budgets.thresholds(active, self.block_curve)

    def projection_states(self, number: int | None) -> list[ProjectionState]:
        """What each projection does at a stored budget, with its refit for that; `None`: all are dense."""
        if number is None:
            return [ProjectionState()] * len(self.projections)
        states = zip(self.budgets[number].projection_states, self.projections, strict=True)
        return [replace(s, refit=number) if p.refits and s.method != "dense" else s for s, p in states]

    def keep_blocks(self, keep: list[bool]) -> None:
        """Drop the record of the blocks for which `keep` is false."""
        self.blocks = list(compress(self.blocks, keep))
        self.budgets.keep_blocks(keep)
        self.curve.keep_blocks(keep)

    def keep_projections(self, keep: list[bool]) -> None:
        """Drop the record of the projections for which `keep` is false."""
        self.projections = list(compress(self.projections, keep))
        for budget in self.budgets:
            budget.keep_projections(keep)

    def calibration(self) -> dict[str, Any]:
        """Budgets, default and curve as plain JSON values."""
        return {key: value for key, value in self.to_dict().items() if key in CALIBRATED}

    def take_calibration(self, values: dict[str, Any]) -> None:
        """Replace budgets, default and curve by those of a `calibration()`."""
        other = D2DMoEConfig(**{key: values[key] for key in CALIBRATED})
        self.budgets, self.curve, self.default_active = other.budgets, other.curve, other.default_active

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = asdict(self)
        budgets, projections = values["budgets"]["stored"], values.pop("projections")
        if not projections:  # as releases wrote it that knew none: their checksums stay true
            budgets = [{k: v for k, v in budget.items() if k not in PROJECTED} for budget in budgets]
        budgets = [{k: v for k, v in budget.items() if k != "candidates" or v} for budget in budgets]
        blocks = [{k: v for k, v in block.items() if k != "role" or v} for block in values["blocks"]]
        found = {**values, "blocks": blocks, "budgets": budgets, "curve": values["curve"]["points"]}
        projections = [{k: v for k, v in p.items() if k not in NARROW or v} for p in projections]
        found["version"] = self._version()
        return {**found, "projections": projections} if projections else found

    def _version(self) -> int:
        """The oldest format that holds all of this."""
        if any(p.refits for p in self.projections):
            return 5
        if any(p.heads for p in self.projections):
            return 4
        return 3 if any(p.role == HEAD for p in self.projections) else 2 if self.networks else 1

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> D2DMoEConfig:
        """Read the stored form, which is checked: it may have been damaged or edited.

        Raises:
            UserError: Naming the field that is wrong and its value, or if a newer version of this project wrote it.
        """
        version = values.get("version", 1)
        if type(version) is not int or version < 1:
            refuse("version", version, f"an integer from 1 to {CHECKPOINT_VERSION}")
        if version > CHECKPOINT_VERSION:
            raise UserError(
                f"this checkpoint has d2dmoe format version {version}, and this d2dmoe reads up to version "
                f"{CHECKPOINT_VERSION}; install a newer d2dmoe-toolkit"
            )
        known = typed(cls, values, "")
        known["blocks"] = _each(Block, known.get("blocks", []), "blocks")
        known["budgets"] = Budgets(_each(Budget, known.get("budgets", []), "budgets"))
        known["curve"] = Curve(points(known.get("curve", [])))
        known["projections"] = _each(Projection, known.get("projections", []), "projections")
        config = cls(**known)
        validate(config)
        check_networks(config.blocks)
        check_projections(config.projections, config.budgets)
        if "checksums" in values:
            compare_checksums(values["checksums"], config.to_dict(), shown=values.get)
        return config


def _each(kind: type, values: Any, where: str) -> list[Any]:
    """Stored dataclasses of one kind."""
    if not isinstance(values, list):
        refuse(where, values, "a list")
    return [v if isinstance(v, kind) else kind(**typed(kind, v, f"{where}[{n}]")) for n, v in enumerate(values)]


def _known(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    """Without keys that a later release added under the same format version: they are of no consequence here."""
    names = {f.name for f in fields(kind)}
    return {key: value for key, value in values.items() if key in names}


def router_width(wanted: int, block: Block) -> int:
    """Hidden width of a block's router: the paper's 128, but in a narrow model no more than half its width.

    In the place of a projection no more than a quarter of the network's width: else it takes what experts save.
    """
    most = min(block.d_model // 2, block.width // 4) if block.role else block.d_model // 2
    return wanted or max(1, min(128, most))


def can_split(width: int, experts: int) -> bool:
    """Whether so many experts of `ceil(width / experts)` neurons are all needed; the last may be partly padding."""
    return 1 <= experts <= width and (experts - 1) * -(-width // experts) < width
