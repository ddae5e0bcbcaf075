"""Clusters of texts that are alike, equal in number of rows.

Axis legend: R rows, L positions, V vocabulary, D model width.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from dynmoe_jax.data import Batch
from dynmoe_jax.fields import ConfigError
from dynmoe_jax.surgery.experts.clusters import balanced_clusters


def text_clusters(
    batches: Sequence[Batch], table_VD: Float[np.ndarray, "V D"], count: int, seed: int
) -> list[list[Batch]]:
    """Divides rows by the means of their tokens' embeddings.

    Args:
      batches: of text; rows without any are left out, and some that do not divide.
      table_VD: embeddings of tokens.
      count: of clusters.
      seed: of their first centres.

    Returns:
      batches of each cluster.

    Raises:
      ConfigError: there are fewer rows.
    """
    rows = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    used_R = np.flatnonzero((rows["segment_ids"] > 0).any(axis=1))
    each = len(used_R) // count
    if not each:
        raise ConfigError(
            f"--calibration_tokens gives {len(used_R)} rows of text, and {count} clusters of text "
            "need at least one each; give more."
        )
    used_R = used_R[: each * count]
    means_RD = _means(rows["tokens"][used_R], rows["segment_ids"][used_R] > 0, table_VD)
    cluster_R = balanced_clusters(means_RD, count, np.random.default_rng(seed))
    # Batches of one shape, so that the layers are compiled once.
    at_once = math.gcd(each, len(batches[0]["tokens"]))
    found = []
    for cluster in range(count):
        own_R = used_R[cluster_R == cluster]
        pieces = np.split(own_R, each // at_once)
        found.append([{name: array[piece] for name, array in rows.items()} for piece in pieces])
    return found


def _means(tokens_RL, valid_RL, table_VD) -> Float[np.ndarray, "R D"]:
    rows = zip(tokens_RL, valid_RL, strict=True)
    return np.stack([table_VD[tokens_L[valid_L]].mean(axis=0) for tokens_L, valid_L in rows])
