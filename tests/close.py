"""How tests compare arrays with an oracle's."""

import jax
import numpy as np


def assert_close(actual, wanted, tolerance=1e-5):
    """All arrays of a tree are finite and, by their norms, off by ``tolerance`` at most."""
    for a, w in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        a, w = np.asarray(a, np.float64), np.asarray(w, np.float64)
        assert np.all(np.isfinite(a))
        assert np.linalg.norm(a - w) <= tolerance * max(np.linalg.norm(w), 1e-30)
