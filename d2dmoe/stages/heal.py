"""Distillation from the dense model with the gate in the loop: what stands in for skipped experts learns from the
model's own outputs what a closed-form fit of each layer by itself cannot know.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from ..config.options import HealConfig, TrainingConfig
from ..config.record import D2DMoEConfig
from ..data.batches import Batches
from ..kernels import dispatching
from ..measure.observe import TOKENS_AT_ONCE, model_inputs
from ..moe.gating import set_gate
from ..moe.layer import layers
from ..moe.projection import projections
from ..tensors import PROJECTED
from ..training import train
from .rates import chosen_rate

LOGITS_AT_ONCE = 2**24  # elements per forward pass with gradients, 64 MB in fp32
ROUTERS = 0.01  # of the learning rate: a gate changes its mind by jumps, and its gradient holds for small steps only
BASES = 0.1  # of that of stand-ins, where no higher one is found to be better: not every model bears more
RATES = {"stand-ins": 1e-3, "routers": 1e-3, "all": 5e-5}  # what trains, and the learning rate unless another is given
LEAST = 0.01  # of the largest divergence of a budget: what a smaller one counts as, where they are made relative
CHECKED = 4096  # tokens, a tenth at most, that healing does not see: by them it is judged
ELEMENTS = 2**18  # logits compared at a time, 1 MB in fp32: they stay in the processor's cache


def divergence(output: Any, reference: Any, mask: torch.Tensor | None = None) -> torch.Tensor:
    """How far a forward pass is from the dense model's, padding left out.

    Models with logits: `KL(dense || converted)` in nats, mean over positions (or examples). Others: squared error of
    the last hidden state over its variance, which for small errors is twice one minus the cosine.

    Args:
        output, reference: What the two forward passes returned.
        mask: `attention_mask` ``(batch, length)``, used where the output has those positions.
    """
    if "logits" in output:
        ours, dense = (o["logits"].float().log_softmax(-1) for o in (output, reference))
        each = (dense.exp() * (dense - ours)).sum(-1)
    else:
        ours, dense = (_hidden(o).float() for o in (output, reference))
        each = (ours - dense).square().sum(-1) / dense.square().sum(-1).clamp_min(1e-12)
    if mask is not None and mask.shape == each.shape:
        kept = mask.to(each)
        return (each * kept).sum() / kept.sum().clamp_min(1)
    return each.mean()


class Reference:
    """What the dense model gives for one batch, in the form in which many other outputs are compared with it.

    Where a whole sequence or image has one row of logits, outputs are compared by the variance over the classes of
    their difference. Classifiers are sure of most of the text that they were trained on, so that a few sentences make
    up nearly all of their KL, and a mean over hundreds of them says little about others.

    Args:
        output: What its forward pass returned.
        mask: As for `divergence`.

    Attributes:
        outputs: How many rows are compared: positions without padding, or sequences.
    """

    def __init__(self, output: Any, mask: torch.Tensor | None = None):
        self.output, self.mask, self._logits = output, mask, None
        rows = output["logits"] if "logits" in output else _hidden(output)
        self.outputs = int(mask.sum()) if mask is not None and mask.shape == rows.shape[:-1] else rows[..., 0].numel()
        self._centred = "logits" in output and rows.dim() == 2 and rows.shape[-1] > 1
        if "logits" in output and not output["logits"].requires_grad:
            logs = output["logits"].float().log_softmax(-1)
            self._logits = (logs, logs.exp())

    def divergence(self, output: Any) -> float:
        """`divergence` of an output from this one, without gradients, or the centred squared difference."""
        if self._centred:
            difference = output["logits"].float() - self.output["logits"].float()
            return float(difference.var(-1, correction=0).mean())
        if self._logits is None:
            return float(divergence(output, self.output, self.mask))
        logits, width = output["logits"], output["logits"].shape[-1]
        rows = [t.reshape(-1, width).split(max(1, ELEMENTS // width)) for t in (logits, *self._logits)]
        each = torch.cat([_kl(*parts) for parts in zip(*rows, strict=True)]).view(logits.shape[:-1])
        if self.mask is not None and self.mask.shape == each.shape:
            kept = self.mask.to(each)
            return float((each * kept).sum() / kept.sum().clamp_min(1))
        return float(each.mean())


def _kl(logits: torch.Tensor, logs: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """KL of rows of logits from rows of logarithms of probabilities, and of these probabilities."""
    ours = logits.float().log_softmax(-1)
    return torch.sub(logs, ours, out=ours).mul_(shares).sum(-1)


def _hidden(output: Any) -> torch.Tensor:
    return next(v for v in output.values() if isinstance(v, torch.Tensor) and v.is_floating_point())


@dispatching("sparse")
def heal(
    model: nn.Module,
    batches: Batches,
    config: HealConfig,
    stored: D2DMoEConfig,
    *,
    state_dir: Path | None = None,
    resume: bool = False,
    teacher: nn.Module | None = None,
) -> list[dict[str, float]]:
    """Distil the dense model into the converted one at its stored budgets, taking turns.

    Budgets count alike: the loss of each is its divergence from the dense model relative to that at the start. If the
    mean of these is not below 1 in the end, on text that it was not trained on, or if training fails, everything is as
    before.

    Args:
        model: Converted and calibrated model.
        batches: Calibration batches.
        config: Steps, sizes and seed.
        stored: The model's own record; its budgets are what is trained.
        state_dir: Where resumable states go.
        resume: Continue from there.
        teacher: The dense model, where the converted one does not hold it; by default that one with everything on.

    Returns:
        The training log. Its last row has the mean `divergence` over the budgets `before` and `after` healing, on the
        text that was kept from it, and as `relative` the mean of the quotients of each budget; a healing with less
        than 1 was kept. Where there are bases of projections, it has their peak rate as `bases_learning_rate`: a tenth
        of that in the config (all of it where every weight is trained) or, where this has none and there are enough
        steps, the one that does best on that text after a few. Budgets at which nothing learns, because all of it runs,
        are left out of the turns; if that is so at all of them, the log has the divergences only.
    """
    checked, part = batches, min(CHECKED, batches.tokens // 10)
    if part:
        checked, batches = batches.last(part), batches.first(batches.tokens - part)
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", 1) if "input_ids" in batches[0] else 1
    at_once = min(LOGITS_AT_ONCE // vocabulary, TOKENS_AT_ONCE)  # more tokens only leave the processor's caches
    parts = Parts(batches, config.heal_tokens, at_once, config.seed)
    student = Student(model, stored, config.heal_parameters, teacher)
    start, end = student.distances(checked), torch.tensor(torch.nan)
    student.scales = start.clamp_min(LEAST * start.max()).clamp_min(1e-12)
    with training_only(model, config.heal_parameters):
        training = Training(student, parts, checked, config)
        student.turns = student.budgets_that_learn(batches[0])
        log: list[dict[str, float]] = [{}]
        try:
            if student.turns:
                for_bases = training.rate_for_bases(state_dir, resume)
                log = training.train(config.heal, for_bases, name="heal", state_dir=state_dir, resume=resume)
                log[-1] |= {"bases_learning_rate": for_bases} if training.has_bases else {}
            end = student.distances(checked)
        finally:
            relative = float((end / student.scales).mean())
            if not relative < 1:
                training.put_back()
    log[-1] |= {"before": float(start.mean()), "after": float(end.mean()), "relative": relative}
    return log


class Training:
    """Trains what requires gradients in a student, and can put it back.

    Attributes:
        has_bases: Are there bases of projections among it?
    """

    def __init__(self, student: Student, parts: Parts, checked: Batches, config: HealConfig):
        self.student, self.parts, self.checked, self.config = student, parts, checked, config
        trained = ((name, p) for name, p in student.model.named_parameters() if p.requires_grad)
        self._before = {name: p.detach().clone() for name, p in trained}
        self.has_bases = any(name.endswith(PROJECTED) for name in self._before)
        self._rate = config.heal_learning_rate or RATES[config.heal_parameters]

    def put_back(self) -> None:
        """Everything as it was when this was made."""
        for name, value in self._before.items():
            self.student.model.get_parameter(name).data.copy_(value)

    def train(self, steps: int, for_bases: float, **options: Any) -> list[dict[str, float]]:
        """The log of a training with this peak learning rate for bases; `options` are those of `training.train`."""
        settings = TrainingConfig(
            steps=steps, learning_rate=self._rate, adam_betas=(0.9, 0.99), accumulation=self.parts.per_step,
            seed=self.config.seed, save_every=100,
        )  # fmt: skip
        return train(
            self.student, self.parts, lambda student, batch: student(batch), settings, placed=True, in_turn=True,
            rates=lambda name: rate_of(name, for_bases / self._rate), **options,
        )  # fmt: skip

    def rate_for_bases(self, state_dir: Path | None, resume: bool) -> float:
        """Their peak learning rate: the usual one if the config has a rate, otherwise one that is tried."""
        usual = self._rate * (1 if self.config.heal_parameters == "all" else BASES)
        if self.config.heal_learning_rate or not self.has_bases:
            return usual
        return chosen_rate(self._try, usual, self.config.heal, state_dir, resume)

    def _try(self, steps: int, for_bases: float) -> float:
        try:
            self.train(steps, for_bases, name=f"heal, {steps} steps with {for_bases:.1e} for bases")
            return float((self.student.distances(self.checked) / self.student.scales).mean())
        finally:
            self.put_back()


def rate_of(name: str, for_bases: float) -> float:
    """What the learning rate of a parameter is multiplied by."""
    return ROUTERS if ".router." in name else for_bases if name.endswith(PROJECTED) else 1.0


class Student(nn.Module):
    """The converted model as a module whose forward pass is the distillation loss. Dropout stays off.

    Attributes:
        scales: What the divergence of each budget is relative to.
        turns: Numbers of the budgets that take turns.
    """

    def __init__(self, model: nn.Module, stored: D2DMoEConfig, what: str, teacher: nn.Module | None = None):
        super().__init__()
        self.model, self.stored, self.through_gate = model, stored, what != "stand-ins"
        self.scales, self.turns = torch.ones(len(stored.budgets)), [*range(len(stored.budgets))]
        self._everything_on = teacher is None
        if teacher is None:
            teacher = copy.deepcopy(model).eval() if what == "all" else model
        self._teacher = [teacher]  # in a list: not a part of this

    def train(self, mode: bool = True) -> Student:
        """Stays in evaluation mode: the dense model is to be met as it is used."""
        self.model.eval()
        return self

    @torch.no_grad()
    def distances(self, batches: Batches) -> torch.Tensor:
        """Mean divergence of each budget ``(budgets,)``."""
        found = [[float(self.divergence(batch, n)) for batch in batches] for n in range(len(self.stored.budgets))]
        return torch.tensor(found).mean(1)

    @torch.enable_grad()
    def budgets_that_learn(self, batch: dict[str, Any]) -> list[int]:
        """Numbers of the budgets at which a parameter has a gradient."""
        return [n for n in range(len(self.stored.budgets)) if self.divergence(batch, n).requires_grad]

    def forward(self, batch: dict[str, Any]) -> torch.Tensor:
        """Relative divergence from the dense model on a batch of `Parts`, at the budget whose turn it is."""
        budget = self.turns[batch["number"] % len(self.turns)]
        return self.divergence(batch, budget) / float(self.scales[budget])

    def divergence(self, batch: dict[str, Any], budget: int) -> torch.Tensor:
        """From the dense model on a batch."""
        teacher, inputs, mask = self._teacher[0], model_inputs(self.model, batch), batch.get("attention_mask")
        with torch.no_grad(), set_gate(teacher, active=1) if self._everything_on else nullcontext():
            reference = teacher(**inputs)
        with set_gate(self.model, budget=budget), differentiable_gate(self.model, self.through_gate):
            return divergence(self.model(**inputs), reference, None if mask is None else mask.to(self.model.device))


class Parts:
    """Micro-batches by number: the sequences in a new order every epoch, cut so that logits stay small."""

    def __init__(self, batches: Batches, tokens: int, at_once: int, seed: int):
        per_item = max(1, batches.tokens // len(batches.items))
        rows = max(1, tokens // per_item)
        self.per_step = -(-rows // max(1, min(rows, at_once // per_item)))
        self.rows = -(-rows // self.per_step)
        self.batches, self.seed = batches, seed
        self._order: tuple[int, Batches | None] = (-1, None)

    def __call__(self, number: int) -> dict[str, Any]:
        """Micro-batch `number`, and as `number` the optimiser step it belongs to."""
        items = self.batches.items
        per_epoch = max(1, len(items) // self.rows)
        epoch, place = divmod(number, per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, self.batches.shuffled(self.seed + epoch))
        chosen = self._order[1].items[place * self.rows : (place + 1) * self.rows]
        step = number // (self.per_step * PartialState().num_processes)
        return {**self.batches.collate(chosen), "number": step}


@contextmanager
def training_only(model: nn.Module, what: str) -> Iterator[None]:
    """Gradients for stand-ins and the bases of projections, for routers as well, or for all; afterwards as it was."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(what == "all")
    for layer in layers(model):
        for value in layer.stand_ins().values():
            value.requires_grad_(True)
        layer.router.requires_grad_(what != "stand-ins")
    for projection in projections(model):
        for name in projection.ADDED:
            getattr(projection, name).requires_grad_(name != "channel_norms")  # the gate's
    try:
        yield
    finally:
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)


@contextmanager
def differentiable_gate(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Let gradients pass the gate to the routers, see `GateState.soft`; afterwards as it was."""
    before = [(layer, layer.gate_state) for layer in layers(model)]
    for layer, state in before:
        layer.gate_state = replace(state, soft=wanted)
    try:
        yield
    finally:
        for layer, state in before:
            layer.gate_state = state
