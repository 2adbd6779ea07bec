"""Ridge regression from moments, the solver behind routers, router targets and stand-ins."""

from __future__ import annotations

import torch
from scipy.linalg import cho_factor, cho_solve

FLOOR = 1e-8  # relative to the mean of the diagonal: keeps a regressor that never varies from being singular


def ridge(gram: torch.Tensor, cross: torch.Tensor, penalty: float) -> torch.Tensor:
    """Coefficients `(G + diag(penalty * diag G + floor))^-1 C`, by Cholesky decomposition in double precision.

    Args:
        gram: Moments of the regressors ``(n, n)``; unchanged.
        cross: Moments with the targets ``(n, targets)``.
        penalty: Relative to each regressor's own moment.

    Returns:
        ``(n, targets)``, double.
    """
    damped = gram.to("cpu", torch.float64, copy=True)
    diagonal = damped.diagonal().clone()
    damped.diagonal().add_(penalty * diagonal + FLOOR * diagonal.mean().clamp_min(1e-12))
    factor = cho_factor(damped.numpy().T, overwrite_a=True, check_finite=False)  # in place: one matrix, not three
    return torch.from_numpy(cho_solve(factor, cross.cpu().double().numpy(), check_finite=False))
