"""The quality metrics: one class each, fed with one forward pass after another."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from scipy.spatial.distance import pdist
from scipy.stats import spearmanr
from torch.nn.functional import cosine_similarity, cross_entropy, kl_div

from .. import hub
from ..config.options import METRIC_NAMES
from ..errors import UserError
from ..quality import quality_loss as quality_loss  # by this name for those who import it from here
from ..vocabulary import special_tokens

IGNORED = -100
MASKED_SHARE = 0.15
SENTENCES_RANKED = 512  # the rank correlation covers all pairs of these first sentences
Batch = dict[str, torch.Tensor]
Figures = dict[str, float]


class Metric:
    """Quality of one operating point, summed over batches.

    Attributes:
        compares: Whether `add` uses the dense model's result for the same batch.
    """

    compares = True

    @staticmethod
    def prepare(batch: Batch, tokenizer: Any, generator: torch.Generator) -> Batch:
        """The batch for the model, and the targets that `add` scores it by."""
        return batch

    @staticmethod
    def keep(output: Any, batch: Batch) -> torch.Tensor:
        """The part of a forward pass that is scored."""
        return output["logits"].float()

    def add(self, ours: torch.Tensor, dense: torch.Tensor, batch: Batch) -> None:
        """Score one batch: the results of `keep` for this operating point and for the dense model."""
        raise NotImplementedError

    def figures(self) -> Figures:
        """Values by name, the metric's own first."""
        raise NotImplementedError


class Perplexity(Metric):
    """Perplexity of the next token, and the loss in nats per token."""

    name, compares = "perplexity", False

    def __init__(self) -> None:
        self.nats, self.count = 0.0, 0

    @staticmethod
    def prepare(batch: Batch, tokenizer: Any, generator: torch.Generator) -> Batch:
        """Every token but the first is a target, padding left out."""
        targets = torch.full_like(batch["input_ids"], IGNORED)
        targets[:, :-1] = batch["input_ids"][:, 1:]
        if "attention_mask" in batch:
            targets[:, :-1][batch["attention_mask"][:, 1:] == 0] = IGNORED
        return {**batch, "targets": targets}

    def add(self, ours: torch.Tensor, dense: torch.Tensor, batch: Batch) -> None:
        """Logits ``(batch, length, vocabulary)`` against targets ``(batch, length)``."""
        targets = batch["targets"].to(ours.device)
        loss = cross_entropy(ours.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        self.nats, self.count = self.nats + loss.item(), self.count + int((targets != IGNORED).sum())

    def figures(self) -> Figures:
        """Perplexity and loss."""
        loss = self.nats / max(self.count, 1)
        return {self.name: math.exp(loss), "loss": loss}


class MaskedLM(Perplexity):
    """Perplexity of masked tokens: 15 % of those that are not special, each replaced by the mask token."""

    name = "masked_lm"

    @staticmethod
    def prepare(batch: Batch, tokenizer: Any, generator: torch.Generator) -> Batch:
        """Mask the same tokens for the same seed, whatever the model."""
        ids = batch["input_ids"]
        usual = ~torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
        if "attention_mask" in batch:
            usual &= batch["attention_mask"].bool()
        chosen = usual & (torch.rand(ids.shape, generator=generator) < MASKED_SHARE)
        masked = ids.masked_fill(chosen, tokenizer.mask_token_id)
        return {**batch, "input_ids": masked, "targets": ids.masked_fill(~chosen, IGNORED)}


class KLToDense(Metric):
    """Mean KL(dense || ours) in nats over examples, and how often both choose the same class."""

    name = "kl_to_dense"

    def __init__(self) -> None:
        self.nats, self.agreed, self.count = 0.0, 0, 0

    def add(self, ours: torch.Tensor, dense: torch.Tensor, batch: Batch) -> None:
        """Logits ``(batch, classes)``."""
        log_ours, log_dense = (logits.double().log_softmax(-1) for logits in (ours, dense))
        self.nats += kl_div(log_ours, log_dense, log_target=True, reduction="sum").item()
        self.agreed += int((ours.argmax(-1) == dense.argmax(-1)).sum())
        self.count += len(ours)

    def figures(self) -> Figures:
        """KL and agreement."""
        return {self.name: self.nats / max(self.count, 1), "agreement": self.agreed / max(self.count, 1)}


class Accuracy(KLToDense):
    """Share of examples classified right, with the values of `KLToDense`."""

    name = "accuracy"

    def __init__(self) -> None:
        super().__init__()
        self.right = 0

    def add(self, ours: torch.Tensor, dense: torch.Tensor, batch: Batch) -> None:
        """Logits ``(batch, classes)`` and labels ``(batch,)``."""
        super().add(ours, dense, batch)
        self.right += int((ours.argmax(-1).cpu() == batch["labels"]).sum())

    def figures(self) -> Figures:
        """Accuracy, KL, agreement."""
        further = super().figures()
        kl, agreement = further.values()
        return {self.name: self.right / max(self.count, 1), "kl_to_dense": kl, "agreement": agreement}


class Embedding(Metric):
    """Fidelity of sentence embeddings: hidden states averaged over the tokens that are not padding.

    Mean cosine to the dense model's, and Spearman's rank correlation between the cosines of all pairs of the first
    512 sentences under one model and under the other.
    """

    name = "embedding"

    def __init__(self) -> None:
        self.cosine, self.count = 0.0, 0
        self.ranked: list[tuple[torch.Tensor, torch.Tensor]] = []

    @staticmethod
    def keep(output: Any, batch: Batch) -> torch.Tensor:
        """Embeddings ``(batch, d_model)``."""
        hidden = output["last_hidden_state"].float()
        weights = torch.ones(hidden.shape[:2], device=hidden.device)
        weights = batch["attention_mask"].to(weights) if "attention_mask" in batch else weights
        return (hidden * weights[..., None]).sum(1) / weights.sum(1, keepdim=True).clamp_min(1)

    def add(self, ours: torch.Tensor, dense: torch.Tensor, batch: Batch) -> None:
        """Embeddings ``(batch, d_model)``."""
        self.cosine += cosine_similarity(ours, dense, dim=-1).sum().item()
        room = max(0, SENTENCES_RANKED - self.count)
        if room:
            self.ranked.append((ours[:room].cpu(), dense[:room].cpu()))
        self.count += len(ours)

    def figures(self) -> Figures:
        """Mean cosine and rank correlation. The rank correlation is NaN for fewer than three sentences."""
        pairs = [pdist(torch.cat(side).double().numpy(), "cosine") for side in zip(*self.ranked, strict=True)]
        rank = float(spearmanr(*pairs).statistic) if len(pairs[0]) > 2 else math.nan
        return {self.name: self.cosine / max(self.count, 1), "rank_correlation": rank}


class CosineToDense(Metric):
    """Mean cosine between the outputs at each position and the dense model's: the metric for every other model."""

    name = "cosine_to_dense"

    def __init__(self) -> None:
        self.cosine, self.count = 0.0, 0

    @staticmethod
    def keep(output: Any, batch: Batch) -> torch.Tensor:
        """Logits if there are any, else the first floating-point tensor; ``(positions, width)``."""
        tensors = [v for v in output.values() if isinstance(v, torch.Tensor) and v.is_floating_point()]
        main = (output["logits"] if "logits" in output else tensors[0]).float()
        rows = main.flatten(0, -2) if main.ndim > 1 else main[None]
        mask = batch.get("attention_mask")
        return rows[mask.flatten().bool().to(rows.device)] if mask is not None and mask.numel() == len(rows) else rows

    def add(self, ours: torch.Tensor, dense: torch.Tensor, batch: Batch) -> None:
        """Outputs ``(positions, width)``."""
        self.cosine += cosine_similarity(ours, dense, dim=-1).sum().item()
        self.count += len(ours)

    def figures(self) -> Figures:
        """Mean cosine."""
        return {self.name: self.cosine / max(self.count, 1)}


METRICS: dict[str, type[Metric]] = dict(
    zip(METRIC_NAMES, (Perplexity, MaskedLM, Accuracy, KLToDense, Embedding, CosineToDense), strict=True)
)


def possible_metrics(kind: type, config: Any, batch: Batch, tokenizer: Any = None) -> list[str]:
    """Metrics that fit a model and its data, the natural one first.

    Args:
        kind: The model's class.
        config: Its config.
        batch: One batch of the data.
        tokenizer: For the mask token, which may also be in the config.
    """
    found, text = [], "input_ids" in batch
    pair = getattr(config, "is_encoder_decoder", False)
    if hub.is_classifier(kind, config):
        found += [*(["accuracy"] if "labels" in batch else []), "kl_to_dense"]
    elif text and not pair and (hub.is_causal(kind) or (hasattr(kind, "can_generate") and kind.can_generate())):
        found.append("perplexity")
    elif text and any(base.__name__.endswith("ForMaskedLM") for base in kind.__mro__):
        found += ["masked_lm"] if special_tokens(config, tokenizer).mask_token_id is not None else []
    elif text and not pair and not any(re.search(r"For[A-Z]|Head", base.__name__) for base in kind.__mro__):
        found.append("embedding")
    return [*found, "cosine_to_dense"]


def choose_metric(wanted: str | None, kind: type, config: Any, batch: Batch, tokenizer: Any = None) -> str:
    """The metric asked for, or the natural one.

    Raises:
        UserError: If what was asked for does not fit the model or the data.
    """
    possible = possible_metrics(kind, config, batch, tokenizer)
    if wanted in (None, *possible):
        return wanted or possible[0]
    if wanted == "accuracy" and "kl_to_dense" in possible:
        raise UserError("--metric accuracy: the data has no labels; name their column with --label-column")
    if wanted == "masked_lm" and kind.__name__.endswith("ForMaskedLM"):
        raise UserError("--metric masked_lm: the model has no tokenizer with a mask token; give another")
    raise UserError(f"--metric {wanted}: does not fit a {kind.__name__}; possible here: {', '.join(possible)}")
