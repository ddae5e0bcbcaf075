"""Balanced clusters: equal numbers of points, by k-means with an exact assignment.

Axis legend: F points (hidden units), E clusters (experts), D features.
"""

import itertools

import numpy as np
from jaxtyping import Float, Int

ITERATIONS = 20
_TRIALS = 100
"""Prices that are tried before points move one by one."""


def balanced_clusters(
    points_FD: Float[np.ndarray, "F D"],
    num_clusters: int,
    random: np.random.Generator,
    iterations: int = ITERATIONS,
) -> Int[np.ndarray, "F"]:
    """Divides points into clusters of one size, near in Euclidean distance.

    Centres begin as k-means++ draws them, and move to the means of what is assigned to them, until
    nothing changes or the iterations are over.

    Args:
      points_FD: F must be a multiple of the number of clusters.
      num_clusters: E.
      random: for the first centres.
      iterations: assignments at the most.
    """
    points_FD = np.asarray(points_FD, np.float64)
    centres_ED = _spread(points_FD, num_clusters, random)
    labels_F = np.full(len(points_FD), -1)
    for _ in range(iterations):
        found_F = balanced_assignment(_distances(points_FD, centres_ED))
        if np.array_equal(found_F, labels_F):
            break
        labels_F = found_F
        centres_ED = np.stack([points_FD[labels_F == e].mean(axis=0) for e in range(num_clusters)])
    return labels_F


def balanced_assignment(cost_FE: Float[np.ndarray, "F E"]) -> Int[np.ndarray, "F"]:
    """The cluster of each point of least total cost, all clusters of one size.

    Every point begins in its cheapest cluster, at prices of clusters that even out their sizes:
    such an assignment has the least cost for the sizes it has.  Points then move, one from each
    cluster along the cheapest path, from a cluster that has too many to one that has too few:
    successive shortest paths, of which each leaves the total the least for the sizes reached
    (Ahuja, Magnanti and Orlin, Network Flows, 9.7).  The graph has one node for each cluster.
    """
    points, clusters = cost_FE.shape
    if points % clusters:
        raise ValueError(f"{points} points cannot be divided into {clusters} equal clusters.")
    return evened(cost_FE, _nearly_balanced(cost_FE))


def evened(
    cost_FE: Float[np.ndarray, "F E"], labels_F: Int[np.ndarray, "F"]
) -> Int[np.ndarray, "F"]:
    """Clusters of one size, by moves of points from larger clusters that cost the least.

    Args:
      cost_FE: of each point in each cluster; F must be a multiple of E.
      labels_F: cluster of each point to begin with, of the least cost for the sizes that clusters
        have: then so is what is returned.
    """
    points, clusters = cost_FE.shape
    labels_F, size = np.array(labels_F), points // clusters
    moves = _Moves(cost_FE, labels_F)
    counts_E = np.bincount(labels_F, minlength=clusters)
    while (counts_E > size).any():
        path = moves.cheapest_path(counts_E > size, counts_E < size)
        moves.move_along(path)
        counts_E[path[0]] -= 1
        counts_E[path[-1]] += 1
    return labels_F


def _nearly_balanced(cost_FE: np.ndarray) -> Int[np.ndarray, "F"]:
    """The cheapest cluster of each point, at the best prices of clusters that were tried."""
    points, clusters = cost_FE.shape
    two_F2 = np.partition(cost_FE, min(1, clusters - 1), axis=1)
    step = float(np.mean(two_F2[:, min(1, clusters - 1)] - two_F2[:, 0]))
    price_E, best, least = np.zeros(clusters), None, np.inf
    for trial in range(_TRIALS):
        labels_F = np.argmin(cost_FE + price_E, axis=1)
        over_E = np.bincount(labels_F, minlength=clusters) * clusters / points - 1
        if (most := np.abs(over_E).sum()) < least:
            best, least = labels_F, most
        price_E += step / (1 + trial / 4) * over_E
    return best


class _Moves:
    """Cheapest moves of one point from each cluster to each other; ``labels_F`` is changed."""

    def __init__(self, cost_FE: np.ndarray, labels_F: np.ndarray):
        self._cost_FE, self._labels_F = cost_FE, labels_F
        clusters = cost_FE.shape[1]
        self._price_EE = np.empty((clusters, clusters))
        self._point_EE = np.zeros((clusters, clusters), int)
        for cluster in range(clusters):
            self._look_again(cluster)

    def _look_again(self, cluster: int) -> None:
        """Finds the cheapest moves out of a cluster."""
        own = np.flatnonzero(self._labels_F == cluster)
        self._price_EE[cluster] = np.inf
        if len(own):
            extra = self._cost_FE[own] - self._cost_FE[own, cluster][:, None]
            best = np.argmin(extra, axis=0)
            self._price_EE[cluster] = extra[best, np.arange(len(best))]
            self._point_EE[cluster] = own[best]
        self._price_EE[cluster, cluster] = np.inf

    def cheapest_path(self, full_E: np.ndarray, empty_E: np.ndarray) -> list[int]:
        """Clusters from a full one to one with room, by Bellman and Ford."""
        price_E = np.where(full_E, 0.0, np.inf)
        before_E = np.full(len(price_E), -1)
        for _ in range(len(price_E) - 1):
            through_EE = price_E[:, None] + self._price_EE
            best_E = np.argmin(through_EE, axis=0)
            found_E = through_EE[best_E, np.arange(len(best_E))]
            better_E = found_E < price_E - 1e-12 * (1 + np.abs(found_E))
            if not better_E.any():
                break
            price_E = np.where(better_E, found_E, price_E)
            before_E = np.where(better_E, best_E, before_E)
        path = [int(np.argmin(np.where(empty_E, price_E, np.inf)))]
        while before_E[path[0]] >= 0:
            path.insert(0, int(before_E[path[0]]))
        return path

    def move_along(self, path: list[int]) -> None:
        """Moves one point over each edge of a path."""
        moved = [(self._point_EE[start, end], end) for start, end in itertools.pairwise(path)]
        for point, end in moved:
            self._labels_F[point] = end
        for cluster in path:
            self._look_again(cluster)


def _distances(points_FD, centres_ED) -> Float[np.ndarray, "F E"]:
    """Squared distances."""
    squares_F, squares_E = (np.sum(np.square(x), axis=1) for x in (points_FD, centres_ED))
    return squares_F[:, None] - 2 * points_FD @ centres_ED.T + squares_E


def _spread(points_FD, count: int, random: np.random.Generator) -> Float[np.ndarray, "E D"]:
    """First centres: points, each drawn by its squared distance to the nearest one before."""
    chosen = [int(random.integers(len(points_FD)))]
    nearest_F = _distances(points_FD, points_FD[chosen])[:, 0]
    while len(chosen) < count:
        weights_F = np.maximum(nearest_F, 0)
        total = weights_F.sum()
        weights_F = weights_F / total if total else np.full(len(points_FD), 1 / len(points_FD))
        chosen.append(int(random.choice(len(points_FD), p=weights_F)))
        nearest_F = np.minimum(nearest_F, _distances(points_FD, points_FD[chosen[-1:]])[:, 0])
    return points_FD[chosen]
