"""Train a ViT of 2.2 million parameters on CIFAR-10 from scratch: the dense base of the recipe beside this file.

    python recipes/vit_cifar10/train.py --output-dir runs/vit-cifar10

Made for processors: bf16 where they multiply it, Muon, which needs a fraction of the steps of AdamW, half of the
patches in the first half of the steps (PatchDropout, arXiv 2208.07220), attention that starts as that of trained ViTs
does (mimetic initialisation, arXiv 2305.09828), and images put together from two (CutMix, arXiv 1905.04899).
Interrupted, it goes on from its last saved state when started again with `--resume`. `--base` goes on with a model that
an earlier run has saved.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pandas
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from d2dmoe.config import TrainingConfig
from d2dmoe.training import attention_for, train

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def read(file: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Images ``(images, 3, 32, 32)``, uint8, and their classes ``(images,)``."""
    table = pandas.read_parquet(file)
    opened = (Image.open(io.BytesIO(row["bytes"])).convert("RGB") for row in table["image"])
    pixels = torch.stack([torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) for image in opened])
    return pixels.view(-1, 32, 32, 3).permute(0, 3, 1, 2).contiguous(), torch.tensor(table["label"])


def as_input(images: torch.Tensor) -> torch.Tensor:
    """What `ViTImageProcessor` makes of them: from -1 to 1."""
    return images.float() / 127.5 - 1


def augmented(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Moved by up to four pixels, and every second one mirrored; uint8, shape as given."""
    count = len(images)
    padded = torch.nn.functional.pad(images.float(), (4, 4, 4, 4), mode="reflect").byte()
    moves = torch.randint(9, (2, count, 1), generator=generator)
    rows, columns = moves + torch.arange(32)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    return padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def mixed(
    inputs: torch.Tensor, classes: torch.Tensor, share: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """In a share of the batches a rectangle of each image comes from another one (CutMix, arXiv 1905.04899).

    Takes and returns images ``(images, 3, 32, 32)`` and the classes' probabilities ``(images, classes)``.
    """
    if torch.rand((), generator=generator) >= share:
        return inputs, classes
    others = torch.randperm(len(inputs), generator=generator)
    kept, *middle = torch.rand(3, generator=generator).tolist()
    half = 16 * math.sqrt(1 - kept)
    (top, bottom), (left, right) = (
        (max(0, round(32 * place - half)), min(32, round(32 * place + half))) for place in middle
    )
    inputs, area = inputs.clone(), (bottom - top) * (right - left) / 32**2
    inputs[:, :, top:bottom, left:right] = inputs[others, :, top:bottom, left:right]
    return inputs, classes * (1 - area) + classes[others] * area


def new_model(seed: int) -> ViTForImageClassification:
    """Five layers of width 192 on patches of 4, with ReLU, without dropout."""
    torch.manual_seed(seed)
    model = ViTForImageClassification(
        ViTConfig(
            image_size=32, patch_size=4, hidden_size=192, num_hidden_layers=5, num_attention_heads=6,
            intermediate_size=768, hidden_act="relu", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            id2label=dict(enumerate(CLASSES)), label2id={name: i for i, name in enumerate(CLASSES)},
        )
    )  # fmt: skip
    mimic_trained(model)
    return model


@torch.no_grad()
def mimic_trained(model: ViTForImageClassification) -> None:
    """Mimetic initialisation (arXiv 2305.09828): queries meet their own keys, values come back negated."""
    width, heads = model.config.hidden_size, model.config.num_attention_heads
    size, eye = width // heads, torch.eye(width)
    named = dict(model.named_modules())
    for name, query in named.items():
        if not name.endswith(("attention.query", "attention.q_proj")):
            continue
        stem, old = name.rsplit(".", 1)[0], name.endswith("query")
        key, value = (named[f"{stem}.{part}"] for part in (("key", "value") if old else ("k_proj", "v_proj")))
        output = named[f"{stem.removesuffix('.attention')}.output.dense" if old else f"{stem}.o_proj"]
        for head in range(heads):
            u, s, v = torch.linalg.svd(0.7 * torch.randn(width, width) / math.sqrt(width) + 0.7 * eye)
            part = slice(head * size, (head + 1) * size)
            query.weight[part] = (u[:, :size] * s[:size].sqrt()).T
            key.weight[part] = s[:size].sqrt()[:, None] * v[:size]
        u, s, v = torch.linalg.svd(0.4 * torch.randn(width, width) / math.sqrt(width) - 0.4 * eye)
        value.weight.copy_(s.sqrt()[:, None] * v)
        output.weight.copy_(u * s.sqrt())
    place = model.vit.embeddings.position_embeddings
    place[0, 1:] = waves(math.isqrt(place.shape[1] - 1), width)


def waves(side: int, width: int) -> torch.Tensor:
    """Fixed sine and cosine positions of a square of patches, ``(side * side, width)``."""
    frequencies = 10_000 ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = line[:, None].expand(side, side, -1), line[None].expand(side, side, -1)
    return torch.cat([rows, columns], dim=2).reshape(side * side, width)


def drop_patches(model: ViTForImageClassification, keep: float, from_step: Callable[[], bool]) -> None:
    """In training, only a random share of an image's patches, others for each image, until `from_step` says no."""

    def drop(module: torch.nn.Module, _: tuple, embeddings: torch.Tensor) -> torch.Tensor:
        if not module.training or from_step():
            return embeddings
        count, patches = len(embeddings), embeddings.shape[1] - 1
        kept = torch.rand(count, patches).argsort(1)[:, : round(keep * patches)] + 1
        kept = torch.cat([torch.zeros(count, 1, dtype=torch.long), kept], dim=1)
        return embeddings.gather(1, kept[..., None].expand(-1, -1, embeddings.shape[2]))

    model.vit.embeddings.register_forward_hook(drop)


@torch.no_grad()
def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of the images that get their own class."""
    model.eval()
    pairs = zip(images.split(500), labels.split(500), strict=True)
    return sum(int((model(as_input(x)).logits.argmax(-1) == y).sum()) for x, y in pairs) / len(images)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="a ViT of this recipe to go on with (default: a new one)")
    parser.add_argument("--data-dir", type=Path, default=Path(os.environ.get("D2DMOE_DATA", "../shared/data")))
    parser.add_argument("--output-dir", type=Path, default=Path("runs/vit-cifar10"))
    parser.add_argument("--epochs", type=float, default=11)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--keep", type=float, default=0.5, help="share of the patches that a training step sees")
    parser.add_argument(
        "--whole-from", type=float, default=0.5, help="share of the steps after which it sees all patches"
    )
    parser.add_argument("--cutmix", type=float, default=0.7, help="share of the steps whose images are mixed")
    parser.add_argument("--seed", type=int, default=0)
    bf16 = "bf16 autocast (default: where the processor multiplies bf16 itself)"
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, help=bf16)
    parser.add_argument("--resume", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Train, save, measure."""
    arguments, started = parse(), time.time()
    if arguments.bf16 is None:
        arguments.bf16 = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()
    (images, labels), test = (read(arguments.data_dir / "cifar10" / f"{part}.parquet") for part in ("train", "test"))
    if arguments.base:
        model = ViTForImageClassification.from_pretrained(arguments.base, dtype=torch.float32)
    else:
        model = new_model(arguments.seed)
    per_epoch = len(images) // arguments.batch_size
    steps, latest = round(arguments.epochs * per_epoch), 0

    @lru_cache(maxsize=1)
    def order(epoch: int) -> torch.Tensor:
        return torch.randperm(len(images), generator=torch.Generator().manual_seed(arguments.seed + epoch))

    def batch_at(number: int) -> dict[str, torch.Tensor]:
        nonlocal latest
        latest, (epoch, index) = number, divmod(number, per_epoch)
        rows = order(epoch)[index * arguments.batch_size :][: arguments.batch_size]
        generator = torch.Generator().manual_seed(arguments.seed * 1_000_003 + number)
        classes = torch.nn.functional.one_hot(labels[rows], len(CLASSES)).float()
        inputs, classes = mixed(as_input(augmented(images[rows], generator)), classes, arguments.cutmix, generator)
        return {"pixel_values": inputs, "labels": classes}

    def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = model(pixel_values=batch["pixel_values"]).logits
        return torch.nn.functional.cross_entropy(logits, batch["labels"], label_smoothing=0.1)

    drop_patches(model, arguments.keep, lambda: latest >= arguments.whole_from * steps)
    config = TrainingConfig(
        steps=steps, optimizer=arguments.optimizer, learning_rate=arguments.learning_rate, weight_decay=0.05,
        adam_betas=(0.9, 0.99), bf16=arguments.bf16, seed=arguments.seed, save_every=500, log_every=50,
    )  # fmt: skip
    with attention_for(model, 65, bf16=arguments.bf16):
        log = train(
            model, batch_at, loss, config, name="vit", resume=arguments.resume,
            state_dir=arguments.output_dir.with_name(arguments.output_dir.name + ".state"),
            evaluate=lambda m: {"test_accuracy": accuracy(m, test[0][:2000], test[1][:2000])},
        )  # fmt: skip
    model.save_pretrained(arguments.output_dir)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(arguments.output_dir)
    results = {
        "epochs": arguments.epochs, "minutes": round((time.time() - started) / 60, 1),
        "test_accuracy": accuracy(model, *test), "log": log,
    }  # fmt: skip
    (arguments.output_dir / "training.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps({key: value for key, value in results.items() if key != "log"}, indent=1))


if __name__ == "__main__":
    main()
