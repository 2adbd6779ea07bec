"""What discovery refuses, on modules made for the purpose; what it finds is in `test_architectures.py`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from d2dmoe.discovery import discover


class Spread(nn.Module):
    """A block spread over a module that has parameters of its own, with its activation used once more on demand."""

    def __init__(self, again: bool, act: nn.Module | None = None):
        super().__init__()
        self.again = again
        self.fc1, self.act, self.fc2, self.norm = nn.Linear(8, 16), act or nn.GELU(), nn.Linear(16, 8), nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.fc2(self.act(self.fc1(x))))
        return y + self.act(x) if self.again else y


class Stack(nn.Module):
    def __init__(self, *again: bool, act: nn.Module | None = None):
        super().__init__()
        self.layers = nn.ModuleList(Spread(a, act) for a in again)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


INPUTS = {"x": torch.randn(2, 5, 8)}


@pytest.mark.parametrize("shared", [False, True])
def test_an_activation_of_blocks_alone_is_passed_through(shared):
    found = discover(Stack(False, False, act=nn.GELU() if shared else None), INPUTS)
    assert [block.name for block in found.blocks] == ["layers.0.fc1", "layers.1.fc1"]
    assert not found.refused


def test_an_activation_used_elsewhere_as_well_is_refused():
    found = discover(Stack(False, True), INPUTS)
    assert [block.name for block in found.blocks] == ["layers.0.fc1"]
    ((block, why),) = found.refused
    assert block.name == "layers.1.fc1"
    assert why == "its activation layers.1.act also runs outside feed-forward blocks"
