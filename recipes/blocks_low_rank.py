"""Feed-forward blocks at low rank, without experts: each of their matrices by two factors, or the whole block by one
linear map. What there is to be had without routers, at the same work.

    python recipes/blocks_low_rank.py --model checkpoints/gpt2-mini --data ../shared/data/wikitext2/train.txt \
        --eval-data ../shared/data/wikitext2/valid.txt

Factors are fitted as those of the projections around attention are (`--attention low-rank`): to the inputs' moments and
to those of the gradients at the outputs. Loss is in nats per token above the dense model, for causal language models.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from alone import Rows, keys_of, parser, prepared, shares_of, show
from torch import nn

from d2dmoe import hub
from d2dmoe.attention.bases import find_basis
from d2dmoe.attention.moments import InputMoments
from d2dmoe.config import ConvertConfig, resolve
from d2dmoe.config.record import Block
from d2dmoe.data.batches import Batches
from d2dmoe.measure.evaluate import evaluate
from d2dmoe.measure.observe import model_inputs
from d2dmoe.moe.packing import matrix_of, sizes


class Seen:
    """Moments of what goes into a module, of that and what comes out, and of the gradients there, summed in fp64."""

    def __init__(self, module: nn.Module):
        self.inputs, self.outputs, self.both, self.gradients = InputMoments(0, 0), 0, 0, 0
        module.register_forward_hook(self._forward)

    def _forward(self, _: nn.Module, args: tuple, y: torch.Tensor) -> None:
        if torch.is_grad_enabled():
            x, out = (t.detach().flatten(0, -2).double() for t in (args[0], y))
            was = self.inputs
            self.inputs = InputMoments(was.gram + x.T @ x, was.total + x.sum(0), was.rows + len(x))
            self.outputs, self.both = self.outputs + out.sum(0), self.both + x.T @ out
            y.register_hook(self._backward)

    def _backward(self, gradient: torch.Tensor) -> None:
        rows = gradient.flatten(0, -2).double()
        self.gradients = self.gradients + rows.T @ rows

    def covariance_with_outputs(self) -> torch.Tensor:
        """``(inputs, outputs)``."""
        return self.both / self.inputs.rows - torch.outer(self.inputs.mean, self.outputs / self.inputs.rows)


def observe(model: nn.Module, batches: Batches, paths: list[str], seed: int) -> dict[str, Seen]:
    """Moments at each of the modules, with gradients of the likelihood of tokens that the model itself draws."""
    seen = {path: Seen(model.get_submodule(path)) for path in paths}
    generator = torch.Generator().manual_seed(seed)
    for batch in batches:
        logits = model(**model_inputs(model, batch)).logits.flatten(0, -2)
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(1)
        nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
        model.zero_grad()
    return seen


@torch.no_grad()
def cut(module: nn.Module, seen: Seen, rank: int) -> None:
    """Give a linear map the weights that two factors of this rank amount to, and keep its mean output."""
    weight = matrix_of(module)
    basis = find_basis(weight, seen.inputs, seen.gradients, rank, [len(weight)])
    low = ((basis.into @ basis.back).T @ weight.double()).to(weight)
    if module.bias is not None:
        module.bias += ((weight - low).double() @ seen.inputs.mean).to(weight)
    weight.copy_(low)


def linear_map(block: Block, seen: Seen, rank: int) -> Callable:
    """A forward hook that gives a block's output by the best linear map of this rank, by reduced-rank regression."""
    inputs, both = seen.inputs.covariance, seen.covariance_with_outputs()
    scale = float(inputs.trace()) / block.d_model
    fitted = torch.linalg.solve(inputs + 1e-3 * scale * torch.eye(block.d_model).double(), both)
    _, vectors = torch.linalg.eigh(fitted.T @ inputs @ fitted)
    kept = vectors[:, -rank:]
    low = fitted @ kept @ kept.T
    constant = seen.outputs / seen.inputs.rows - seen.inputs.mean @ low
    return lambda _, args, y: (args[0] @ low.to(y) + constant.to(y)).to(y)


def rows_of(config: ConvertConfig, eval_data: str, eval_limit: int, shares: list[float]) -> Rows:
    """One row of the table for each share of the blocks' work."""
    subject, plan, batches = prepared(config, eval_data, eval_limit)
    batches = batches.first(config.calibration_tokens)

    def loss() -> float:
        return evaluate(model, subject.batches, [], metric=subject.metric)[0]["metrics"]["loss"]

    model = hub.load_model(config.model, subject.config)
    maps = sorted({path for b in plan.blocks for path in (b.up, b.gate, b.down) if path})
    parents = [b.up.rpartition(".")[0] for b in plan.blocks]
    seen, dense = observe(model, batches, [*maps, *parents], config.seed), loss()
    rows = []
    for share in shares:
        model = hub.load_model(config.model, subject.config)
        for path in maps:
            module = model.get_submodule(path)
            inputs, outputs = sizes(module)
            cut(module, seen[path], max(1, int(share * outputs * inputs / (outputs + inputs))))
        factors = loss() - dense
        model, whole = hub.load_model(config.model, subject.config), ""
        ranks = [int(share * b.width * (2 + (b.gate is not None)) / 2) for b in plan.blocks]
        if all(rank <= b.d_model // 2 for rank, b in zip(ranks, plan.blocks, strict=True)):
            for b, path, rank in zip(plan.blocks, parents, ranks, strict=True):
                model.get_submodule(path).register_forward_hook(linear_map(b, seen[path], max(rank, 1)))
            whole = f"{loss() - dense:.4f}"
        rows.append([f"{share:g}", f"{factors:.4f}", whole])
    return rows


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    flags = parser(__doc__, model="hub id or folder of a causal language model", shares="0.06,0.125,0.25,0.5,0.75")
    arguments = flags.parse_args(argv)
    head = ["share", "loss, each matrix by factors", "loss, one linear map a block"]

    def make() -> Rows:
        config = resolve(ConvertConfig, keys_of(arguments))
        return rows_of(config, arguments.eval_data, arguments.eval_limit, shares_of(arguments))

    return show("blocks_low_rank.py", head, make)


if __name__ == "__main__":
    sys.exit(main())
