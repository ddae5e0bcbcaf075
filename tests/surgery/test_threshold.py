"""Threshold of top-p that gives a mean number of experts."""

import numpy as np
import pytest

from dynmoe_jax.surgery.measuring.threshold import mean_experts, threshold_for


def test_by_hand():
    # Of two tokens, the first is sure (0.9, 0.1) and the second is not (0.5, 0.5).
    before = [np.array([[0.0, 0.9], [0.0, 0.5]], np.float32)]
    p = threshold_for(before, 1.5)
    assert 0.5 < p < 0.9
    assert mean_experts(before, p) == 1.5
    assert mean_experts(before, threshold_for(before, 1.0)) == 1.0
    assert mean_experts(before, threshold_for(before, 2.0)) == 2.0


@pytest.mark.parametrize("experts", [1.2, 1.8, 3.0, 6.5])
def test_layers_share_one_threshold(experts):
    random = np.random.default_rng(0)
    before = []
    for scale in (0.3, 1.0, 3.0):
        logits_TE = scale * random.standard_normal((500, 8))
        probs_TE = -np.sort(-np.exp(logits_TE) / np.exp(logits_TE).sum(-1, keepdims=True))
        before.append((np.cumsum(probs_TE, -1) - probs_TE).astype(np.float32))
    assert mean_experts(before, threshold_for(before, experts)) == pytest.approx(experts, rel=1e-3)
