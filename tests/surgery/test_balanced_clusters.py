"""Balanced clusters, and their exact assignment.

Axis legend: F points, E clusters.
"""

import numpy as np
import pytest
import scipy.optimize

from dynmoe_jax.surgery.experts.clusters import balanced_assignment, balanced_clusters


@pytest.mark.parametrize(("points", "clusters", "seed"), [(24, 4, 0), (40, 8, 1), (30, 2, 2)])
@pytest.mark.parametrize("ties", [False, True])
def test_the_assignment_costs_what_the_optimum_does(points, clusters, seed, ties):
    random = np.random.default_rng(seed)
    cost_FE = random.standard_normal((points, clusters)) + random.standard_normal(clusters)
    if ties:
        cost_FE = np.round(cost_FE)
    labels_F = balanced_assignment(cost_FE)
    assert (np.bincount(labels_F, minlength=clusters) == points // clusters).all()
    columns = np.repeat(cost_FE, points // clusters, axis=1)
    best = columns[scipy.optimize.linear_sum_assignment(columns)].sum()
    assert cost_FE[np.arange(points), labels_F].sum() == pytest.approx(best)


def test_far_groups_are_found_though_the_first_centres_are_drawn():
    random = np.random.default_rng(0)
    centres = 10 * random.standard_normal((4, 6))
    truth = random.permutation(np.repeat(np.arange(4), 16))
    labels = balanced_clusters(centres[truth] + random.standard_normal((64, 6)), 4, random)
    assert len({(a, b) for a, b in zip(truth, labels, strict=True)}) == 4


def test_sizes_that_cannot_be_equal_are_refused():
    with pytest.raises(ValueError, match="10 points cannot be divided into 3"):
        balanced_assignment(np.zeros((10, 3)))
