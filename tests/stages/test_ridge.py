"""The one ridge solver against least squares with the penalty written out as rows."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from d2dmoe.stages.ridge import FLOOR, ridge


@pytest.mark.parametrize("penalty", [1e-4, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ridge_is_least_squares_with_further_rows(penalty, dtype):
    torch.manual_seed(0)
    x, y = torch.randn(50, 7, dtype=torch.float64), torch.randn(50, 3, dtype=torch.float64)
    x[:, 1] *= 100  # the penalty is relative to each regressor
    gram, cross = (x.T @ x).to(dtype), (x.T @ y).to(dtype)
    before = gram.clone()
    penalties = penalty * gram.diagonal().double() + FLOOR * gram.diagonal().double().mean()
    rows = torch.cat([x, penalties.sqrt().diag()]), torch.cat([y, torch.zeros(7, 3, dtype=torch.float64)])
    found = ridge(gram, cross, penalty)
    assert found.dtype == torch.float64
    assert torch.equal(gram, before)
    assert_close(found, torch.linalg.lstsq(*rows).solution, rtol=1e-3 if dtype == torch.float32 else 1e-7, atol=1e-7)


def test_a_regressor_that_never_varies_gets_no_weight():
    x, y = torch.randn(20, 4, dtype=torch.float64), torch.randn(20, 2, dtype=torch.float64)
    x[:, 2] = 0
    found = ridge(x.T @ x, x.T @ y, 1e-3)
    rest = ridge(x[:, [0, 1, 3]].T @ x[:, [0, 1, 3]], x[:, [0, 1, 3]].T @ y, 1e-3)
    assert torch.equal(found[2], torch.zeros(2, dtype=torch.float64))
    assert_close(found[[0, 1, 3]], rest, rtol=1e-6, atol=1e-9)
    assert torch.equal(ridge(torch.zeros(3, 3), torch.zeros(3, 2), 1e-3), torch.zeros(3, 2, dtype=torch.float64))
