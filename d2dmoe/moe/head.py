"""The head of a language model that gives exact logits to the likeliest tokens only (SVD-softmax).

With `P` ``(inputs, rank)`` and `Q` ``(rank, inputs)`` the stored basis of the hidden states, `m` their mean and `W` the
weights, all tokens get the rough logits ``(W P) Q (x - m) + W m + b``; the `candidates` with the largest of them then
get their exact ``W x + b``. (Shim et al., "SVD-Softmax: Fast Softmax Approximation on Large Vocabulary Neural
Networks", NeurIPS 2017, which takes singular vectors of `W` for a basis.) ``W P`` is derived from the weights.
"""

from __future__ import annotations

import torch

from ..config.projections import ProjectionState
from ..tensors import BASES
from .projection import DynamicLinear, Factors, linear

FEW = 8  # rows up to which the weights of candidates are gathered; more take the whole product


class DynamicHead(DynamicLinear):
    """A `Linear` to the vocabulary, see `DynamicProjection`.

    Parameters beside the dense map's own `weight` and `bias`: the basis `low_rank_in` ``(inputs, rank)`` and
    `low_rank_out` ``(rank, inputs)``, of whose columns (rows) a budget uses the first; `output_mean` ``(inputs,)``, the
    mean hidden state.
    """

    def added_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the parameters beside the dense ones."""
        p = self.projection
        return dict(zip(BASES, ((p.inputs, p.rank), (p.rank, p.inputs), (p.inputs,)), strict=False))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``(…, inputs)`` to ``(…, outputs)``."""
        state = self.gate.in_force(self)
        if isinstance(state, tuple):
            return self.by_rows(input, state)
        if self.observer is not None:
            self.observer(self, input.reshape(-1, input.shape[-1]), None)
        if state.method == "dense":
            return self._by_weights(input, self.weight, self.bias)
        rough = self.rough(input, state.ranks)
        return self.refined(input, rough, state.candidates) if state.candidates else rough

    def rough(self, x: torch.Tensor, ranks: tuple[int, ...]) -> torch.Tensor:
        """Rough logits of all tokens, ``(…, inputs)`` to ``(…, outputs)``."""
        if self._learns():
            mean, rank = self.output_mean, ranks[0]
            return linear((x - mean) @ self.low_rank_out[:rank].T @ self.low_rank_in[:, :rank].T + mean, self.weight,
                          self.bias)  # fmt: skip
        few, state = None, ProjectionState("low-rank", ranks)
        if self.linear_dtype is None and not torch.compiler.is_compiling():
            few = self.few_tokens.run(self, state, x)
        return self._factored(x, self.factors(state), ranks) if few is None else few

    def refined(self, x: torch.Tensor, rough: torch.Tensor, candidates: int) -> torch.Tensor:
        """Logits of which the largest `candidates` of each row are exact."""
        places = rough.topk(candidates, -1, sorted=False).indices
        if rough.numel() <= FEW * self.projection.outputs and not self._learns():
            exact = (self.weight[places] @ x.unsqueeze(-1)).squeeze(-1)
            exact = exact if self.bias is None else exact + self.bias[places]
        else:
            exact = linear(x, self.weight, self.bias).gather(-1, places)
        return rough.scatter(-1, places, exact)

    def _derive(self, state: ProjectionState) -> Factors:
        (rank,), weight, dtype = state.ranks, self.weight.float(), self.weight.dtype
        basis, back, mean = (
            self.low_rank_in[:, :rank].float(),
            self.low_rank_out[:rank].float(),
            self.output_mean.float(),
        )
        constant = weight @ (mean - basis @ (back @ mean))
        constant = constant if self.bias is None else constant + self.bias.float()
        return back.to(dtype).contiguous(), [(weight @ basis).to(dtype)], [constant.to(dtype)]

    @torch.no_grad()
    def merge(self) -> None:
        """Everything is needed: the factors for the rough logits, the weights for the exact ones."""
        self.merged = True
