"""Hash routing: the token's id alone decides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynmoe_jax.routing.routers import Hash
from tests.routing.given import given, replace


def experts_of(ids, experts=8, k=1, logits_TE=None):
    router = Hash(k=k)
    logits_TE = jnp.zeros((len(ids), experts)) if logits_TE is None else logits_TE
    seen = replace(given(router, logits_TE), token_id_T=jnp.asarray(ids))
    return np.asarray(router({}, seen).expert_TK)


def test_a_token_has_its_experts_wherever_it_stands():
    ids = [7, 300, 7, 12, 7, 300]
    logits_TE = jax.random.normal(jax.random.key(0), (6, 8))
    one, other = experts_of(ids, k=2), experts_of(ids[::-1], k=2, logits_TE=logits_TE)
    np.testing.assert_array_equal(one, other[::-1])
    np.testing.assert_array_equal(one[0], one[2])


@pytest.mark.parametrize(("experts", "k"), [(8, 3), (5, 5), (7, 2), (1, 1)])
def test_k_unlike_experts(experts, k):
    found_TK = experts_of(range(200), experts, k)
    assert all(len(set(row)) == k for row in found_TK)
    assert found_TK.min() >= 0
    assert found_TK.max() < experts


def test_ids_spread_over_experts():
    # 16,000 ids over 16 experts: 1,000 each, deviation 31.
    load_E = np.bincount(experts_of(range(16_000), 16)[:, 0], minlength=16)
    assert np.all(np.abs(load_E - 1000) < 200)
