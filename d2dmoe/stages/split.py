"""Group the neurons of a block into experts of equal size: a permutation that makes every expert contiguous.

Where the number of experts does not divide the width, the last expert holds the smaller rest.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ..config.record import can_split

SplitFunction = Callable[[torch.Tensor, int, int], torch.Tensor]


def split_neurons(
    method: str, rows: torch.Tensor, experts: int, seed: int = 0, *, shared: torch.Tensor | None = None
) -> torch.Tensor:
    """Order the neurons so that expert `e` owns positions `e * s` to `(e + 1) * s` of the result, `s` rounded up.

    Args:
        method: A key of `SPLITS`.
        rows: What describes each neuron, ``(width, features)``.
        experts: Number of experts.
        seed: For starts and shuffles.
        shared: Neurons that come first whatever their rows: those of the experts that always run.

    Returns:
        Neuron indices ``(width,)``.

    Raises:
        ValueError: If fewer experts of the same size would do.
    """
    if not can_split(rows.shape[0], experts):
        raise ValueError(f"{experts} experts do not fit {rows.shape[0]} neurons")
    if shared is not None and len(shared):
        rest = torch.ones(len(rows), dtype=torch.bool).index_fill(0, shared, False).nonzero().flatten()
        routed = experts - len(shared) // -(-len(rows) // experts)
        return torch.cat([shared, rest[split_neurons(method, rows[rest], routed, seed)]])
    if experts in (1, rows.shape[0]):
        return torch.arange(rows.shape[0])
    return SPLITS[method](rows, experts, seed)


def by_weights(rows: torch.Tensor, experts: int, seed: int) -> torch.Tensor:
    """Balanced k-means on L2-normalised weight rows (Szatkowski et al. 2024, sec. 3.2, after MoEfication)."""
    unit = torch.nn.functional.normalize(rows.detach().float(), dim=1).cpu().numpy()
    labels = balanced_kmeans(unit, experts, seed)
    return torch.from_numpy(np.argsort(labels, kind="stable"))


def at_random(rows: torch.Tensor, experts: int, seed: int) -> torch.Tensor:
    """The control: a random partition."""
    return torch.randperm(rows.shape[0], generator=torch.Generator().manual_seed(seed))


# The coactivation splits cluster the same way, but rows of `coactivation.activation_profiles` instead of weights.
SPLITS: dict[str, SplitFunction] = {
    "weights": by_weights,
    "coactivation": by_weights,
    "coactivation-signed": by_weights,
    "shared_experts": by_weights,
    "random": at_random,
}


def balanced_kmeans(points: np.ndarray, clusters: int, seed: int, iterations: int = 8) -> np.ndarray:
    """K-means with clusters of exactly equal size, the last one smaller where it does not come out even.

    k-means++ start, then Lloyd steps whose assignment is greedy in order of regret (how much a point loses if it cannot
    have its first choice). Keeps the best of the steps.

    Args:
        points: ``(n, features)``, float32.
        clusters: Number of clusters, `can_split(n, clusters)`.
        seed: Of the start.
        iterations: Lloyd steps.

    Returns:
        Cluster of each point ``(n,)``.
    """
    from sklearn.cluster import kmeans_plusplus

    centres, _ = kmeans_plusplus(points, clusters, random_state=seed, n_local_trials=1)
    best, best_inertia = None, np.inf
    size = -(-len(points) // clusters)
    ends = size * np.arange(1, clusters)
    room = np.full(clusters, size)
    room[-1] = len(points) - size * (clusters - 1)
    for _ in range(iterations):
        # Less the points' own norms, as one product of matrices: scipy's cdist takes ten times as long.
        distances = ((centres**2).sum(1)[None, :] - 2.0 * points @ centres.T).astype(np.float32)
        labels = _assign_by_regret(distances, room.copy())
        inertia = float(distances[np.arange(len(points)), labels].sum())
        if inertia >= best_inertia - 1e-6 * abs(best_inertia if np.isfinite(best_inertia) else 0.0):
            break
        best, best_inertia = labels, inertia
        members = np.split(np.argsort(labels, kind="stable"), ends)
        centres = np.stack([points[indices].mean(axis=0) for indices in members])
    return best


def _assign_by_regret(distances: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Give each point the nearest cluster with room (used up here); points with most to lose choose first.

    Runs in rounds: in each, every open point bids for its nearest open cluster, and a cluster takes the bidders with
    the largest regret up to its room. Full clusters close, so there are at most as many rounds as clusters.
    """
    count, clusters = distances.shape
    labels = np.full(count, -1)
    open_points = np.arange(count)
    distances = distances.copy()
    while len(open_points):
        part = distances[open_points]
        first = part.argmin(1)
        two = np.partition(part, 1, axis=1)[:, :2] if (room > 0).sum() > 1 else np.zeros((len(part), 2))
        regret = np.where(np.isfinite(two[:, 1]), two[:, 1] - two[:, 0], 0.0)
        order = np.lexsort((-regret, first))  # by cluster, then by falling regret
        bids = first[order]
        rank = np.arange(len(order)) - np.searchsorted(bids, bids)
        taken = rank < room[bids]
        labels[open_points[order[taken]]] = bids[taken]
        room -= np.bincount(bids[taken], minlength=clusters)
        distances[:, room == 0] = np.inf
        open_points = np.sort(open_points[order[~taken]])
    return labels
