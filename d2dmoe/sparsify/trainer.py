"""The regulariser in a `transformers.Trainer`: as a class of ours, or added to a Trainer that somebody already has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from ..discovery.blocks import discover
from ..discovery.skeleton import skeleton
from ..errors import UserError
from ..measure.observe import model_inputs
from ..stages.heal import divergence
from .masks import IGNORED, decoder_prefix, token_counts, token_masks
from .options import SparsityConfig, check_sparsity
from .schedules import SCHEDULES
from .terms import SparsityTerm

SIDES = {"main": 0, "decoder": 1}  # places in what `token_counts` returns
FIGURES = ("task_loss", "sparsity_loss", "distillation_loss")


def add_sparsity(
    trainer: Trainer,
    config: SparsityConfig | None = None,
    *,
    teacher: nn.Module | None = None,
    distillation: float = 1.0,
    task: bool = True,
    **options: Any,
) -> SparsityCallback:
    """Add a sparsity regulariser to any `Trainer`, before `train()`.

        trainer = Trainer(model, args, train_dataset=…)
        add_sparsity(trainer, regulariser="hoyer", alpha=1e-3)
        trainer.train()

    Works on subclasses as well (`Seq2SeqTrainer`, trl's trainers), on DDP and FSDP, and with gradient accumulation: the
    penalty is a mean over all tokens of an optimiser step, on all processes. Logs gain `task_loss`, `sparsity_loss`,
    `alpha`, `nonzero` and `near_zero` (shares of the hidden activations), `loss` stays what is minimised.

    Args:
        trainer: Its model has feed-forward blocks that `discover` finds.
        config: Regulariser, α and schedule; `options` are its fields, given by name.
        teacher: Model to stay close to.
        distillation: Weight of the distance from the teacher.
        task: Whether the trainer's own loss counts at all; without it a teacher is needed, and no labels are.

    Raises:
        UserError: If the model has no such block, is converted already, or an option has no such value.
    """
    config = config or SparsityConfig(**options)
    check_sparsity(config)
    if not task and teacher is None:
        raise UserError("without the task's own loss there has to be a teacher to stay close to")
    callback = SparsityCallback(trainer, config, teacher, distillation if teacher is not None else 0.0, task)
    trainer.add_callback(callback)
    return callback


class SparsifyTrainer(Trainer):
    """A `Trainer` whose loss has a sparsity regulariser.

    Args:
        *args: Of `Trainer`.
        sparsity: Regulariser, α and schedule.
        teacher: Model to stay close to; its distance is weighted by `distillation`.
        distillation: That weight.
        task: Whether the model's own loss (or `compute_loss_func`) counts at all.
        **kwargs: Of `Trainer`.

    Raises:
        UserError: As `add_sparsity`.
    """

    def __init__(
        self,
        *args: Any,
        sparsity: SparsityConfig | None = None,
        teacher: nn.Module | None = None,
        distillation: float = 1.0,
        task: bool = True,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.sparsity = add_sparsity(self, sparsity, teacher=teacher, distillation=distillation, task=task)


def bare(model: nn.Module) -> nn.Module:
    """The model under its adapters, whose module paths are those of the model before it got them."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class SparsityCallback(TrainerCallback):
    """What `add_sparsity` puts around a trainer's loss, batches and logs. Made by that function."""

    def __init__(
        self, trainer: Trainer, config: SparsityConfig, teacher: nn.Module | None, distillation: float, task: bool
    ):
        model = bare(trainer.model)
        if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
            raise UserError("the model is converted or quantised; sparsify comes before that, on the dense model")
        plain = not hasattr(model, "config")
        found = discover(model) if plain else discover(skeleton(type(model), model.config))
        if not found.blocks:
            raise UserError(f"no feed-forward block found in {type(model).__name__}, so there is nothing to sparsify")
        self.trainer, self.config, self.teacher = trainer, config, teacher
        self.distillation, self.task = distillation, task
        self.term = SparsityTerm(model, found.blocks, config)
        self._ignores: bool | None = None
        self._total: torch.Tensor | None = None  # tokens of the optimiser step at hand
        self._sums = dict.fromkeys(FIGURES, 0.0)
        self._steps = 0
        self._loss, self._batches, self._log = trainer.compute_loss, trainer.get_batch_samples, trainer.log
        trainer.compute_loss, trainer.get_batch_samples = self.compute_loss, self.get_batch_samples
        trainer.log = self.log

    @property
    def alpha(self) -> float:
        """Weight of the regulariser in the step at hand."""
        done = self.trainer.state.global_step / max(self.trainer.state.max_steps, 1)
        return self.config.alpha * SCHEDULES[self.config.alpha_schedule](done)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, *args: Any) -> Any:
        """The trainer's own, and the tokens in them on all processes; none once the last step is done."""
        if self._finished():
            return [], None
        samples, *rest = self._batches(epoch_iterator, num_batches, *args)
        self._total = None
        if samples and all(isinstance(batch, Mapping) for batch in samples):
            counts = torch.stack([self._counts(batch) for batch in samples]).sum(0).to(self.trainer.args.device)
            if self.trainer.accelerator.num_processes > 1:
                counts = self.trainer.accelerator.reduce(counts, "sum")
            self._total = counts
        return samples, *rest

    @staticmethod
    def _counts(batch: Mapping[str, Any]) -> torch.Tensor:
        """Tokens on both sides, and samples: ``(3,)``."""
        samples = next(len(v) for v in batch.values() if isinstance(v, torch.Tensor) and v.ndim)
        return torch.cat([token_counts(batch), torch.tensor([float(samples)], dtype=torch.float64)])

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The trainer's own loss plus α times the penalty, plus the distance from the teacher."""
        if not model.training:
            return self._loss(model, inputs, return_outputs, **kwargs)
        items = kwargs.get("num_items_in_batch")
        weights, factor = self._weights(inputs), self._factor(items)
        given = dict(inputs)  # a trainer may take its labels out
        wanted = return_outputs or bool(self.distillation)  # not always: some trainers compute them for this alone
        mean_alone = self.task and items is not None and self._ignores_items(model, inputs)
        with self.term.collecting(token_masks(given)) as penalties:
            if mean_alone:
                loss, outputs = self._asked(model, inputs, wanted, **kwargs | {"num_items_in_batch": None})
                loss = loss * self._share_of_items(given["labels"], items)
            elif self.task:
                loss, outputs = self._asked(model, inputs, wanted, **kwargs)
            else:
                outputs = model(**self._fed(given))
                loss = next(iter(outputs.values())).new_zeros((), dtype=torch.float32)
        figures = {"task_loss": loss.detach() / factor}
        if self.config.regulariser != "none":
            penalty = self._mean_penalty(penalties, weights)
            figures["sparsity_loss"] = penalty.detach()
            loss = loss + factor * self.alpha * penalty
        if self.distillation:
            distance = self._distance(model, given, outputs, weights)
            figures["distillation_loss"] = distance.detach()
            loss = loss + factor * self.distillation * distance
        self._keep(figures, loss)
        return (loss, outputs) if return_outputs else loss

    def _asked(
        self, model: nn.Module, inputs: dict[str, Any], outputs: bool, **kwargs: Any
    ) -> tuple[torch.Tensor, Any]:
        """The trainer's own loss, and the model's outputs if they are wanted."""
        return self._loss(model, inputs, True, **kwargs) if outputs else (self._loss(model, inputs, **kwargs), None)

    def _weights(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Share of this batch in the tokens of the optimiser step, times the processes that are averaged: ``(3,)``."""
        processes = self.trainer.accelerator.num_processes
        counts = self._counts(batch).to(self.trainer.args.device)
        steps = getattr(self.trainer, "current_gradient_accumulation_steps", 1)
        total = counts * steps * processes if self._total is None else self._total
        return counts / total.clamp_min(1) * processes

    def _factor(self, items: Any) -> float:
        """What a loss is divided by after `compute_loss`: the accumulation steps, unless it was scaled already."""
        trainer = self.trainer
        scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
        if scaled is None:
            scaled = (trainer.model_accepts_loss_kwargs and items is not None) or trainer.compute_loss_func is not None
        return 1.0 if scaled else float(getattr(trainer, "current_gradient_accumulation_steps", 1))

    @torch.no_grad()
    def _ignores_items(self, model: nn.Module, inputs: Mapping[str, Any]) -> bool:
        """Whether the model takes `num_items_in_batch` and returns the mean over its own batch all the same.

        Many classifiers and masked language models of transformers do; the `Trainer` takes such a mean for a share of
        the accumulated batch, which makes the loss too large by the number of accumulation steps and processes. Found
        once, by asking with two numbers.
        """
        if self.trainer.compute_loss_func is not None or not self.trainer.model_accepts_loss_kwargs:
            return False
        if self._ignores is None:
            model.eval()
            one, two = (model(**inputs, num_items_in_batch=torch.tensor(n))["loss"] for n in (1, 2))
            model.train()
            self._ignores = bool(one == two)
        return self._ignores

    def _share_of_items(self, labels: torch.Tensor, items: Any) -> torch.Tensor:
        """What turns a mean over this batch into its part of the mean over an optimiser step's batches."""
        across = self.trainer.args.average_tokens_across_devices
        return labels.ne(IGNORED).sum() / items * (self.trainer.accelerator.num_processes if across else 1)

    def _mean_penalty(self, penalties: dict[str, list[torch.Tensor]], weights: torch.Tensor) -> torch.Tensor:
        each = [value * weights[SIDES[side]].to(value.dtype) for side, values in penalties.items() for value in values]
        if self.term.blind:
            raise UserError(
                "the hidden activations have no gradient; with gradient checkpointing give "
                'gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
        if not each:
            raise UserError("no feed-forward block ran in this training step; is the model a copy of the trainer's?")
        return torch.stack([value.to(each[0]) for value in each]).mean()

    def _fed(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch as both models get it; labels only where a decoder makes its inputs of them."""
        pair = decoder_prefix(self.term.model) is not None
        return dict(batch) if pair and "labels" in batch else model_inputs(self.term.model, batch)

    def _distance(self, model: nn.Module, batch: dict[str, Any], outputs: Any, weights: torch.Tensor) -> torch.Tensor:
        mask = batch.get("attention_mask")
        with torch.no_grad():
            reference = self.teacher.to(self.trainer.args.device).eval()(**self._fed(batch))
        logits = outputs.get("logits")
        side = 2 if logits is not None and logits.ndim == 2 else 0
        if logits is not None and logits.ndim == 3:
            decoder = token_masks(batch)["decoder"] if decoder_prefix(self.term.model) else None
            mask, side = (decoder, 1) if decoder is not None else (mask, 0)
        distance = divergence(outputs, reference, mask)
        return distance * weights[side].to(distance.dtype)

    def _keep(self, figures: dict[str, torch.Tensor], loss: torch.Tensor) -> None:
        terms = {"task_loss": "task loss", "sparsity_loss": "sparsity penalty", "distillation_loss": "distance"}
        for name, value in [*figures.items(), ("sum", loss.detach())]:
            if not torch.isfinite(value):
                raise UserError(
                    f"step {self.trainer.state.global_step + 1}: the {terms.get(name, 'sum of all terms')} became "
                    f"{float(value)}; lower the learning rate or alpha"
                )
        for name, value in figures.items():
            self._sums[name] = self._sums[name] + value

    def _finished(self) -> bool:
        """Whether the training was resumed after its last step; a `Trainer` would take another one."""
        return self.trainer.state.global_step >= self.trainer.state.max_steps

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop where nothing is left to do."""
        control.should_training_stop = control.should_training_stop or self._finished()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count activations in the steps after which figures are logged."""
        every = args.logging_steps if args.logging_strategy == "steps" else 50
        every = every if every >= 1 else max(1, round(every * state.max_steps))
        self.term.counting = (state.global_step + 1) % every == 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the steps that the sums are of."""
        self._steps += 1

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The trainer's own, with our figures among those of training steps."""
        if "loss" in logs and self._steps:
            logs.update(self._figures())
        self._log(logs, *args, **kwargs)

    def _figures(self) -> dict[str, float]:
        """Means over the steps since the last call, of all processes."""
        device, used = self.trainer.args.device, {"task_loss", *self._used()}
        sums = torch.tensor([float(self._sums[name]) for name in FIGURES], device=device, dtype=torch.float64)
        shares = self.term.shares.to(device, torch.float64).sum(0)
        packed = torch.cat([sums / self._steps, shares])
        if self.trainer.accelerator.num_processes > 1:
            packed = self.trainer.accelerator.reduce(packed, "mean")
        figures = {n: float(v) for n, v in zip(FIGURES, packed[:3], strict=True) if n in used}
        done = max(self.trainer.state.global_step - 1, 0) / max(self.trainer.state.max_steps, 1)
        figures["alpha"] = self.config.alpha * SCHEDULES[self.config.alpha_schedule](done)
        if packed[5]:
            figures |= {"nonzero": float(packed[3] / packed[5]), "near_zero": float(packed[4] / packed[5])}
        self._sums, self._steps = dict.fromkeys(FIGURES, 0.0), 0
        self.term.shares.zero_()
        return figures

    def _used(self) -> list[str]:
        penalised, distilled = self.config.regulariser != "none", bool(self.distillation)
        return ["sparsity_loss"] * penalised + ["distillation_loss"] * distilled


__all__ = ["SparsifyTrainer", "SparsityCallback", "add_sparsity"]
