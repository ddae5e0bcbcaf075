"""Balanced clustering: seconds of one exact assignment, and a linear programme as its oracle.

Axis legend: F points (hidden units), E clusters (experts), D features.
"""

import argparse
import time

import numpy as np
import scipy.optimize
import scipy.sparse

from benchmarks.columns import columns
from benchmarks.surgery_part import Part
from benchmarks.timing import Mark, Ratio
from dynmoe_jax.surgery.experts.clusters import balanced_assignment, balanced_clusters

UNITS, CLUSTERS, WIDTH = 5632, 16, 256
SMALL = 704
"""Points of the case that the oracle is asked, too."""

LIMIT = 1.0
PLANTED_SHARE = 0.9
HEADINGS = ("points", "seconds [quartiles]", "least cost found", "oracle", "its seconds")


def measure(asked: argparse.Namespace) -> Part:
    """Times assignments to centres that were drawn, and to planted ones of unlike sizes."""
    rows, seconds = [], {}
    for name, units in (("drawn", UNITS), ("planted", UNITS), ("drawn", SMALL)):
        taken, cost = [], float("nan")
        for seed in range(max(3, asked.rounds)):
            cost_FE = costs(name, units, seed)
            begin = time.perf_counter()
            labels_F = balanced_assignment(cost_FE)
            taken.append(time.perf_counter() - begin)
            cost = cost_FE[np.arange(units), labels_F].sum()
        low, middle, high = np.percentile(taken, [25, 50, 75])
        beside = ("–", "–")
        if units == SMALL:
            begin = time.perf_counter()
            beside = (f"{least_cost(cost_FE):.4f}", f"{time.perf_counter() - begin:.1f}")
        row = (f"{units:,} {name}", f"{middle:.3f} [{low:.3f}, {high:.3f}]", f"{cost:.4f}", *beside)
        rows.append(row)
        seconds[f"{units} {name}"] = taken
    marks = [_mark(seconds, name) for name in ("drawn", "planted")]
    points_FD = np.random.default_rng(0).standard_normal((UNITS, WIDTH))
    begin = time.perf_counter()
    balanced_clusters(points_FD, CLUSTERS, np.random.default_rng(0))
    said = f"All of k-means, 20 assignments at the most: {time.perf_counter() - begin:.1f} s."
    return Part([*columns([HEADINGS, *rows]), said], marks, {"seconds": seconds})


def _mark(seconds: dict, name: str) -> Mark:
    low, middle, high = np.percentile(seconds[f"{UNITS} {name}"], [25, 50, 75])
    said = f"balanced clustering of {UNITS:,} units into {CLUSTERS}, seconds of one assignment"
    return Mark(f"{said}, {name} centres", LIMIT, Ratio(float(middle), float(low), float(high)))


def costs(name: str, units: int, seed: int) -> np.ndarray:
    """Squared distances of points to centres, [F, E].

    Args:
      name: ``drawn``: of points without structure to some of themselves; ``planted``: of points
        around centres that have unlike numbers of them.
      units: F.
      seed: of the points.
    """
    random = np.random.default_rng(seed)
    if name == "drawn":
        points_FD = random.standard_normal((units, WIDTH))
        centres_ED = points_FD[random.choice(units, CLUSTERS, replace=False)]
    else:
        centres_ED = random.standard_normal((CLUSTERS, WIDTH))
        shares_E = PLANTED_SHARE ** np.arange(CLUSTERS)
        owner_F = random.choice(CLUSTERS, units, p=shares_E / shares_E.sum())
        points_FD = centres_ED[owner_F] + random.standard_normal((units, WIDTH))
    squares_F, squares_E = (np.square(x).sum(axis=1) for x in (points_FD, centres_ED))
    return squares_F[:, None] - 2 * points_FD @ centres_ED.T + squares_E


def least_cost(cost_FE: np.ndarray) -> float:
    """The least total cost of a balanced assignment, by scipy's linear programme."""
    points, clusters = cost_FE.shape
    of_points = scipy.sparse.kron(scipy.sparse.eye(points), np.ones((1, clusters)))
    of_clusters = scipy.sparse.kron(np.ones((1, points)), scipy.sparse.eye(clusters))
    found = scipy.optimize.linprog(
        cost_FE.ravel(),
        A_eq=scipy.sparse.vstack([of_points, of_clusters], format="csr"),
        b_eq=np.concatenate([np.ones(points), np.full(clusters, points // clusters)]),
        bounds=(0, 1),
        method="highs",
    )
    return float(found.fun)
