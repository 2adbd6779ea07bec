"""How a converted model spends its compute: experts used, experts per token, and a few samples token by token."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..data.batches import Batches
from ..kernels import dispatching
from ..moe.gating import set_gate, stored_config
from ..moe.layer import layers
from .observe import run_observed

TOKENS, IMAGES = 4096, 16  # of held-out data, for each budget
SAMPLE_TOKENS, SAMPLE_PIXELS = 128, 160
BINS = 64  # at most so many steps of k
PREFIX = 8  # at most so many tokens before those of the patches


class UsageCounter:
    """An observer that counts, per layer, how often each expert runs and how many experts run for a token."""

    needs_hidden = False

    def __init__(self) -> None:
        self.runs: dict[int, torch.Tensor] = {}  # (experts,)
        self.k: dict[int, torch.Tensor] = {}  # (experts + 1,)

    def __call__(self, index, layer, x, hidden, scores, run) -> None:
        """See `Observer`."""
        experts = layer.block.experts
        run = torch.ones(len(x), experts) if run is None else run.detach().float().cpu()
        k = torch.bincount(run.sum(1).round().long(), minlength=experts + 1)
        self.runs[index] = self.runs.get(index, 0) + run.sum(0)
        self.k[index] = self.k.get(index, 0) + k

    def by_layer(self, model: nn.Module) -> list[dict[str, Any]]:
        """Each layer's `active` fraction, `usage` of every expert and histogram `k` in steps of `k_step` experts.

        A layer that never ran has no entry but its experts.
        """
        found = []
        for index, layer in enumerate(layers(model)):
            experts, entry = layer.block.experts, {"experts": layer.block.experts}
            if index in self.k and (tokens := int(self.k[index].sum())):
                step = math.ceil((experts + 1) / BINS)
                usage = (self.runs[index] / tokens).tolist()
                entry |= {
                    "active": round(sum(usage) / experts, 4), "usage": [round(share, 3) for share in usage],
                    "k_step": step, "k": [int(part.sum()) for part in self.k[index].split(step)],
                }  # fmt: skip
            found.append(entry)
        return found


class TokenShares:
    """An observer that keeps the share of experts that run for each token of one pass, layer by layer."""

    needs_hidden = False

    def __init__(self) -> None:
        self.shares: list[torch.Tensor] = []  # (tokens,) each

    def __call__(self, index, layer, x, hidden, scores, run) -> None:
        """See `Observer`."""
        self.shares.append(torch.ones(len(x)) if run is None else run.detach().float().mean(1).cpu())

    def of_tokens(self, count: int) -> list[float]:
        """Mean over the layers that see just these tokens; empty if none does."""
        fitting = [share for share in self.shares if len(share) == count]
        return [round(v, 3) for v in torch.stack(fitting).mean(0).tolist()] if fitting else []

    def of_patches(self) -> list[list[float]]:
        """Mean over the layers on the finest square grid of patches; empty where there is no such grid.

        Tokens before those of the patches (class, registers) are left out.
        """
        grids = [grid for share in self.shares if (grid := _grid(share)) is not None]
        side = max((len(grid) for grid in grids), default=0)
        fine = [g.repeat_interleave(side // len(g), 0).repeat_interleave(side // len(g), 1) for g in grids
                if side % len(g) == 0]  # fmt: skip
        return [[round(v, 3) for v in row] for row in torch.stack(fine).mean(0).tolist()] if fine else []


def _grid(share: torch.Tensor) -> torch.Tensor | None:
    """Shares ``(tokens,)`` as a square ``(side, side)``, without the fewest tokens before it."""
    for prefix in range(PREFIX + 1):
        side = math.isqrt(max(len(share) - prefix, 0))
        if side > 1 and side * side == len(share) - prefix:
            return share[prefix:].view(side, side)
    return None


@dispatching("sparse")
def collect_usage(model: nn.Module, batches: Batches, processor: Any, *, samples: int = 3) -> dict[str, Any]:
    """The contents of `report.json`: one pass over a few thousand held-out tokens for every stored budget.

    Args:
        model: Converted model.
        batches: Held-out batches, of which the first 4096 tokens (16 images) count.
        processor: Tokenizer or image processor; without a tokenizer a token is shown by its number.
        samples: How many texts or images to show token by token.

    Returns:
        `{"kind", "count", "blocks", "budgets": [{"active", "layers"}], "samples"}`; see `UsageCounter.by_layer`. A
        sample holds its `pieces` of text, or its image as `png`, and for each `active` fraction the share of experts
        that ran for each of them.
    """
    images = "image" in batches.items[0]
    few, budgets = batches.first(IMAGES if images else TOKENS), []
    actives = sorted({budget.active for budget in stored_config(model).budgets})
    for active in actives:
        counter = UsageCounter()
        with set_gate(model, active=active):
            run_observed(model, few, counter)
        budgets.append({"active": active, "layers": counter.by_layer(model)})
    shown = list(_image_samples(batches, samples) if images else _text_samples(batches, processor, samples))
    for batch, sample in shown:
        for active in actives:
            observer = TokenShares()
            with set_gate(model, active=active):
                run_observed(model, [batch], observer)
            found = observer.of_patches() if images else observer.of_tokens(len(sample["pieces"]))
            if found:
                sample["active"].append([active, found])
    return {
        "kind": "images" if images else "tokens", "count": few.tokens,
        "blocks": [layer.block.name for layer in layers(model)], "budgets": budgets,
        "samples": [sample for _, sample in shown if sample["active"]],
    }  # fmt: skip


def _spread(batches: Batches, count: int) -> list[dict[str, Any]]:
    """So many items, from the whole of the data."""
    items = batches.items
    return [items[i * len(items) // count] for i in range(min(count, len(items)))] if count else []


def _text_samples(batches: Batches, tokenizer: Any, count: int) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """A batch of one sequence, and its tokens as pieces of text."""
    for item in _spread(batches, count):
        ids = [int(i) for i in item["input_ids"][:SAMPLE_TOKENS]]
        yield batches.collate([{"input_ids": ids}]), {"pieces": token_texts(ids, tokenizer), "active": []}


def token_texts(ids: list[int], tokenizer: Any) -> list[str]:
    """The text of each token; of a character that several tokens make up, the last one has it."""
    if not callable(getattr(tokenizer, "decode", None)):
        return [f"{i} " for i in ids]
    pieces, before = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        whole = end == len(ids) or not text.endswith("\N{REPLACEMENT CHARACTER}")
        new = text[len(before) :] if whole else ""
        pieces.append(new)
        before = text if whole else before
    return pieces


def _image_samples(batches: Batches, count: int) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """A batch of one image, and the image as the model sees it, as a small PNG."""
    for item in _spread(batches, count):
        batch = batches.collate([{"image": item["image"]}])
        yield batch, {"png": _thumbnail(batch["pixel_values"][0], batches.image_processor), "active": []}


def _thumbnail(pixels: torch.Tensor, processor: Any) -> str:
    """Pixel values ``(channels, height, width)`` as a PNG in base64."""
    from PIL import Image

    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (processor.image_mean, processor.image_std))
    shown = ((pixels.float().cpu() * std + mean).clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
    image = Image.fromarray(shown[..., 0] if shown.shape[-1] == 1 else shown)
    image.thumbnail((SAMPLE_PIXELS, SAMPLE_PIXELS))
    stream = io.BytesIO()
    image.convert("RGB").save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()
