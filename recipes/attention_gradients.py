"""Time attention with its gradients on a processor: torch's fused form against the plain one, in fp32 and in bf16.

OMP_NUM_THREADS=1 python recipes/attention_gradients.py
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

SHAPES = ((32, 12, 32, 32), (32, 12, 64, 32), (128, 6, 33, 32), (16, 4, 128, 64), (16, 6, 256, 32), (8, 12, 512, 64))


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """As `transformers` has it under `eager`."""
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def milliseconds(attention: Callable[..., torch.Tensor], tensors: list[torch.Tensor]) -> float:
    """Processor time of one pass forward and back, the best of four."""
    best = float("inf")
    for _ in range(4):
        started = time.process_time()
        attention(*tensors).sum().backward()
        best = min(best, time.process_time() - started)
    return best * 1e3


def main() -> None:
    """Print the table."""
    print("| batch, heads, length, width | dtype | fused, ms | plain, ms |\n|---|---|---|---|")
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            tensors = [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3)]
            fused = milliseconds(torch.nn.functional.scaled_dot_product_attention, tensors)
            print(f"| {shape} | {str(dtype)[6:]} | {fused:.1f} | {milliseconds(plain, tensors):.1f} |", flush=True)


if __name__ == "__main__":
    main()
